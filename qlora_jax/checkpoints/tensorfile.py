"""Files inside checkpoint folders: safetensors and JSON, with errors that name the file and the tensor."""

import contextlib
import json
import math
import mmap
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # registers bfloat16 with NumPy, by which safetensors finds it
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.errors import UserError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_OTHER_DTYPES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F64": np.dtype(np.float64)}


class StoredTensor(NamedTuple):
    """Where a tensor lies, from byte `start` of the file on, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


def read_header(
    file: Path, also: Collection[str] = (), unread: re.Pattern[str] | None = None
) -> dict[str, StoredTensor]:
    """Place, shape and dtype of each tensor of a safetensors file.

    Args:
      file: the file.
      also: dtypes to accept beside F32, F16 and BF16: some of U8, I8 and F64.
      unread: names of tensors to leave out, whatever they are.

    Raises:
      UserError: the file is damaged or cut short, or a tensor has another dtype.
    """
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if unread is not None and unread.fullmatch(name):
                    continue
                view = opened.get_slice(name)
                tensors[name] = (tuple(view.get_shape()), str(view.get_dtype()))
        starts = _starts(file)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error
    dtypes = _DTYPES | {name: _OTHER_DTYPES[name] for name in also}
    for name, (_, dtype) in tensors.items():
        if dtype not in dtypes:
            raise UserError(
                f"tensor {name!r} of {file} is stored as {dtype}",
                why="weights are read as F32, F16 or BF16, or, where config.json says load_in_4bit, in bitsandbytes' 4",
                fix="model.path=FOLDER of the 16-bit model",
            )
    return {name: StoredTensor(file, shape, dtypes[dtype], starts[name]) for name, (shape, dtype) in tensors.items()}


def _starts(file: Path) -> dict[str, int]:
    """The byte at which each tensor begins, of a file that safetensors has opened without complaint."""
    header, start = _header(file)
    header.pop("__metadata__", None)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; of one that `read_header` has taken."""
    return _header(file)[0].get("__metadata__") or {}


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """One tensor, in its own dtype, read-only and where it lies: its part of the file is mapped, and read when it is
    looked at. The mapping ends with the array, so that pages read once do not pile up.

    Raises:
      UserError: the file cannot be read any more.
    """
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    skipped = tensor.start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(tensor.file, "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), skipped + size, access=mmap.ACCESS_READ, offset=tensor.start - skipped)
    except (OSError, ValueError) as error:
        raise unreadable(tensor.file, error) from error
    if hasattr(mapped, "madvise"):
        with contextlib.suppress(OSError):  # advice alone: not every file system takes it
            mapped.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapped, np.uint8, size, skipped).view(tensor.dtype).reshape(tensor.shape)


def read_tensors(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Several (small) tensors of a safetensors file, by name. UserError: the file cannot be read any more."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. UserError: it cannot be read, or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON", why=first_line(error), fix="fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", why=f"it holds a {type(content).__name__}")
    return content


def unreadable(file: Path, error: Exception) -> UserError:
    """The error for a safetensors file that the library cannot read: names the first tensor that is cut off."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                return UserError(
                    f"{file} is a pointer of git-lfs, not the weights",
                    why="the clone was made without git-lfs",
                    fix="git lfs pull",
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                return UserError(
                    f"{file} is truncated or no safetensors file",
                    why=f"its header should end at byte {8 + length}, the file has {size} bytes",
                    fix="fetch the file again",
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = sorted((8 + length + entry["data_offsets"][1], name) for name, entry in header.items())
        end, name = next((end, name) for end, name in ends if end > size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return UserError(f"{file} cannot be read as safetensors", why=first_line(error), fix="fetch the file again")
    return UserError(
        f"{file} is truncated: tensor {name!r} should end at byte {end}, the file has {size} bytes",
        why="a download or copy was cut short",
        fix="fetch the file again",
    )


def not_finite(name: str, path: Path) -> UserError:
    """The error for a weight that has values which are NaN or infinite."""
    return UserError(
        f"tensor {name!r} of {path} has values that are NaN or infinite",
        why="every output of the model would be NaN",
        fix="fetch the checkpoint again, or take an earlier one of the same training",
    )


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A heading ("Validation error for field 'x':") says what is wrong in the line after it.
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said or 'no message'}"
