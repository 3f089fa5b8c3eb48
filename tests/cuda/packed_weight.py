"""NumPy's model of a packed weight: codes, scales, both byte orders, layers and shards, and the matrix it stands for.

Written from the description of the format, not from the kernels: the layout "fragments" is filled lane by lane, and a
shard is cut from a whole tensor whose scales were decoded before.
"""

import dataclasses

import ml_dtypes
import numpy as np

from qlora_jax.nf4.codebook import DYNAMIC_MAP, NF4_CODE, SCALE_GROUP

TILE = 64
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def _tile_places() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the low nibble of every byte of a 64x64 tile in the layout "fragments"."""
    rows, columns = np.zeros(2048, np.int64), np.zeros(2048, np.int64)
    for strip in range(4):
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            chunk = lane ^ (((lane >> 3) & 3) << 1)
            for word in range(4):
                for byte in range(4):
                    place = strip * 512 + chunk * 16 + word * 4 + byte
                    rows[place] = 16 * strip + g + 8 * (byte & 1)
                    columns[place] = 16 * word + 2 * t + 8 * (byte >> 1)
    return rows, columns


TILE_ROWS, TILE_COLUMNS = _tile_places()


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Layers of a weight, or of one shard of it, as the kernels are given them.

    codes: uint8 [layers, out, in]. scales: float32 [layers, out, in], decoded, one for each weight. absmax: uint8
    (codes) or float32 (scales) [layers, blocks]. group_scales: float32 [layers, groups] and offsets: float32 [layers],
    or None where absmax holds scales. row_blocks: blocks in a row of the whole tensor; 0 where blocks straddle rows.
    where: layer (any integer; kernels clamp it), first row, first block in the row.
    """

    codes: np.ndarray
    scales: np.ndarray
    absmax: np.ndarray
    group_scales: np.ndarray | None
    offsets: np.ndarray | None
    block_size: int
    row_blocks: int
    where: tuple[int, int, int]
    dtype: str = "bfloat16"

    @property
    def layers(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def in_features(self) -> int:
        return self.codes.shape[2]

    @property
    def double_quantized(self) -> bool:
        return self.group_scales is not None

    @property
    def layer_groups(self) -> int:
        return 0 if self.group_scales is None else self.group_scales.shape[1]

    def dense(self, dtype: str) -> np.ndarray:
        """[out, in] of the layer that `where` names: `float32 code * float32 scale` in the weight's dtype."""
        layer = min(max(self.where[0], 0), self.layers - 1)
        with np.errstate(all="ignore"):
            exact = NF4_CODE[self.codes[layer]] * self.scales[layer]
            return exact.astype(DTYPES[self.dtype]).astype(DTYPES[dtype])

    def packed(self, layout: str) -> np.ndarray:
        """uint8 [layers, bytes]."""
        return pack_rows(self.codes) if layout == "rows" else pack_fragments(self.codes)

    def only_layer(self, layer: int) -> "PackedWeight":
        """That layer, unstacked."""
        pick = slice(layer, layer + 1)
        cut = {"codes": self.codes[pick], "scales": self.scales[pick], "absmax": self.absmax[pick]}
        if self.group_scales is not None and self.offsets is not None:
            cut |= {"group_scales": self.group_scales[pick], "offsets": self.offsets[pick]}
        return dataclasses.replace(self, **cut, where=(0, *self.where[1:]))


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """bitsandbytes' order: two codes a byte, the first in the high nibble; a layer has whole bytes."""
    flat = codes.reshape(codes.shape[0], -1)
    flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))
    return flat[:, ::2] << 4 | flat[:, 1::2]


def pack_fragments(codes: np.ndarray, padding: int = 7) -> np.ndarray:
    """64x64 tiles [ceil(out / 64), ceil(in / 64)] of 2048 bytes."""
    layers, out_features, in_features = codes.shape
    tiles = -(-out_features // TILE), -(-in_features // TILE)
    padded = np.full((layers, tiles[0] * TILE, tiles[1] * TILE), padding, np.uint8)
    padded[:, :out_features, :in_features] = codes
    split = padded.reshape(layers, tiles[0], TILE, tiles[1], TILE).swapaxes(2, 3)
    low, high = split[..., TILE_ROWS, TILE_COLUMNS], split[..., TILE_ROWS, TILE_COLUMNS + 1]
    return (high << 4 | low).reshape(layers, -1)


def make_weight(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    *,
    block_size: int = 64,
    layers: int = 1,
    layer: int = 0,
    double_quantized: bool = True,
    dtype: str = "bfloat16",
    shard: tuple[slice, slice] | None = None,
    values: str = "normal",
) -> PackedWeight:
    """A random weight.

    Args:
      rng: where it comes from.
      in_features: of the whole tensor. Blocks straddle rows where it is no multiple of block_size.
      out_features: of the whole tensor.
      block_size: weights that share a scale.
      layers: how many are stacked.
      layer: the one that is asked for.
      double_quantized: whether scales are stored as 8-bit codes.
      dtype: the weight's own.
      shard: rows, and blocks of each row, that are kept.
      values: "normal", as trained weights have them; or "exact": -1, 0 and 1 times scales of eight bits, so that
        products with small integers have no rounding error in any order of their sums, and one wrong weight shows.
    """
    choices = np.array([0, 7, 15] if values == "exact" else range(16), np.uint8)
    codes = rng.choice(choices, (layers, out_features, in_features))
    size = out_features * in_features
    blocks = -(-size // block_size)
    group_scales = offsets = None
    if double_quantized:
        absmax, group_scales, offsets = _quantized_scales(rng, layers, blocks, values)
        group = np.arange(blocks) // SCALE_GROUP
        block_scales = DYNAMIC_MAP[absmax] * group_scales[:, group] + offsets[:, None]
    elif values == "exact":
        absmax = block_scales = (rng.integers(1, 256, (layers, blocks)) / 256).astype(np.float32)
    else:
        absmax = block_scales = rng.uniform(0.01, 0.09, (layers, blocks)).astype(np.float32)
    assert block_scales.dtype == np.float32
    scales = np.repeat(block_scales, block_size, 1)[:, :size].reshape(codes.shape)
    row_blocks = in_features // block_size if in_features % block_size == 0 else 0
    if shard is not None:
        rows, columns = shard
        weights = slice(columns.start * block_size, columns.stop * block_size)
        codes, scales = codes[:, rows, weights], scales[:, rows, weights]
        absmax = absmax.reshape(layers, out_features, row_blocks)[:, rows, columns].reshape(layers, -1)
    where = (layer, shard[0].start, shard[1].start) if shard else (layer, 0, 0)
    return PackedWeight(codes, scales, absmax, group_scales, offsets, block_size, row_blocks, where, dtype)


def _quantized_scales(
    rng: np.random.Generator, layers: int, blocks: int, values: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of block scales, second-level scales (neighbours differ) and offsets."""
    groups = -(-blocks // SCALE_GROUP)
    if values == "exact":
        few_bits = np.flatnonzero(np.isin(np.abs(DYNAMIC_MAP) * 256, [13, 31, 49, 67])).astype(np.uint8)
        codes = rng.choice(few_bits, (layers, blocks))
        group_scales = 1 + (np.arange(groups) + np.arange(layers)[:, None]) % 3
        offsets = (1 + np.arange(layers)) / 256
    else:
        codes = rng.integers(0, 256, (layers, blocks)).astype(np.uint8)
        group_scales = rng.uniform(0.01, 0.04, (layers, groups))
        offsets = rng.uniform(0.03, 0.06, layers)
    return codes, group_scales.astype(np.float32), offsets.astype(np.float32)
