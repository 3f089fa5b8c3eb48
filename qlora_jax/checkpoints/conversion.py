"""From a checkpoint in 16 bits to a folder in bitsandbytes' 4 bits, one weight at a time."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.bitsandbytes import Form
from qlora_jax.checkpoints.bitsandbytes_writer import (
    SHARD_BYTES,
    packed_specs,
    packed_tensors,
    quantization_config,
)
from qlora_jax.checkpoints.companions import config_of, copy_companions, write_config
from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.checkpoints.tensorfile import not_finite
from qlora_jax.checkpoints.tensorwriter import TensorSpec, write_shards
from qlora_jax.nf4.streaming import quantize_rows
from qlora_jax.nf4.tensor import leaf_shapes

_LAYER_WEIGHT = re.compile(r"(?:.*\.)?layers\.\d+\..+\.weight")
# Of dense tensors so much is looked at at a time.
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      files: of weights.
      nbytes: of tensors.
      linear_bits: bits for each weight of the linears, their scales counted in.
      missing: what else a folder usually has and this one does not, in words.
    """

    files: tuple[Path, ...]
    nbytes: int
    linear_bits: float
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
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Quantizes a checkpoint into a folder that transformers, vLLM, bitsandbytes and `load_model` read.

    The bytes are those that `load_model` makes of the checkpoint. Tensors are read, quantized and written one after the
    other, so that host memory holds two of them at most. The folder appears whole or not at all.

    Args:
      checkpoint: a model whose linears are in 16 or 32 bits.
      folder: where to; see `check_unused`.
      quant_type: "nf4" or "fp4", which are bitsandbytes'.
      block_size, double_quant: see quantize.
      shard_bytes: largest size of a file.
      progress: called as `progress(bytes written, bytes in all)` after each weight.

    Raises:
      UserError: a value that is not finite, too little room on the disk, or a path that is a file.
    """
    names, linears = checkpoint.names(), set(block_linears(checkpoint))
    forms = {}
    for name in linears:
        dtype = checkpoint.dtype(name).name
        kept = "bfloat16" if dtype == "float32" else dtype
        out_features, in_features = checkpoint.shape(name)
        forms[name] = Form((out_features, in_features), quant_type, block_size, kept, double_quant)
    groups = [
        packed_specs(name, forms[name])
        if name in forms
        else [TensorSpec(name, tuple(checkpoint.shape(name)), checkpoint.dtype(name).name)]
        for name in names
    ]

    def make(index: int) -> dict[str, np.ndarray]:
        name = names[index]
        value = checkpoint.read(name)
        if name not in forms:
            check_finite(checkpoint, name, value)
            return {name: value}
        w, finite = quantize_rows(value, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        if not finite:
            raise not_finite(name, checkpoint.path)
        return packed_tensors(name, w)

    with whole_folder(folder) as filled:
        missing = copy_companions(checkpoint, filled)  # first: what it may refuse costs no time then
        files = write_shards(filled, groups, make, shard_bytes=shard_bytes, progress=progress)
        config = config_of(checkpoint)
        config["quantization_config"] = quantization_config(next(iter(forms.values())))
        write_config(filled, config)
    leaves = [leaf_shapes(form.shape[::-1], block_size, double_quant).values() for form in forms.values()]
    packed = sum(math.prod(shape) * dtype.itemsize for shapes in leaves for shape, dtype in shapes)
    return Converted(
        files=tuple(folder / file.name for file in files),
        nbytes=sum(spec.nbytes for group in groups for spec in group),
        linear_bits=8 * packed / sum(math.prod(form.shape) for form in forms.values()),
        missing=tuple(missing),
    )


def check_finite(checkpoint: Checkpoint, name: str, value: np.ndarray) -> None:
    """Raises UserError where a dense tensor has values that are NaN or infinite."""
    flat = value.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        if not np.isfinite(flat[start : start + _CHUNK]).all():
            raise not_finite(name, checkpoint.path)
