"""From a checkpoint to a folder, one weight at a time: in bitsandbytes' 4 bits, or dense."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoints import t5
from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.bitsandbytes import QUANTIZED_FROM, BitsandbytesCheckpoint, Form
from qlora_jax.checkpoints.bitsandbytes_writer import (
    SHARD_BYTES,
    packed_specs,
    packed_tensors,
    quantization_config,
)
from qlora_jax.checkpoints.companions import config_of, copy_companions, write_config
from qlora_jax.checkpoints.digest import quantized_from
from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.checkpoints.tensorfile import not_finite
from qlora_jax.checkpoints.tensorwriter import Group, TensorSpec, write_shards
from qlora_jax.nf4.decode import dequantize
from qlora_jax.nf4.streaming import quantize_rows
from qlora_jax.nf4.tensor import NF4Tensor, leaf_shapes

# (bytes written, bytes in all)
Progress = Callable[[int, int], None]

# The table of relative positions in a T5's first block is looked up, not multiplied by.
_LAYER_WEIGHT = re.compile(r"(?:.*\.)?(?:layers|block)\.\d+\..+(?<!relative_attention_bias)\.weight")
# Of dense tensors so much is looked at at a time.
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      files: of weights.
      nbytes: of tensors.
      linear_bits: bits for each weight of the linears, scales counted in; 0 where they are dense.
      wide: kinds of linears that transformers has in 16 bits only; decoded for it.
      missing: what else a folder usually has and this one does not, in words.
    """

    files: tuple[Path, ...]
    nbytes: int
    linear_bits: float
    wide: tuple[str, ...]
    missing: tuple[str, ...]


def block_linears(checkpoint: Checkpoint) -> list[str]:
    """Names of the weights of the linears inside the layers: what is quantized. Embeddings and the head are not."""
    return [name for name in checkpoint.names() if _LAYER_WEIGHT.fullmatch(name) and len(checkpoint.shape(name)) == 2]


def convert(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    source_sha256: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    also: Callable[[Path], None] | None = None,
    quantize: Callable[[str, np.ndarray], tuple[NF4Tensor, bool]] | None = None,
) -> Converted:
    """Quantizes a checkpoint into a folder that transformers, vLLM, bitsandbytes and `load_model` read.

    The bytes are those that `load_model` makes of the checkpoint; a linear that transformers has in 16 bits only is
    written so, with the values that those bytes stand for (see `t5.is_kept_wide`). Tensors are read, quantized and
    written one after the other, so that host memory holds two of them at most. The folder appears whole or not at all.

    Args:
      checkpoint: a model; of one in bitsandbytes' 4 bits the bytes are written as they are, and the next three
        arguments do not count.
      folder: where to; see `check_unused`.
      quant_type: "nf4" or "fp4", which are bitsandbytes'.
      block_size, double_quant: see quantize.
      source_sha256: fingerprint of the checkpoint; recorded, so that an adapter trained on either is known to fit the
        other. Not where `quantize` makes other bytes.
      shard_bytes: largest size of a file.
      progress: called as `progress(bytes written, bytes in all)` after each weight.
      also: called with the filled folder before it takes its place, to add files of its own.
      quantize: makes 4 bits of a weight by name and values `[out, in]` (see LoftQ), and says whether all are finite.

    Raises:
      UserError: a value that is not finite, too little room on the disk, or a path that is a file.
    """
    names, linears = checkpoint.names(), block_linears(checkpoint)
    stored = isinstance(checkpoint, BitsandbytesCheckpoint)
    wide = {name for name in linears if t5.is_t5(checkpoint.config) and t5.is_kept_wide(name)}
    forms: dict[str, Form] = {}
    for name in linears:
        dtype = checkpoint.dtype(name).name
        kept = "bfloat16" if dtype == "float32" else dtype
        out_features, in_features = checkpoint.shape(name)
        own = checkpoint.form(name) if isinstance(checkpoint, BitsandbytesCheckpoint) else None
        if own is not None or not stored:
            forms[name] = own or Form((out_features, in_features), quant_type, block_size, kept, double_quant)

    def packed(name: str) -> NF4Tensor:
        if isinstance(checkpoint, BitsandbytesCheckpoint):
            return checkpoint.read_packed(name)
        value = checkpoint.read(name)
        if quantize is not None:
            w, finite = quantize(name, value)
        else:
            w, finite = quantize_rows(value, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        if not finite:
            raise not_finite(name, checkpoint.path)
        return w

    def make(index: int) -> dict[str, np.ndarray]:
        name = names[index]
        if name not in forms:
            return {name: _finite(checkpoint, name)}
        return {name: decoded(packed(name))} if name in wide else packed_tensors(name, packed(name))

    def specs(name: str) -> Group:
        if name not in forms:
            return [_spec(checkpoint, name)]
        form = forms[name]
        return [TensorSpec(name, form.shape, form.dtype)] if name in wide else packed_specs(name, form)

    groups = [specs(name) for name in names]
    skipped = sorted({name.split(".")[-2] for name in linears if name not in forms or name in wide})
    config = config_of(checkpoint) | {"quantization_config": quantization_config(next(iter(forms.values())), skipped)}
    size = 0
    for name, form in forms.items():
        leaves = leaf_shapes(form.shape[::-1], form.block_size, form.double_quant).values()
        size += sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves if name not in wide)
        size += 2 * math.prod(form.shape) * (name in wide)
    bits = 8 * size / sum(math.prod(form.shape) for form in forms.values())
    made_of = checkpoint.quantized_from if isinstance(checkpoint, BitsandbytesCheckpoint) else None
    if source_sha256 is not None and not stored:
        made_of = quantized_from(source_sha256, quant_type, block_size, double_quant)
    metadata = {} if made_of is None else {QUANTIZED_FROM: made_of}
    made = _write(checkpoint, folder, groups, make, config, shard_bytes, progress, also, metadata)
    kinds = sorted({name.split(".")[-2] for name in wide})
    return dataclasses.replace(made, linear_bits=bits, wide=tuple(kinds))


def write_dense(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    also: Callable[[Path], None] | None = None,
) -> Converted:
    """Writes a checkpoint's tensors as `read` gives them, into a folder that transformers and `load_model` read.

    Args:
      checkpoint: a model.
      folder: where to; see `check_unused`.
      shard_bytes: largest size of a file.
      progress: called as `progress(bytes written, bytes in all)` after each tensor.
      also: see `convert`.

    Raises:
      UserError: a value that is not finite, too little room on the disk, or a path that is a file.
    """
    names = checkpoint.names()
    config = config_of(checkpoint)
    dtypes = {checkpoint.dtype(name).name for name in block_linears(checkpoint)}
    for key in ("torch_dtype", "dtype"):
        if key in config and len(dtypes) == 1:
            config[key] = min(dtypes)
    return _write(
        checkpoint,
        folder,
        [[_spec(checkpoint, name)] for name in names],
        lambda index: {names[index]: _finite(checkpoint, names[index])},
        config,
        shard_bytes,
        progress,
        also,
        metadata={},
    )


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    groups: Sequence[Group],
    make: Callable[[int], Mapping[str, np.ndarray]],
    config: dict[str, Any],
    shard_bytes: int,
    progress: Progress | None,
    also: Callable[[Path], None] | None,
    metadata: Mapping[str, str],
) -> Converted:
    with whole_folder(folder) as filled:
        missing = copy_companions(checkpoint, filled)  # first: what it may refuse costs no time then
        write_config(filled, config)
        files = write_shards(filled, groups, make, shard_bytes=shard_bytes, metadata=metadata, progress=progress)
        if also is not None:
            also(filled)
    return Converted(
        files=tuple(folder / file.name for file in files),
        nbytes=sum(spec.nbytes for group in groups for spec in group),
        linear_bits=0.0,
        wide=(),
        missing=tuple(missing),
    )


def _spec(checkpoint: Checkpoint, name: str) -> TensorSpec:
    return TensorSpec(name, tuple(checkpoint.shape(name)), checkpoint.dtype(name).name)


def _finite(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A dense tensor. UserError: it has values that are NaN or infinite."""
    value = checkpoint.read(name)
    flat = value.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        if not np.isfinite(flat[start : start + _CHUNK]).all():
            raise not_finite(name, checkpoint.path)
    return value


def decoded(w: NF4Tensor) -> np.ndarray:
    """What 4 bits stand for, `[out, in]` in the dtype of the original."""
    return np.ascontiguousarray(np.asarray(_decoded(w)).T)


_decoded = jax.jit(dequantize)
