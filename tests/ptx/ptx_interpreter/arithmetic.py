"""Scalar semantics: every function works on whole vectors of lanes; generated code calls them by name."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .ptx_types import UNSIGNED


def bf16_to_f32(bits) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values) -> np.ndarray:
    """float32 -> bfloat16 bits, round to nearest even; NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FFF), rounded) if np.any(nan) else rounded


def f64_to_bf16(values) -> np.ndarray:
    """float64 -> bfloat16 bits with one rounding: by way of a float32 that is rounded to odd."""
    values = np.asarray(values)
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    if inexact.any():
        away = (np.abs(near) > np.abs(values)).astype(np.uint32)
        bits = np.where(inexact, (bits - away) | np.uint32(1), bits)
    return f32_to_bf16(bits.view(np.float32))


def sum_to_odd(a, b) -> np.ndarray:
    """a + b in float64, rounded to odd: a second rounding to a shorter format is then the only one that counts."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    bits = total.view(np.int64)
    move = (error != 0) & np.isfinite(total) & np.isfinite(error) & ((bits & 1) == 0)
    if not move.any():
        return total
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(move, bits + step, bits).view(np.float64)


def fma32(a, b, c) -> np.ndarray:
    return sum_to_odd(np.asarray(a).astype(np.float64) * b, c).astype(np.float32)


def fma64(a, b, c) -> np.ndarray:
    def one(x: float, y: float, z: float) -> float:
        if not np.isfinite([x, y, z]).all():
            return x * y + z
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            return float(exact) if exact else x * y + z
        except OverflowError:
            return float("inf") if exact > 0 else float("-inf")

    a, b, c = np.broadcast_arrays(a, b, c)
    return np.array([one(*lane) for lane in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float64)


def half_op(kind: str, function: Callable, *operands) -> np.ndarray:
    """16-bit float arithmetic with one rounding, on raw bits; packed types half by half."""
    packed, bf16 = kind.endswith("x2"), kind.startswith("bf")
    operands = np.broadcast_arrays(*operands)
    values = []
    for bits in operands:
        bits = np.ascontiguousarray(bits)
        bits = bits.reshape(-1).view(np.uint16) if packed else bits
        values.append((bf16_to_f32(bits) if bf16 else bits.view(np.float16)).astype(np.float64))
    result = function(*values)
    bits = f64_to_bf16(result) if bf16 else result.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32) if packed else bits


def half_fma(a, b, c) -> np.ndarray:
    return sum_to_odd(a * b, c)


def half_fma_relu(a, b, c) -> np.ndarray:
    return np.maximum(sum_to_odd(a * b, c), 0.0)


def lop3(a, b, c, table: int) -> np.ndarray:
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def prmt(a, b, selectors) -> np.ndarray:
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    source = np.stack([a, b], -1).astype(np.uint32).view(np.uint8)
    select = (selectors[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(source, (select & 7).astype(np.int64), -1)
    if (select & 8).any():  # the selector's top bit replicates the byte's sign
        chosen = np.where(select & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)
    return np.ascontiguousarray(chosen).view(np.uint32)[..., 0]


def shl(a, amount, width: int) -> np.ndarray:
    a, amount = np.broadcast_arrays(a, amount)
    shifted = a << (amount & (width - 1)).astype(a.dtype)
    return np.where(amount < width, shifted, a.dtype.type(0))


def shr(a, amount, width: int) -> np.ndarray:
    a, amount = np.broadcast_arrays(a, amount)
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < width, shifted, a.dtype.type(0))


def shf(low, high, amount, left: bool, wrap: bool) -> np.ndarray:
    """Funnel shift of the 64 bits {high, low}: the upper half after a left, the lower after a right shift."""
    amount = np.asarray(amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
    joined = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
    return ((joined << amount >> np.uint64(32)) if left else (joined >> amount)).astype(np.uint32)


def bfe(a, position, length, signed: bool) -> np.ndarray:
    a, position, length = np.broadcast_arrays(a, position, length)
    width = a.dtype.itemsize * 8
    result = []
    for value, start, count in zip(a.tolist(), (position & 255).tolist(), (length & 255).tolist(), strict=True):
        value &= (1 << width) - 1
        field = value >> start & ((1 << count) - 1)
        if signed and count and value >> min(start + count - 1, width - 1) & 1:
            field |= -1 << min(count, max(width - start, 0))
        result.append(field & ((1 << width) - 1))
    return np.array(result, UNSIGNED[width // 8]).view(a.dtype)


def bfi(a, b, position, length) -> np.ndarray:
    """Puts the low `length` bits of a into b at `position` (32 bits)."""
    position = np.minimum(np.asarray(position) & 255, 32).astype(np.uint64)
    length = np.minimum(np.asarray(length) & 255, 32).astype(np.uint64)
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    merged = (np.asarray(b).astype(np.uint64) & ~mask) | ((np.asarray(a).astype(np.uint64) << position) & mask)
    return merged.astype(np.uint32)


def divide(a, b) -> np.ndarray:
    """Integer division towards zero. What a division by zero gives is undefined in PTX."""
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind == "u":
        return a // np.maximum(b, b.dtype.type(1))
    negative = (a < 0) != (b < 0)
    unsigned = UNSIGNED[a.dtype.itemsize]
    quotient = np.abs(a).view(unsigned) // np.maximum(np.abs(b).view(unsigned), unsigned(1))
    quotient = quotient.view(a.dtype)
    return np.where(negative, -quotient, quotient)


def float_to_int(values, dtype, mode: str) -> np.ndarray:
    """Rounds by `mode` (rzi, rni, rmi, rpi) and saturates; NaN gives 0."""
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    rounded = rounding(np.asarray(values).astype(np.float64))
    info = np.iinfo(dtype)
    rounded = np.where(np.isnan(rounded), 0.0, rounded)
    high, low = rounded >= float(info.max), rounded <= float(info.min)
    inside = np.where(high | low, 0.0, rounded)
    whole = inside.astype(np.uint64 if info.min == 0 else np.int64).astype(dtype)
    return np.where(high, dtype(info.max), np.where(low, dtype(info.min), whole))


def saturate_int(values, dtype) -> np.ndarray:
    info = np.iinfo(dtype)
    values = np.asarray(values)
    if values.dtype == np.uint64:
        return np.minimum(values, np.uint64(info.max)).astype(dtype)
    values = values.astype(np.int64)
    return np.clip(values, info.min, min(info.max, np.iinfo(np.int64).max)).astype(dtype)


def mul_high(a, b) -> np.ndarray:
    """The upper half of the double-width product."""
    a, b = np.broadcast_arrays(a, b)
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(width)).astype(a.dtype)
    products = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array([product & ((1 << 64) - 1) for product in products], np.uint64).view(a.dtype)


def clz(a) -> np.ndarray:
    width = a.dtype.itemsize * 8
    return np.array([width - (value & ((1 << width) - 1)).bit_length() for value in a.tolist()], np.uint32)


def brev(a) -> np.ndarray:
    width = a.dtype.itemsize * 8
    mask = (1 << width) - 1
    return np.array([int(f"{value & mask:0{width}b}"[::-1], 2) for value in a.tolist()], UNSIGNED[width // 8])
