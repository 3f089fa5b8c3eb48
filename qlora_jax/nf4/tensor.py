"""NF4Tensor: a frozen weight in 4 bits, as a pytree."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nf4.codebook import SCALE_GROUP
from qlora_jax.nf4.layout import TILE, TILE_BYTES, check_layout, fragments_to_rows, rows_to_fragments, tiles


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight of logical shape `[in_features, out_features]` (Flax's kernel), stored in bitsandbytes' bytes.

    The bytes are those of the transpose `[out, in]`, row-major, two codes a byte, the first element in the high
    nibble. Where a row holds whole blocks (`in % block_size == 0`) leaves keep the row axis, so that they can be
    sharded; otherwise blocks straddle rows and leaves are flat. A stack of layers puts `[L]` before every leaf; the
    static `shape` stays that of one layer.

    Attributes:
      packed: uint8 `[out, in/2]`, or flat `[ceil(out*in/2)]`; in layout "fragments"
        `[ceil(out/64), ceil(in/64), 2048]`.
      absmax: block scales, `[out, in/block_size]` or flat `[n_blocks]`: uint8 codes when double-quantized, else
        float32.
      absmax_scale: float32 `[ceil(n_blocks/256)]`, second-level scales; None without double quantization.
      absmax_offset: float32 `[]`, the mean that double quantization subtracts; None without it.
      where: int32 `[3]` = (layer, first row, first block of a row) of a view; None: a whole, unstacked tensor.
      shape: `(in_features, out_features)` of one whole layer.
      quant_type: "nf4", or another 4-bit type (qlora_jax.nf4.codebook).
      block_size: number of weights that share one scale.
      dtype: name of the dtype that the weight had; dequantized values are rounded to it.
      layout: "rows", the byte order above, or "fragments", that of the CUDA kernels (qlora_jax.nf4.layout). It changes
        `packed` alone: scales keep their order.

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
        axes = 1 if self.is_flat else 3 if self.layout == "fragments" else 2
        return self.packed.shape[0] if self.packed.ndim > axes else None

    @property
    def local_shape(self) -> tuple[int, int]:
        """`(in_features, out_features)` of the buffers at hand: of a shard, less than `shape`.

        Raises:
          ValueError: buffers of layout "fragments" that were cut within a 64 x 64 tile.
        """
        if self.is_flat:
            return self.shape
        if self.layout == "rows":
            return self.packed.shape[-1] * 2, self.packed.shape[-2]
        local = (self.absmax.shape[-1] * self.block_size, self.absmax.shape[-2])
        whole = all(own % TILE == 0 or own == full for own, full in zip(local, self.shape, strict=True))
        if not whole or self.packed.shape[-3:] != (*tiles(*local), TILE_BYTES):
            raise ValueError(
                f"packed {list(self.packed.shape)} and absmax {list(self.absmax.shape)} are not the same part of a "
                f"weight of shape {self.shape}: layout 'fragments' can be divided only into whole {TILE} x {TILE} "
                "tiles; divide w.to_layout('rows') instead"
            )
        return local

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
          ValueError: blocks straddle rows (`in_features % block_size != 0`), so rows cannot be divided; or the layout
            is "fragments" and the shard does not hold whole 64 x 64 tiles.
        """
        if self.is_flat:
            raise ValueError(
                f"a weight of shape {self.shape} cannot be sharded: in_features {self.shape[0]} is not a multiple of "
                f"block_size {self.block_size}, so blocks straddle rows"
            )
        if self.layout == "fragments":
            self._check_origin("first_row", first_row, 1)
            self._check_origin("first_block", first_block, self.block_size)
        return self._view(first_row=first_row, first_block=first_block)

    def to_layout(self, layout: str) -> "NF4Tensor":
        """The same weight with its bytes in another order; nothing is lost either way.

        Stacks are permuted layer by layer: beside the two of them, one layer of memory is needed. A view stays one.

        Args:
          layout: "rows" (bitsandbytes' bytes; what exports and shards of any size need) or "fragments".

        Raises:
          ValueError: another word; or "fragments" where blocks straddle rows.
        """
        if check_layout(layout) == self.layout:
            return self
        check_not_flat(self.shape, self.block_size)
        return dataclasses.replace(self, packed=_permute(self.packed, layout, self.local_shape), layout=layout)

    def _check_origin(self, name: str, first: int | jax.Array, step: int) -> None:
        self.local_shape  # noqa: B018 (raises where the buffers do not hold whole tiles)
        if not isinstance(first, jax.core.Tracer) and int(first) * step % TILE:
            raise ValueError(
                f"{name}={int(first)} lies within a {TILE} x {TILE} tile: layout 'fragments' can be divided only into "
                "whole tiles; divide w.to_layout('rows') instead"
            )

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


@functools.partial(jax.jit, static_argnums=(1, 2))
def _permute(packed: jax.Array, layout: str, local_shape: tuple[int, int]) -> jax.Array:
    def one(packed: jax.Array) -> jax.Array:
        return rows_to_fragments(packed) if layout == "fragments" else fragments_to_rows(packed, *local_shape)

    return one(packed) if packed.ndim == (2 if layout == "fragments" else 3) else jax.lax.map(one, packed)


def check_not_flat(shape: tuple[int, int], block_size: int) -> None:
    """Whether a weight has a layout "fragments".

    Raises:
      ValueError: blocks straddle rows.
    """
    if shape[0] % block_size != 0:
        raise ValueError(
            f"a weight of shape {shape} has no layout 'fragments': in_features {shape[0]} is not a multiple of "
            f"block_size {block_size}, so blocks straddle rows"
        )


def leaf_shapes(
    shape: tuple[int, int], block_size: int, double_quant: bool, layout: str = "rows"
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each leaf of one layer: what readers allocate and check against.

    Args:
      shape: `(in_features, out_features)`.
      block_size: weights per scale.
      double_quant: whether scales are quantized themselves.
      layout: order of the packed bytes.

    Raises:
      ValueError: another layout than "rows" and "fragments"; or "fragments" where blocks straddle rows.
    """
    in_features, out_features = shape
    n_blocks = math.ceil(in_features * out_features / block_size)
    flat = in_features % block_size != 0
    if check_layout(layout) == "fragments":
        check_not_flat(shape, block_size)
    blocks = (n_blocks,) if flat else (out_features, in_features // block_size)
    packed: tuple[int, ...] = (out_features, in_features // 2)
    if flat:
        packed = (math.ceil(in_features * out_features / 2),)
    elif layout == "fragments":
        packed = (*tiles(in_features, out_features), TILE_BYTES)
    leaves: dict[str, tuple[tuple[int, ...], Any]] = {
        "packed": (packed, np.uint8),
        "absmax": (blocks, np.uint8 if double_quant else np.float32),
    }
    if double_quant:
        leaves["absmax_scale"] = ((math.ceil(n_blocks / SCALE_GROUP),), np.float32)
        leaves["absmax_offset"] = ((), np.float32)
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in leaves.items()}
