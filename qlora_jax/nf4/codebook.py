"""The tables of the 4-bit types and of double quantization.

NF4, FP4 and the 8-bit map are as bitsandbytes fixes them; int4, e2m1 and e3m0 are for comparing datatypes.

The values are data, not formulas: regenerating them with another library's quantile function or in float64 moves
some by one ulp, and then packed bytes differ.
"""

import dataclasses
import difflib

import numpy as np

# bitsandbytes' NF4 table, the one printed in QLoRA's appendix E: quantiles of N(0, 1) scaled to [-1, 1], zero at 7.
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# A value takes code i when i thresholds lie strictly below it: a tie takes the lower code. These float32 midpoints
# are bit for bit the constants of bitsandbytes' decision tree.
NF4_THRESHOLDS = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """A 4-bit type: what each code stands for, and which code a weight takes once it is divided by its block's scale.

    Attributes:
      values: float32 `[16]`, by code.
      thresholds: float32, ascending: i of them strictly below x make x the i-th value, so that a tie takes the lower.
      by_magnitude: None: x is compared as it is, and i is the code. Else uint8: |x| is compared, the code is
        `by_magnitude[i]`, and where x < 0 bit 3 is set as a sign (also of what rounds to zero).
    """

    values: np.ndarray
    thresholds: np.ndarray
    by_magnitude: np.ndarray | None = None


def _signed(magnitudes: list[float], thresholds: np.ndarray | None = None, order: np.ndarray | None = None) -> Codebook:
    """A type of sign and magnitude. `magnitudes` by code; `order`: their codes, ascending by value."""
    positive = np.array(magnitudes, np.float32)
    order = np.arange(8, dtype=np.uint8) if order is None else order
    ascending = positive[order]
    if thresholds is None:
        thresholds = (ascending[:-1] + ascending[1:]) / np.float32(2)
    return Codebook(np.concatenate([positive, -positive]), thresholds, order)


# bitsandbytes' FP4, which is not OCP's E2M1: {0, 1/16, 8, 12, 4, 6, 2, 3} / 12 by code. The thresholds are the literals
# of its CUDA kernel (dQuantizeFP4), up to 14 ulp from the midpoints that its CPU path takes.
FP4 = _signed(
    [0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25],
    np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32),
    np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8),
)
# Symmetric integers with offset 8, as llama.cpp's Q4_0 stores them: code c is (c - 8) / 7. Nothing takes code 0.
_INT4_VALUES = (np.arange(16, dtype=np.float32) - np.float32(8)) / np.float32(7)
INT4 = Codebook(_INT4_VALUES, (_INT4_VALUES[:-1] + _INT4_VALUES[1:]) / np.float32(2))
# OCP Microscaling Formats 1.0, section 5.3.3 (FP4 E2M1), bits as there; scaled so that the largest value is 1.
E2M1 = _signed([value / 6 for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
# Sign and three bits of exponent (QLoRA, arXiv 2305.14314, table 2, compares with it): 0, then powers of two up to 1.
E3M0 = _signed([0.0, *(2.0**exponent for exponent in range(-6, 1))])

CODEBOOKS = {"nf4": Codebook(NF4_CODE, NF4_THRESHOLDS), "fp4": FP4, "int4": INT4, "e2m1": E2M1, "e3m0": E3M0}
# The compiled kernels hold one table.
COMPILED_TYPES = ("nf4",)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Number of block scales that share one second-level scale (bitsandbytes refuses any other).
SCALE_GROUP = 256

# Positive entries 128..254 of bitsandbytes' signed 8-bit dynamic map, as big-endian float32 bits.
_DYNAMIC_MAP_POSITIVES = bytes.fromhex(
    "3513a3b7365a1a94370205ff37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2833a016f013a1eecc1"
    "3a3c6a803a59e83e3a7765ff3aa7ef9d3af1a9fc3b1db22d3b428f5c3b676c8a3b8624dd3b9893743bab020d3bbd70a4"
    "3bcfdf3b3be24dd33bf4bc6a3c0395813c0ccccd3c1604183c1f3b643c3ae1483c68f5c33c8b851f3ca28f5d3cb9999a"
    "3cd0a3d73ce7ae153cfeb8523d0ae1483d1666673d21eb853d2d70a33d38f5c33d447ae13d5000003d5b851f3d670a3d"
    "3d728f5d3d7e147b3d84cccd3d8a8f5d3d9051eb3d96147b3d9bd70a3da1999a3da75c2a3dad1eb83db2e1483db8a3d7"
    "3dbe66673dc428f73dc9eb853ddb33343df800003e0a66663e18cccd3e2733333e35999a3e4400003e5266663e60cccd"
    "3e6f33333e7d99993e8600003e8d33343e9466663e9b999a3ea2cccc3eaa00003eb133333eb866663ebf999a3ec6cccc"
    "3ece00003ed533333edc66663ee3999a3eeacccc3ef200003ef933323f0033333f03cccc3f0766663f0b00003f0e999a"
    "3f1233343f15cccd3f1966663f1d00003f20999a3f2433343f27cccd3f2b66663f2f00003f32999a3f3633343f39cccd"
    "3f3d66663f4100003f44999a3f4833333f4bcccd3f4f66663f5300003f56999a3f5a33333f5dcccd3f6166663f650000"
    "3f68999a3f6c33333f6fcccd3f7366663f7700003f7a999a3f7e3333"
)


def _signed_dynamic_map() -> np.ndarray:
    positives = np.frombuffer(_DYNAMIC_MAP_POSITIVES, ">f4").astype(np.float32)
    return np.concatenate([-positives[::-1], [0.0], positives, [1.0]]).astype(np.float32)


# The 256 values of a double-quantized scale, ascending; index 127 is 0.
DYNAMIC_MAP = _signed_dynamic_map()
DYNAMIC_MAP_MIDPOINTS = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) * np.float32(0.5)


def check_quant_type(quant_type: str) -> str:
    """The name itself.

    Raises:
      ValueError: it is not a 4-bit type's; the nearest one is named.
    """
    if quant_type not in CODEBOOKS:
        close = difflib.get_close_matches(str(quant_type).lower(), CODEBOOKS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"quant_type must be one of {', '.join(CODEBOOKS)}, got {quant_type!r}{hint}")
    return quant_type
