"""The CUDA handlers' host code on a CPU: real foreign calls, with a recorder where the GPU would be."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax._lib import _plan

for target, capsule in _plan.recording_handlers().items():
    jax.ffi.register_ffi_target(f"recorded_{target}", capsule, platform="cpu")

WEIGHT_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
LAYOUTS = {"rows": 0, "fragments": 1}
ROUTES = {"skinny": 0, "tile": 1}
# XLA reports a handler's INVALID_ARGUMENT as either, by version and by whether the call ran in the caller's thread.
REFUSED = (ValueError, jax.errors.JaxRuntimeError)
# The first bytes of a weight's operands, so that a pointer to the wrong one shows.
FIRST_BYTES = {"packed": 11, "absmax": 22, "group_scales": 33, "offsets": 44, "where": 2}


def floats_with_first_byte(byte, shape):
    return jnp.asarray(np.full(shape, byte, np.uint32).view(np.float32))


def weight_operands(in_features, out_features, *, layers=1, layout="fragments", double_quant=True, block_size=64):
    size = in_features * out_features
    tiles = math.ceil(in_features / 64) * math.ceil(out_features / 64)
    n_bytes = tiles * 2048 if layout == "fragments" else math.ceil(size / 2)
    blocks = math.ceil(size / block_size)
    absmax = (
        jnp.full((layers, blocks), FIRST_BYTES["absmax"], jnp.uint8)
        if double_quant
        else floats_with_first_byte(FIRST_BYTES["absmax"], (layers, blocks))
    )
    return {
        "packed": jnp.full((layers, n_bytes), FIRST_BYTES["packed"], jnp.uint8),
        "absmax": absmax,
        "absmax_scale": floats_with_first_byte(FIRST_BYTES["group_scales"], (layers, math.ceil(blocks / 256))),
        "absmax_offset": floats_with_first_byte(FIRST_BYTES["offsets"], (layers,)),
        "where": jnp.asarray([FIRST_BYTES["where"], 0, 0], jnp.int32),
    }


def attributes(in_features, *, layout="fragments", block_size=64, weight_dtype="bfloat16", row_blocks=None, **others):
    if row_blocks is None:
        row_blocks = in_features // block_size if in_features % block_size == 0 else 0
    numbers = {
        "row_blocks": row_blocks,
        "block_size": block_size,
        "weight_dtype": WEIGHT_DTYPES.get(weight_dtype, weight_dtype),
        "layout": LAYOUTS.get(layout, layout),
    }
    return {name: np.int64(value) for name, value in (numbers | others).items()}


def product(operation, x, outputs, weight, numbers, partials=None, out_dtype=None):
    name = {"forward": "qlora_jax_nf4_matmul", "dx": "qlora_jax_nf4_matmul_dx"}[operation]
    y = jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype or x.dtype)
    results = y if partials is None else (y, partials)
    return jax.block_until_ready(jax.ffi.ffi_call(f"recorded_{name}", results)(x, *weight.values(), **numbers))


def recorded(expected):
    """The launches since the last call, after their plain part was found equal to the plan's."""
    launches = _plan.take_record()
    assert [{k: v for k, v in launch.items() if k != "seen"} for launch in launches] == expected["launches"]
    for launch in launches:
        for (kind, *rest), seen in zip(launch["arguments"], launch["seen"], strict=True):
            if kind != "pointer":
                assert [seen] == rest
            elif rest[0] in FIRST_BYTES:
                assert seen == FIRST_BYTES[rest[0]]
    return launches


def first_byte(array):
    return np.asarray(array).reshape(-1)[:1].view(np.uint8)[0]


@pytest.fixture(autouse=True)
def empty_record():
    _plan.take_record()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize(
    ("operation", "route", "tokens", "layers", "splits"),
    [
        ("forward", "skinny", 5, 1, 1),
        ("forward", "tile", 200, 3, 2),
        ("dx", "skinny", 70, 3, 3),
        ("dx", "tile", 9, 1, 1),
    ],
)
def test_a_product_launches_its_plan(operation, route, tokens, layers, splits, dtype, weight_dtype, double_quant):
    in_features, out_features = 320, 200  # the last tile of output features is padded
    weight = weight_operands(in_features, out_features, layers=layers, double_quant=double_quant)
    reduction, outputs = (in_features, out_features) if operation == "forward" else (out_features, in_features)
    x = jnp.asarray(np.full((tokens, reduction), 55, np.uint16).view(jnp.dtype(dtype)))
    partials = jax.ShapeDtypeStruct((splits, tokens, outputs), jnp.float32) if splits > 1 else None
    numbers = attributes(in_features, weight_dtype=weight_dtype, route=ROUTES[route])
    results = product(operation, x, outputs, weight, numbers, partials)
    plan = _plan.plan(
        operation,
        route=route,
        dtype=dtype,
        weight_dtype=weight_dtype,
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        layers=layers,
        layer_groups=4 if double_quant else 0,
        row_blocks=5,
        double_quantized=double_quant,
        splits=splits,
    )
    launches = recorded(plan)
    assert launches[0]["seen"][0] == 55
    if partials is None:
        assert len(launches) == 1
        assert first_byte(results) == 1
    else:
        y, sums = results
        assert sums.nbytes == plan["partials_bytes"]
        assert (first_byte(y), first_byte(sums)) == (2, 2)  # both belong to the second launch


def test_one_part_needs_no_partial_sums_but_may_have_them():
    weight, numbers = weight_operands(128, 64), attributes(128, route=0)
    x = jnp.ones((3, 128), jnp.bfloat16)
    product("forward", x, 64, weight, numbers, jax.ShapeDtypeStruct((1, 3, 64), jnp.float32))
    (launch,) = _plan.take_record()
    assert launch["grid"] == (1, 1, 1)
    assert launch["arguments"][2] == ("pointer", "y", 0)


@pytest.mark.parametrize(("dtype", "weight_dtype"), list(itertools.product(WEIGHT_DTYPES, WEIGHT_DTYPES)))
@pytest.mark.parametrize(
    ("layout", "in_features", "out_features", "block_size", "layers"),
    [("rows", 150, 77, 64, 3), ("rows", 576, 192, 32, 1), ("fragments", 320, 200, 64, 3), ("fragments", 96, 70, 32, 1)],
)
def test_dequantize_launches_its_plan(dtype, weight_dtype, layout, in_features, out_features, block_size, layers):
    weight = weight_operands(in_features, out_features, layers=layers, layout=layout, block_size=block_size)
    numbers = attributes(in_features, layout=layout, block_size=block_size, weight_dtype=weight_dtype)
    result = jax.ShapeDtypeStruct((out_features, in_features), dtype)
    dense = jax.ffi.ffi_call("recorded_qlora_jax_nf4_dequantize", result)(*weight.values(), **numbers)
    jax.block_until_ready(dense)
    plan = _plan.plan(
        "dequantize",
        layout=layout,
        dtype=dtype,
        weight_dtype=weight_dtype,
        in_features=in_features,
        out_features=out_features,
        layers=layers,
        layer_groups=weight["absmax_scale"].shape[1],
        row_blocks=int(numbers["row_blocks"]),
        block_size=block_size,
    )
    recorded(plan)
    assert first_byte(dense) == 1


def test_a_shard_passes_the_row_blocks_of_the_whole():
    whole = {"where": jnp.asarray([2, 512, 3], jnp.int32), "absmax_scale": jnp.ones((1, 600 * 24 // 256 + 1))}
    weight = weight_operands(128, 64) | whole
    product("forward", jnp.ones((3, 128), jnp.bfloat16), 64, weight, attributes(128, row_blocks=24, route=0))
    (launch,) = _plan.take_record()
    assert launch["arguments"][10] == ("int64", 24)


def test_more_tokens_than_a_grid_holds_take_two_launches():
    first = 65535 * 64
    dy = jnp.zeros((first + 1, 1), jnp.bfloat16).at[first, 0].set(1.0)  # bits 0x3f80
    dx = product("dx", dy, 64, weight_operands(64, 1), attributes(64, route=0))
    launches = _plan.take_record()
    assert [launch["arguments"][13][1] for launch in launches] == [first, 1]
    assert [launch["seen"][0] for launch in launches] == [0, 0x80]
    dx = np.asarray(dx)
    assert (first_byte(dx[0]), first_byte(dx[first])) == (1, 2)


def test_empty_products_launch_nothing():
    numbers = attributes(128, route=0)
    assert product("forward", jnp.ones((0, 128), jnp.bfloat16), 64, weight_operands(128, 64), numbers).shape == (0, 64)
    assert product("forward", jnp.ones((3, 128), jnp.bfloat16), 0, weight_operands(128, 0), numbers).shape == (3, 0)
    y = product("forward", jnp.ones((3, 0), jnp.bfloat16), 5, weight_operands(0, 5), attributes(0, route=1))
    np.testing.assert_array_equal(y, np.zeros((3, 5)))
    dx = product("dx", jnp.ones((3, 0), jnp.bfloat16), 128, weight_operands(128, 0), numbers)
    np.testing.assert_array_equal(dx, np.zeros((3, 128)))
    assert _plan.take_record() == []


def test_a_failed_launch_is_an_error_with_kernel_and_shape():
    _plan.fail_next_launch()
    words = (
        r"nf4_matmul: x bfloat16\[3, 128\], y bfloat16\[3, 64\]: nf4_skinny_forward_bf16_t8, grid \(1, 1, 1\), "
        r"block \(\d+, 1, 1\), \d+ bytes of shared memory: a failure that was asked for"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        product("forward", jnp.ones((3, 128), jnp.bfloat16), 64, weight_operands(128, 64), attributes(128, route=0))
    assert _plan.take_record() == []


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"x": jnp.ones((3, 192), jnp.bfloat16)},
            (r"packed uint8\[1, 4096\]", r"x bfloat16\[3, 192\]", r"\[L, 6144\]"),
        ),
        ({"x": jnp.ones((3, 128), jnp.int8)}, ("float32, bfloat16 or float16", r"\[3, 128\]")),
        ({"x": jnp.ones((3, 128))}, ("16-bit activations", "3 rows", r"x float32\[3, 128\]", r"y float32\[3, 64\]")),
        ({"x": jnp.ones((3, 128), jnp.float16)}, ("range of float16", r"x float16\[3, 128\]")),
        ({"out_dtype": jnp.float16}, ("equal dtype", r"x bfloat16\[3, 128\], y float16\[3, 64\]")),
        ({"weight": {"packed": jnp.zeros((1, 4095), jnp.uint8)}}, (r"packed uint8\[1, 4095\]", r"uint8\[L, 4096\]")),
        ({"weight": {"packed": jnp.zeros(4096, jnp.uint8)}}, (r"packed must be uint8 \[L, bytes\]",)),
        ({"weight": {"absmax": jnp.zeros((1, 127), jnp.uint8)}}, (r"absmax uint8\[1, 127\]", r"\[1, 128\]")),
        ({"weight": {"absmax_scale": jnp.zeros((1, 0))}}, (r"absmax_scale float32\[1, 0\]", "block 127")),
        ({"weight": {"absmax_scale": jnp.zeros((2, 1))}}, (r"absmax_scale float32\[2, 1\]",)),
        ({"weight": {"absmax_offset": jnp.zeros(2)}}, (r"absmax_offset float32\[2\]",)),
        ({"weight": {"where": jnp.zeros(2, jnp.int32)}}, (r"where must be int32\[3\], got int32\[2\]",)),
        ({"layout": "rows"}, ("layout fragments", "in=128, out=64", r"x bfloat16\[3, 128\]")),
        ({"layout": 2}, ("layout must be 0", "got 2")),
        ({"route": 2}, ("route must be 0", "got 2", r"x bfloat16\[3, 128\]")),
        ({"block_size": 48}, ("power of two, got 48",)),
        ({"block_size": 256, "row_blocks": 0}, ("whole blocks in a row", "blocks of 256")),
        ({"row_blocks": 1}, ("128 weights do not lie in 1 blocks of 64",)),
        ({"row_blocks": -1}, ("row_blocks", "-1")),
        ({"weight_dtype": 3}, ("weight_dtype", "got 3")),
        ({"partials": f32(2, 3, 63)}, (r"partials float32\[2, 3, 63\]", r"float32\[splits, 3, 64\]")),
        ({"partials": f32(3, 64)}, (r"partials float32\[3, 64\]",)),
        ({"partials": jax.ShapeDtypeStruct((2, 3, 64), jnp.bfloat16)}, (r"partials bfloat16\[2, 3, 64\]",)),
        ({"partials": f32(3, 3, 64)}, ("2 steps cannot be split in 3", r"x bfloat16\[3, 128\]")),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(changes, words):
    changes = dict(changes)
    layout = changes.get("layout", "fragments")
    weight = weight_operands(128, 64, layout=layout if layout in LAYOUTS else "fragments") | changes.pop("weight", {})
    x = changes.pop("x", jnp.ones((3, 128), jnp.bfloat16))
    partials, out_dtype = changes.pop("partials", None), changes.pop("out_dtype", None)
    numbers = attributes(x.shape[1], **({"route": 0} | changes))
    with pytest.raises(REFUSED) as caught:
        product("forward", x, 64, weight, numbers, partials, out_dtype)
    for word in ("nf4_matmul", *words):
        assert caught.match(word)
    assert _plan.take_record() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (64, 128, 1)}, (r"dense float32\[64, 128, 1\]", "matrix")),
        ({"shape": (64, 192)}, (r"dense float32\[64, 192\]", r"packed uint8\[1, 4096\]")),
        ({"dtype": jnp.int32}, (r"dense int32\[64, 128\]",)),
        ({"block_size": 16}, (r"absmax uint8\[1, 128\]",)),
    ],
)
def test_a_dense_matrix_that_does_not_fit_is_refused(changes, words):
    result = jax.ShapeDtypeStruct(changes.get("shape", (64, 128)), changes.get("dtype", jnp.float32))
    numbers = attributes(128, layout="rows", block_size=changes.get("block_size", 64), row_blocks=0)
    with pytest.raises(REFUSED) as caught:
        jax.block_until_ready(
            jax.ffi.ffi_call("recorded_qlora_jax_nf4_dequantize", result)(
                *weight_operands(128, 64, layout="rows").values(), **numbers
            )
        )
    for word in ("nf4_dequantize", *words):
        assert caught.match(word)
    assert _plan.take_record() == []


def test_calls_inside_a_jitted_scan_are_all_recorded():
    weight, numbers = weight_operands(128, 128, layers=2), attributes(128, route=0)

    @jax.jit
    def run(x):
        call = jax.ffi.ffi_call("recorded_qlora_jax_nf4_matmul", jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.lax.scan(lambda h, _: (call(h, *weight.values(), **numbers), None), x, length=4)[0]

    jax.block_until_ready(run(jnp.ones((3, 128), jnp.bfloat16)))
    launches = _plan.take_record()
    assert [launch["kernel"] for launch in launches] == ["nf4_skinny_forward_bf16_t8"] * 4
