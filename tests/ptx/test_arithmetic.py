"""The scalar functions against exact rational arithmetic and plain Python integers."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from ptx_interpreter import arithmetic

RNG = np.random.default_rng(0)
BF16 = np.dtype(ml_dtypes.bfloat16)


def nearest(exact: Fraction, dtype) -> float:
    """The value of `dtype` nearest to `exact`, ties to even: the best of the neighbours of a first guess."""
    if not exact:
        return 0.0
    guess = np.array(float(exact)).astype(dtype)
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    candidates = [guess, *(np.array(int(guess.view(bits)) + step, bits).view(dtype) for step in (-1, 1))]
    candidates = [candidate for candidate in candidates if np.isfinite(candidate.astype(np.float64))]

    def distance(candidate):
        return abs(Fraction(float(candidate)) - exact), int(candidate.view(bits)) & 1

    return float(min(candidates, key=distance))


def numbers(count, low=-20, high=20, dtype=np.float32):
    values = RNG.standard_normal(count) * 2.0 ** RNG.integers(low, high, count)
    return values.astype(dtype)


def near_ties(count, dtype):
    """a, b and c such that a * b + c lies close to the middle between two values of `dtype`."""
    bits = np.finfo(dtype).nmant
    a = (1 + RNG.integers(0, 1 << bits, count) / (1 << bits)).astype(dtype)
    b = np.full(count, 1 + 2.0**-bits).astype(dtype)
    return a, b, (numbers(count, -bits - 30, -bits, np.float64)).astype(dtype)


@pytest.mark.parametrize("ties", [False, True])
def test_fma32_rounds_once(ties):
    a, b, c = near_ties(2000, np.float32) if ties else (numbers(2000), numbers(2000), numbers(2000))
    got = arithmetic.fma32(a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got, np.array([nearest(value, np.float32) for value in exact], np.float32))


def test_fma32_where_two_roundings_are_wrong():
    """2^-60 decides a tie of float32 that float64 can no longer see."""
    a, b = np.float32([1 + 2.0**-12]), np.float32([1 + 2.0**-12])
    assert float(a[0]) * float(b[0]) == 1 + 2.0**-11 + 2.0**-24  # a tie between two float32
    above = arithmetic.fma32(a, b, np.float32([2.0**-60]))
    below = arithmetic.fma32(a, b, np.float32([-(2.0**-60)]))
    assert above[0] == np.float32(1 + 2.0**-11 + 2.0**-23)
    assert below[0] == np.float32(1 + 2.0**-11)


def test_fma64_rounds_once():
    a, b, c = (numbers(300, dtype=np.float64) for _ in range(3))
    got = arithmetic.fma64(a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got, [float(value) for value in exact])
    np.testing.assert_array_equal(arithmetic.fma64(np.array([np.inf]), np.array([1.0]), np.array([1.0])), [np.inf])


def test_f32_to_bf16_is_round_to_nearest_even():
    bits = RNG.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    bits[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000]  # two ties, overflow, a subnormal tie
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        got, wanted = arithmetic.f32_to_bf16(values), values.astype(BF16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], wanted.view(np.uint16)[~nan])
    assert (got[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(arithmetic.bf16_to_f32(got[~nan]), wanted.astype(np.float32)[~nan])


def test_f64_to_bf16_rounds_once():
    """1 + 2^-8 + 2^-40 is above the tie; by way of a nearest float32 it would become the tie and go down."""
    values = np.concatenate(
        [[1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, -(1 + 2.0**-8 + 2.0**-40)], numbers(2000)]
    )
    got = arithmetic.bf16_to_f32(arithmetic.f64_to_bf16(values))
    wanted = [nearest(Fraction(float(value)), BF16) for value in values]
    np.testing.assert_array_equal(got, np.array(wanted, np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_half_precision_rounds_once(kind, name):
    dtype = np.dtype(np.float16) if kind.startswith("f16") else BF16
    a, b, c = (numbers(2000, -4, 4).astype(dtype) for _ in range(3))
    function = {"add": np.add, "mul": np.multiply, "fma": arithmetic.half_fma}[name]
    operands = (a, b, c)[: 3 if name == "fma" else 2]
    word = np.uint32 if kind.endswith("x2") else np.uint16
    got = arithmetic.half_op(kind, function, *(x.view(word) for x in operands)).view(dtype)
    exact = []
    for lane in zip(a, b, c, strict=True):
        x, y, z = (Fraction(float(value)) for value in lane)
        exact.append({"add": x + y, "mul": x * y, "fma": x * y + z}[name])
    np.testing.assert_array_equal(got.astype(np.float64), [nearest(value, dtype) for value in exact])


def test_half_fma_relu_and_far_addend():
    one, tiny = (np.array([x], np.float32).astype(BF16).view(np.uint16) for x in (1 + 2.0**-7, 2.0**-60))
    half = np.array([2.0**-1 + 2.0**-8], np.float32).astype(BF16).view(np.uint16)
    # 1.0078125 * 0.50390625 = 0.5 + 2^-7 + 2^-15 - ..., plus something far below: one rounding of the exact sum.
    got = arithmetic.half_op("bf16", arithmetic.half_fma, one, half, tiny)
    a, b, c = (float(x.view(BF16)[0]) for x in (one, half, tiny))
    assert float(got.view(BF16)[0]) == nearest(Fraction(a) * Fraction(b) + Fraction(c), BF16)
    negative = np.array([-2.0], np.float32).astype(BF16).view(np.uint16)
    assert arithmetic.half_op("bf16", arithmetic.half_fma_relu, one, negative, tiny)[0] == 0


def test_prmt_and_lop3_bit_by_bit():
    a, b, c = (RNG.integers(0, 1 << 32, 500, dtype=np.uint32) for _ in range(3))

    def permuted(x, y, s):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        out = []
        for i in range(4):
            select = s >> 4 * i & 15
            byte = source[select & 7]
            out.append((255 if byte & 0x80 else 0) if select & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    wanted = [permuted(*lane) for lane in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    np.testing.assert_array_equal(arithmetic.prmt(a, b, c), wanted)
    np.testing.assert_array_equal(arithmetic.prmt(a, b, np.uint32(0x7632)), (b & 0xFFFF0000) | (a >> 16))
    for table in (0x6A, 0xD8, 0xCA, 0x1E, 0x00, 0xFF):
        bits = [(a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32)]
        wanted = sum(((table >> bit.astype(np.int64)) & 1) << i for i, bit in enumerate(bits))
        np.testing.assert_array_equal(arithmetic.lop3(a, b, c, table), wanted)


def test_shifts_clamp():
    a = RNG.integers(0, 1 << 32, 64, dtype=np.uint32)
    amount = np.arange(64, dtype=np.uint32)
    whole, signed = a.astype(object), a.view(np.int32).astype(object)
    np.testing.assert_array_equal(arithmetic.shl(a, amount, 32), [(x << n) & 0xFFFFFFFF for n, x in enumerate(whole)])
    np.testing.assert_array_equal(arithmetic.shr(a, amount, 32), [x >> n for n, x in enumerate(whole)])
    np.testing.assert_array_equal(arithmetic.shr(a.view(np.int32), amount, 32), [x >> n for n, x in enumerate(signed)])
    high = a[::-1].copy()
    joined = [int(h) << 32 | int(low) for h, low in zip(high, a, strict=True)]
    for wrap in (False, True):
        shift = [n & 31 if wrap else min(n, 32) for n in range(64)]
        left = [(value << n >> 32) & 0xFFFFFFFF for value, n in zip(joined, shift, strict=True)]
        right = [(value >> n) & 0xFFFFFFFF for value, n in zip(joined, shift, strict=True)]
        np.testing.assert_array_equal(arithmetic.shf(a, high, amount, True, wrap), left)
        np.testing.assert_array_equal(arithmetic.shf(a, high, amount, False, wrap), right)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.uint64, np.int64])
def test_bit_fields(dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    width = unsigned.itemsize * 8
    raw = RNG.integers(0, 1 << 63, 400, dtype=np.uint64).astype(unsigned)
    raw |= (RNG.integers(0, 2, 400).astype(unsigned)) << unsigned.type(width - 1)
    position, length = (RNG.integers(0, width, 400).astype(np.uint32) for _ in range(2))
    got = arithmetic.bfe(raw.view(dtype), position, length, np.dtype(dtype).kind == "i")
    wanted = []
    for value, start, count in zip(raw.tolist(), position.tolist(), length.tolist(), strict=True):
        bits = [value >> (start + i) & 1 if start + i < width else None for i in range(count)]
        sign = value >> min(start + count - 1, width - 1) & 1 if np.dtype(dtype).kind == "i" and count else 0
        bits = [sign if bit is None else bit for bit in bits] + [sign] * (width - count)
        wanted.append(sum(bit << i for i, bit in enumerate(bits)))
    np.testing.assert_array_equal(got.view(unsigned), np.array(wanted, unsigned))


def test_bfi():
    a, b = (RNG.integers(0, 1 << 32, 400, dtype=np.uint32) for _ in range(2))
    position, length = (RNG.integers(0, 40, 400).astype(np.uint32) for _ in range(2))
    wanted = []
    for x, y, start, count in zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True):
        mask = (((1 << min(count, 32)) - 1) << min(start, 32)) & 0xFFFFFFFF
        wanted.append((y & ~mask) | (x << min(start, 32) & mask))
    np.testing.assert_array_equal(arithmetic.bfi(a, b, position, length), wanted)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_integer_division_and_high_products(dtype):
    info = np.iinfo(dtype)
    a, b = (RNG.integers(info.min, info.max, 500, dtype=dtype, endpoint=True) for _ in range(2))
    b = np.where(RNG.random(500) < 0.5, b >> dtype(info.bits // 2), b)
    b = np.where(b == 0, dtype(1), b)
    a[:3], b[:3] = [info.min, info.max, 7], [3, 2, info.max]
    wanted = [abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(arithmetic.divide(a, b), np.array(wanted, dtype))
    wanted = [x * y >> info.bits for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(arithmetic.mul_high(a, b), np.array(wanted, dtype))


def test_float_to_int_rounds_and_saturates():
    values = np.array([2.5, -2.5, 3.7, -3.7, 3e10, -3e10, np.nan, np.inf, -np.inf, 2147483520.0])
    rounded = {"rni": [2, -2, 4, -4], "rzi": [2, -2, 3, -3], "rmi": [2, -3, 3, -4], "rpi": [3, -2, 4, -3]}
    limits = [2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 2147483520]
    for mode, first in rounded.items():
        np.testing.assert_array_equal(arithmetic.float_to_int(values, np.int32, mode), first + limits)
    np.testing.assert_array_equal(arithmetic.float_to_int(values[[3, 4, 6]], np.uint32, "rzi"), [0, 2**32 - 1, 0])
    big = np.array([1.5 * 2.0**63, 2.0**64, -1.0])
    np.testing.assert_array_equal(
        arithmetic.float_to_int(big, np.uint64, "rzi"), np.array([3 << 62, 2**64 - 1, 0], np.uint64)
    )
    np.testing.assert_array_equal(arithmetic.saturate_int(np.array([300, -5, 7], np.int32), np.uint8), [255, 0, 7])
    np.testing.assert_array_equal(arithmetic.saturate_int(np.array([2**64 - 1], np.uint64), np.int32), [2**31 - 1])


def test_counting_and_reversing_bits():
    a = np.array([0, 1, 0x80000000, 0x00F0, 0xFFFFFFFF], np.uint32)
    np.testing.assert_array_equal(arithmetic.clz(a), [32, 31, 0, 24, 0])
    np.testing.assert_array_equal(arithmetic.brev(a), [0, 0x80000000, 1, 0x0F000000, 0xFFFFFFFF])
    np.testing.assert_array_equal(arithmetic.clz(a.astype(np.uint64)), [64, 63, 32, 56, 32])
    np.testing.assert_array_equal(arithmetic.clz(a.view(np.int32)), [32, 31, 0, 24, 0])
