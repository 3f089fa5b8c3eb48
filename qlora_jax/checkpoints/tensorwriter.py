"""Writes safetensors, one file or shards under an index, without ever holding more than the tensors of one group.

The format's header comes first and gives every tensor's place, so names, shapes and dtypes are planned before any value
is known. transformers' names: `model.safetensors`, or `model-00001-of-00003.safetensors` and
`model.safetensors.index.json`.
"""

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from qlora_jax.errors import UserError

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_INDEX = "model.safetensors.index.json"


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


# Tensors that are made together and stay in one file.
Group = Sequence[TensorSpec]


def write_shards(
    folder: Path,
    groups: Sequence[Group],
    make: Callable[[int], Mapping[str, np.ndarray]],
    *,
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes tensors in the order of their groups.

    Args:
      folder: an empty one.
      groups: what is to be written.
      make: gives the arrays of group i by name; called once for each, in order, and nothing of it is kept.
      shard_bytes: largest size of a file's tensors; a group that is larger has a file of its own.
      metadata: for each file's header, beside `format: pt`, which transformers asks for.
      progress: called as `progress(bytes written, bytes in all)` after each group.

    Returns:
      The files of weights.

    Raises:
      UserError: the disk has too little room, before anything is written or meanwhile.
      ValueError: `make` gave other names, shapes or dtypes than planned.
    """
    total = sum(spec.nbytes for group in groups for spec in group)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise _disk_full(f"{total / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")
    shards = _divide(groups, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    done = 0
    try:
        for name, shard in zip(names, shards, strict=True):
            with open(folder / name, "wb") as stream:
                _write_header(stream, [spec for i in shard for spec in groups[i]], metadata or {})
                for i in shard:
                    done += _write_group(stream, groups[i], make(i))
                    if progress is not None:
                        progress(done, total)
        if len(shards) > 1:
            places = {
                spec.name: name for name, shard in zip(names, shards, strict=True) for i in shard for spec in groups[i]
            }
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full("it filled up while the weights were written") from error
        raise
    return [folder / name for name in names]


def _divide(groups: Sequence[Group], shard_bytes: int) -> list[list[int]]:
    """Groups by file, in order."""
    shards: list[list[int]] = []
    held = 0
    for i, group in enumerate(groups):
        size = sum(spec.nbytes for spec in group)
        if not shards or held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(i)
        held += size
    return shards


def _write_header(stream: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    stream.write(len(text).to_bytes(8, "little") + text)


def _write_group(stream: BinaryIO, group: Group, arrays: Mapping[str, np.ndarray]) -> int:
    if arrays.keys() != {spec.name for spec in group}:
        raise ValueError(f"planned {[spec.name for spec in group]}, got {list(arrays)}")
    for spec in group:
        array = arrays[spec.name]
        if (array.shape, array.dtype.name) != (spec.shape, spec.dtype):
            raise ValueError(f"planned {spec}, got {array.dtype.name}{list(array.shape)}")
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sum(spec.nbytes for spec in group)


def _disk_full(why: str) -> UserError:
    return UserError(
        "the disk has too little room", why=why, fix="free some space, or name an output folder on another disk"
    )
