"""NF4Tensor: a frozen weight in 4 bits, as a pytree."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nf4.codebook import SCALE_GROUP


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight of logical shape `[in_features, out_features]` (Flax's kernel), stored in bitsandbytes' bytes.

    The bytes are those of the transpose `[out, in]`, row-major, two codes a byte, the first element in the high
    nibble. Where a row holds whole blocks (`in % block_size == 0`) leaves keep the row axis, so that they can be
    sharded; otherwise blocks straddle rows and leaves are flat. A stack of layers puts `[L]` before every leaf; the
    static `shape` stays that of one layer.

    Attributes:
      packed: uint8 `[out, in/2]`, or flat `[ceil(out*in/2)]`.
      absmax: block scales, `[out, in/block_size]` or flat `[n_blocks]`: uint8 codes when double-quantized, else
        float32.
      absmax_scale: float32 `[ceil(n_blocks/256)]`, second-level scales; None without double quantization.
      absmax_offset: float32 `[]`, the mean that double quantization subtracts; None without it.
      where: int32 `[3]` = (layer, first row, first block of a row) of a view; None: a whole, unstacked tensor.
      shape: `(in_features, out_features)` of one whole layer.
      quant_type: "nf4".
      block_size: number of weights that share one scale.
      dtype: name of the dtype that the weight had; dequantized values are rounded to it.
      layout: "rows", the byte order above.

    Nothing is validated here: JAX rebuilds pytrees with tracers, None and placeholder objects as leaves.
    """

    packed: Any
    absmax: Any
    absmax_scale: Any = None
    absmax_offset: Any = None
    where: Any = None
    shape: tuple[int, int] = dataclasses.field(default=(0, 0), kw_only=True)
    quant_type: str = dataclasses.field(default="nf4", kw_only=True)
    block_size: int = dataclasses.field(default=64, kw_only=True)
    dtype: str = dataclasses.field(default="bfloat16", kw_only=True)
    layout: str = dataclasses.field(default="rows", kw_only=True)

    @property
    def in_features(self) -> int:
        return self.shape[0]

    @property
    def out_features(self) -> int:
        return self.shape[1]

    @property
    def is_flat(self) -> bool:
        """Whether blocks straddle rows, so that the leaves have no row axis and cannot be sharded."""
        return self.shape[0] % self.block_size != 0

    @property
    def num_layers(self) -> int | None:
        """Length of the stack; None for a single layer."""
        return self.packed.shape[0] if self.packed.ndim > (1 if self.is_flat else 2) else None

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers (the three indices of a view not counted)."""
        leaves = (self.packed, self.absmax, self.absmax_scale, self.absmax_offset)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf is not None)

    def layer(self, index: int | jax.Array) -> "NF4Tensor":
        """A view of one layer of a stack: the same buffers and an int32 index, so nothing is copied.

        Args:
          index: Python int, or traced int32 `[]` (clamped to the stack inside the kernels).

        Raises:
          ValueError: this tensor is not stacked.
          IndexError: a concrete index outside `0 <= index < num_layers`.
        """
        if self.num_layers is None:
            raise ValueError(f"layer({index}) needs a stack of layers; this is one weight of shape {self.shape}")
        if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < self.num_layers:
            raise IndexError(f"layer {int(index)} of a stack of {self.num_layers} layers")
        return self._view(layer=index)

    def shard(self, first_row: int | jax.Array, first_block: int | jax.Array = 0) -> "NF4Tensor":
        """Says which part of the whole tensor these (local) buffers are, for use inside `jax.shard_map`.

        Double-quantized scales are grouped over the whole tensor, and their second level is replicated: a shard has
        to know where it begins.

        Args:
          first_row: int32 `[]`, index of the first local output feature.
          first_block: int32 `[]`, index of the first local block along the input features.

        Raises:
          ValueError: blocks straddle rows (`in_features % block_size != 0`), so rows cannot be divided.
        """
        if self.is_flat:
            raise ValueError(
                f"a weight of shape {self.shape} cannot be sharded: in_features {self.shape[0]} is not a multiple of "
                f"block_size {self.block_size}, so blocks straddle rows"
            )
        return self._view(first_row=first_row, first_block=first_block)

    def _view(self, **origin: int | jax.Array) -> "NF4Tensor":
        names = ("layer", "first_row", "first_block")
        old = [0, 0, 0] if self.where is None else [self.where[i] for i in range(3)]
        new = [jnp.asarray(origin.get(name, value), jnp.int32) for name, value in zip(names, old, strict=True)]
        return dataclasses.replace(self, where=jnp.stack(new))

    @staticmethod
    def stack(layers: Sequence["NF4Tensor"]) -> "NF4Tensor":
        """Stacks single layers of one kind into a tensor with `[L]` before every leaf.

        Raises:
          ValueError: no layers, or layers that differ in a static field or are stacked already.
        """
        if not layers:
            raise ValueError("no layers to stack")
        structures = {jax.tree.structure(layer) for layer in layers}
        if len(structures) > 1 or layers[0].num_layers is not None:
            raise ValueError(f"layers to stack must be single layers of one kind, got {len(structures)} kinds")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


jax.tree_util.register_dataclass(
    NF4Tensor,
    data_fields=["packed", "absmax", "absmax_scale", "absmax_offset", "where"],
    meta_fields=["shape", "quant_type", "block_size", "dtype", "layout"],
)


def leaf_shapes(
    shape: tuple[int, int], block_size: int, double_quant: bool
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each leaf of one layer: what readers allocate and check against.

    Args:
      shape: `(in_features, out_features)`.
      block_size: weights per scale.
      double_quant: whether scales are quantized themselves.
    """
    in_features, out_features = shape
    n_blocks = math.ceil(in_features * out_features / block_size)
    flat = in_features % block_size != 0
    blocks = (n_blocks,) if flat else (out_features, in_features // block_size)
    leaves: dict[str, tuple[tuple[int, ...], Any]] = {
        "packed": (
            (math.ceil(in_features * out_features / 2),) if flat else (out_features, in_features // 2),
            np.uint8,
        ),
        "absmax": (blocks, np.uint8 if double_quant else np.float32),
    }
    if double_quant:
        leaves["absmax_scale"] = ((math.ceil(n_blocks / SCALE_GROUP),), np.float32)
        leaves["absmax_offset"] = ((), np.float32)
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in leaves.items()}
