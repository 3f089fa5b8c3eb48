"""Products in both directions against float64, by every way, on random and on adversarial operands."""

import jax
import numpy as np
import pytest
from gpu_cases import Way, both, error, normal, tensor
from packed_weight import DTYPES, PackedWeight, make_weight

from qlora_jax.nf4 import dequantize, nf4_matmul, use_kernels

# (in, out): a tile, SmolLM2's, ragged against 64 and 128 rows, and deep enough for a split contraction.
SHAPES = [(64, 64), (576, 192), (192, 200), (1536, 72), (128, 1031)]
ROWS = {"gpu": (1, 3, 8, 17, 33, 64, 65, 130), "cpu": (3, 130)}


def check(way: Way, weight: PackedWeight, dtype: str, rows: int, rng: np.random.Generator) -> None:
    matrix = weight.dense(dtype).astype(np.float64)  # [out, in]
    x, dy = (normal(rng, (rows, features), dtype) for features in matrix.shape[::-1])
    y, dx = both(x, dy, tensor(weight, way.layout), way.kernels)
    for name, got, expected in (
        ("y", y, x.astype(np.float64) @ matrix.T),
        ("dx", dx, dy.astype(np.float64) @ matrix),
    ):
        assert error(got, expected) <= way.bound(dtype, expected.size), f"{name}, {rows} rows"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_random_weights(way: Way, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    for dtype in way.dtypes:
        weight = make_weight(rng, *shape, dtype="float16" if dtype == "float16" else "bfloat16")
        for rows in ROWS[way.device]:
            check(way, weight, dtype, rows, rng)


def test_a_weight_of_llama(way: Way) -> None:
    """On a CPU a tenth of it."""
    rng = np.random.default_rng(7)
    weight = make_weight(rng, *((4096, 11008) if way.device == "gpu" else (384, 1088)))
    for rows in (1, 16, 64, 256, 2048) if way.device == "gpu" else (16,):
        check(way, weight, "bfloat16", rows, rng)


@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("double_quantized", [True, False])
def test_blocks_and_scales(way: Way, block_size: int, double_quantized: bool) -> None:
    rng = np.random.default_rng(block_size)
    shape = (max(128, block_size), 96 if block_size < 4096 else 16)
    weight = make_weight(rng, *shape, block_size=block_size, double_quantized=double_quantized)
    for rows in (5, 70):
        check(way, weight, "bfloat16", rows, rng)


def test_small_blocks_and_rows_that_straddle_them(device: jax.Device) -> None:
    """What the fused kernels refuse goes another way by itself."""
    rng = np.random.default_rng(5)
    for in_features, block_size in ((96, 32), (150, 64)):
        for dtype in ("bfloat16", "float32"):
            weight = make_weight(rng, in_features, 77, block_size=block_size)
            way = Way("cpu" if device.platform == "cpu" else "gpu", "auto", "rows")
            check(way, weight, dtype, 9, rng)


def test_the_way_that_was_asked_for_is_taken(way: Way) -> None:
    w = tensor(make_weight(np.random.default_rng(0), 128, 64), way.layout)
    with use_kernels(way.kernels):
        text = jax.jit(nf4_matmul).lower(np.zeros((4, 128), DTYPES["bfloat16"]), w).compile().as_text()
    if way.target is not None:
        assert f'"{way.target}"' in text
    if way.kernels == "xla":
        assert "qlora_jax_nf4" not in text


@pytest.mark.parametrize("rows", [1, 40, 129])
def test_exact_products_have_no_error_at_all(way: Way, rows: int) -> None:
    """Weights of few bits times small integers: every sum is exact in any order, so one wrong weight shows."""
    rng = np.random.default_rng(rows)
    weight = make_weight(rng, 192, 136, values="exact", double_quantized=False)
    matrix = weight.dense("float32").astype(np.float64)
    x, dy = (rng.integers(-2, 3, (rows, features)).astype(DTYPES["bfloat16"]) for features in matrix.shape[::-1])
    y, dx = both(x, dy, tensor(weight, way.layout), way.kernels)
    np.testing.assert_array_equal(y, (x.astype(np.float64) @ matrix.T).astype(np.float32).astype(y.dtype))
    np.testing.assert_array_equal(dx, (dy.astype(np.float64) @ matrix).astype(np.float32).astype(y.dtype))


def adversarial(kind: str, rng: np.random.Generator, rows: int, features: int, dtype: str) -> np.ndarray:
    x = rng.standard_normal((rows, features))
    if kind == "cancelling":
        x[:, 1::2] = -x[:, ::2]
    elif kind == "of all magnitudes":
        x *= 10.0 ** rng.integers(-15 if dtype != "float16" else -3, 16 if dtype != "float16" else 2, x.shape)
    elif kind == "one in a row":
        x *= np.arange(features) == rng.integers(0, features, (rows, 1))
    elif kind == "one row":
        x[1:] = 0
    elif kind == "equal":
        x[:] = 1
    return x.astype(DTYPES[dtype])


def extreme(weight: PackedWeight, kind: str) -> PackedWeight:
    """The same weight with its codes or scales at their ends."""
    if kind == "alternating ends":
        weight.codes[..., ::2], weight.codes[..., 1::2] = 0, 15
    elif kind == "one value a row":
        weight.codes[:] = np.arange(weight.out_features)[None, :, None] % 16
    elif kind == "zeros":
        weight.codes[:] = 7
    return weight


@pytest.mark.parametrize("codes", ["random", "alternating ends", "one value a row", "zeros"])
@pytest.mark.parametrize("kind", ["cancelling", "of all magnitudes", "one in a row", "one row", "equal"])
def test_adversarial_operands(way: Way, kind: str, codes: str) -> None:
    """Each output within its own bound: a rounding error of each term, and of the result."""
    rng = np.random.default_rng(len(kind) + len(codes))
    for dtype in way.dtypes:
        weight = extreme(make_weight(rng, 256, 72, dtype="float16" if dtype == "float16" else "bfloat16"), codes)
        matrix = weight.dense(dtype).astype(np.float64)
        x = adversarial(kind, rng, 37, 256, dtype)
        dy = adversarial(kind, rng, 37, 72, dtype)
        y, dx = both(x, dy, tensor(weight, way.layout), way.kernels)
        unit = {"float32": 2.0**-18, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
        # float16 is gradual below 2^-14.
        tiny = 2.0**-24 if dtype == "float16" else 1e-30
        for got, left, right in ((y, x, matrix.T), (dx, dy, matrix)):
            exact, size = left.astype(np.float64) @ right, np.abs(left.astype(np.float64)) @ np.abs(right)
            off = np.abs(got.astype(np.float64) - exact)
            assert (off <= unit * size + tiny).all(), f"{dtype}: {(off / (unit * size + tiny)).max()}"


def test_what_is_not_finite_stays_in_its_row(way: Way) -> None:
    rng = np.random.default_rng(8)
    weight = make_weight(rng, 192, 136)
    x, dy = normal(rng, (40, 192), "bfloat16"), normal(rng, (40, 136), "bfloat16")
    w = tensor(weight, way.layout)
    clean = both(x, dy, w, way.kernels)
    x[3, 7], x[20, 190], dy[5, 0], dy[39, 135] = np.inf, np.nan, np.nan, -np.inf
    for got, expected, rows in zip(both(x, dy, w, way.kernels), clean, ((3, 20), (5, 39)), strict=True):
        others = np.delete(np.arange(40), rows)
        np.testing.assert_array_equal(got[others], expected[others])
        assert not np.isfinite(got[list(rows)].astype(np.float32)).all(axis=1).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_equal_bit_for_bit(way: Way, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    for weight_dtype in DTYPES:
        for double_quantized in (True, False):
            weight = make_weight(rng, *shape, dtype=weight_dtype, double_quantized=double_quantized)
            with use_kernels(way.kernels if way.kernels not in ("skinny", "tile") else "auto"):
                for dtype in (None, *DTYPES) if way.device == "gpu" else (None,):
                    got = np.asarray(dequantize(tensor(weight, way.layout), dtype))
                    expected = weight.dense(dtype or weight_dtype).T
                    assert got.dtype == expected.dtype
                    np.testing.assert_array_equal(got.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))
