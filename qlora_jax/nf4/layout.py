"""The two orders of packed bytes, and the way from one to the other: a lossless permutation.

"rows" is bitsandbytes' order: `[out, in/2]`, the element with the even index in the high nibble. It is what quantize
makes, what checkpoints hold and what the CPU's kernels read.

"fragments" is the order of the CUDA kernels: `[ceil(out/64), ceil(in/64), 2048]`, one 2 KB tile for 64 outputs x 64
inputs, so that one lane loads 16 bytes and has its operands of four `mma.m16n8k16` (A fragments), and a tile is one
bulk copy in either direction of the product. Inside a tile:

    strip   4 x 512 bytes   outputs 16i .. 16i+15
    chunk  32 x  16 bytes   lane (g = lane / 4, t = lane % 4) lies at chunk lane xor 2 ((lane / 8) % 4): with that
                            swizzle neither direction's reads of shared memory meet in a bank
    word    4 x   4 bytes   inputs 16b .. 16b+15
    byte    j = 0 .. 3      output g + 8 (j % 2), inputs 2t + 8 (j / 2) in the low nibble and the next in the high one

Bytes of "rows" are never split, only moved, with their nibbles exchanged. What lies beyond the matrix is code 7, zero.
"""

import difflib
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

LAYOUTS = ("rows", "fragments")
# Value of the attribute `layout` of the CUDA handlers.
LAYOUT_CODES = {name: code for code, name in enumerate(LAYOUTS)}
TILE = 64
TILE_BYTES = TILE * TILE // 2

_PADDING = 0x77
_LANES = np.arange(32)
# Chunk -> lane; its own inverse.
_SWIZZLE = _LANES ^ (((_LANES >> 3) & 3) << 1)


def check_layout(layout: str) -> str:
    """The name itself.

    Raises:
      ValueError: it is not a layout's; the nearest one is named.
    """
    if layout not in LAYOUTS:
        close = difflib.get_close_matches(str(layout), LAYOUTS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"layout must be {' or '.join(map(repr, LAYOUTS))}, got {layout!r}{hint}")
    return layout


def tiles(in_features: int, out_features: int) -> tuple[int, int]:
    """Numbers of 64 x 64 tiles along (out, in)."""
    return math.ceil(out_features / TILE), math.ceil(in_features / TILE)


def rows_to_fragments(packed: UInt8[Array, "out half_in"]) -> UInt8[Array, "out_tiles in_tiles 2048"]:
    """Bytes of one layer, from "rows" to "fragments"."""
    out_features, row_bytes = packed.shape
    out_tiles, in_tiles = tiles(2 * row_bytes, out_features)
    padding = ((0, out_tiles * TILE - out_features), (0, in_tiles * TILE // 2 - row_bytes))
    padded = jnp.pad(_exchange_nibbles(packed), padding, constant_values=_PADDING)
    # Axes: out = (tile, strip, j % 2, g); in = (tile, word, j / 2, t).
    parts = padded.reshape(out_tiles, 4, 2, 8, in_tiles, 4, 2, 4).transpose(0, 4, 1, 3, 7, 5, 6, 2)
    bundles = parts.reshape(out_tiles, in_tiles, 4, 32, 16)[..., _SWIZZLE, :]
    return bundles.reshape(out_tiles, in_tiles, TILE_BYTES)


def fragments_to_rows(
    packed: UInt8[Array, "out_tiles in_tiles 2048"], in_features: int, out_features: int
) -> UInt8[Array, "out half_in"]:
    """Bytes of one layer, from "fragments" to "rows"; the padding is cut off."""
    out_tiles, in_tiles, _ = packed.shape
    bundles = packed.reshape(out_tiles, in_tiles, 4, 32, 16)[..., _SWIZZLE, :]
    parts = bundles.reshape(out_tiles, in_tiles, 4, 8, 4, 4, 2, 2).transpose(0, 2, 7, 3, 1, 5, 6, 4)
    padded = parts.reshape(out_tiles * TILE, in_tiles * TILE // 2)
    return _exchange_nibbles(padded[:out_features, : in_features // 2])


def _exchange_nibbles(packed: Array) -> Array:
    return packed << 4 | packed >> 4
