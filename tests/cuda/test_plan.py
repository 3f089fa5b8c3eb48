"""Launch plans of the CUDA kernels: what is launched covers the problem exactly, and stays within its buffers."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_jax._lib import _plan

SHAPES = {shape["tokens"]: shape for shape in _plan.product_shapes()}
SIXTEEN_BITS = ("bfloat16", "float16")
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

features = st.one_of(st.integers(1, 300), st.sampled_from([576, 1536, 4096, 11008, 28672]), st.integers(1, 2**22))
rows = st.one_of(st.integers(1, 200), st.integers(1, 2**24))


def buffer_bytes(problem, plan):
    tokens, ins, outs = problem["tokens"], problem["in_features"], problem["out_features"]
    contraction, outputs = (ins, outs) if problem["operation"] == "forward" else (outs, ins)
    return {"x": tokens * contraction * 2, "y": tokens * outputs * 2, "partials": plan["partials_bytes"]}


@st.composite
def products(draw):
    problem = {
        "operation": draw(st.sampled_from(["forward", "dx"])),
        "route": draw(st.sampled_from(["skinny", "tile"])),
        "dtype": draw(st.sampled_from(SIXTEEN_BITS)),
        "tokens": draw(rows),
        "in_features": draw(features),
        "out_features": draw(features),
    }
    problem["weight_dtype"] = problem["dtype"]
    multiprocessors = draw(st.integers(1, 200))
    problem["splits"] = _plan.splits(
        problem["operation"],
        multiprocessors=multiprocessors,
        **{key: problem[key] for key in ("route", "tokens", "in_features", "out_features")},
    )
    return problem, multiprocessors


@settings(deadline=None)
@given(products())
def test_a_product_covers_every_output_once_and_all_of_its_contraction(drawn):
    problem, _ = drawn
    plan = _plan.plan(**problem)
    assert plan == _plan.plan(**problem)
    forward = problem["operation"] == "forward"
    outputs = problem["out_features" if forward else "in_features"]
    contraction = problem["in_features" if forward else "out_features"]
    splits, tokens = problem["splits"], problem["tokens"]
    products = plan["launches"][: -1 if splits > 1 else None]

    first = 0
    for launch in products:
        tile = SHAPES[int(launch["kernel"].rsplit("_t", 1)[1])]
        assert launch["kernel"] == (
            f"nf4_{problem['route']}_{problem['operation']}_{SHORT[problem['dtype']]}_t{tile['tokens']}"
        )
        assert launch["block"] == (tile["threads"], 1, 1)
        assert launch["shared_bytes"] == tile["shared_bytes"]
        launch_tokens, ins, outs, launch_splits = (value for _, value in launch["arguments"][-4:])
        assert (ins, outs, launch_splits) == (problem["in_features"], problem["out_features"], splits)
        # Blocks that overhang an edge are at its end, and each holds something.
        for blocks, size, extent in zip(
            launch["grid"], (tile["rows"], None, tile["tokens"]), (outputs, None, launch_tokens), strict=True
        ):
            if size is not None:
                assert (blocks - 1) * size < extent <= blocks * size
        assert launch["grid"][1] == splits
        x, y, partials = launch["arguments"][:3]
        assert x == ("pointer", "x", first * contraction * 2)
        assert y == ("pointer", "y", first * outputs * 2)
        assert partials == (("pointer", "partials", 0) if splits > 1 else y)
        first += launch_tokens
    assert first == tokens
    assert (len(products) == 1) == (tokens <= 65535 * tile["tokens"])

    steps = -(-contraction // 64)
    bounds = [steps * part // splits for part in range(splits + 1)]
    assert bounds[0] == 0
    assert bounds[-1] == steps
    assert all(begin < end for begin, end in itertools.pairwise(bounds))
    assert plan["zero_bytes"] == 0
    assert plan["partials_bytes"] == (splits * tokens * outputs * 4 if splits > 1 else 0)
    if splits > 1:
        last = plan["launches"][-1]
        assert last["kernel"] == f"nf4_sum_splits_{SHORT[problem['dtype']]}"
        count = tokens * outputs
        assert last["arguments"] == [
            ("pointer", "partials", 0),
            ("pointer", "y", 0),
            ("int64", count),
            ("int32", splits),
        ]
        assert last["block"] == (256, 1, 1)
        assert (last["grid"][0] - 1) * 1024 < count <= last["grid"][0] * 1024


@settings(deadline=None)
@given(products())
def test_launches_keep_to_the_limits_of_cuda_and_to_their_buffers(drawn):
    problem, _ = drawn
    plan = _plan.plan(**problem)
    sizes = buffer_bytes(problem, plan)
    for launch in plan["launches"]:
        assert launch["kernel"] in _plan.kernel_names()
        assert 1 <= launch["grid"][0] < 2**31
        assert all(1 <= blocks <= 65535 for blocks in launch["grid"][1:])
        assert launch["shared_bytes"] <= 99 * 1024
        for kind, *rest in launch["arguments"]:
            if kind == "pointer" and rest[0] in sizes:
                name, offset = rest
                assert 0 <= offset < sizes[name]
                assert offset % 2 == 0
            elif kind == "int32":
                assert -(2**31) <= rest[0] < 2**31


@settings(deadline=None)
@given(products())
def test_a_split_takes_work_from_the_busiest_multiprocessor(drawn):
    problem, multiprocessors = drawn
    splits = problem["splits"]
    tile = SHAPES[int(_plan.plan(**problem)["launches"][0]["kernel"].rsplit("_t", 1)[1])]
    forward = problem["operation"] == "forward"
    outputs = problem["out_features" if forward else "in_features"]
    steps = -(-problem["in_features" if forward else "out_features"] // 64)
    tiles = math.ceil(outputs / tile["rows"]) * math.ceil(problem["tokens"] / tile["tokens"])

    def turns(splits):  # of the loop, in all blocks of the busiest multiprocessor
        return math.ceil(tiles * splits / multiprocessors) * math.ceil(math.ceil(steps / splits) / tile["k_groups"])

    assert 1 <= splits <= max(1, min(64, steps // (2 * tile["k_groups"])))
    if splits > 1:
        # More blocks of fewer turns each: fewer in all, or two blocks at a time where one would be alone.
        alone = tiles <= multiprocessors
        assert turns(splits) < turns(1) * (1.6 if alone else 1)


@pytest.mark.parametrize(
    ("operation", "tokens", "in_features", "out_features", "splits"),
    [
        ("forward", 8, 4096, 4096, 4),  # 64 tiles for 132 multiprocessors: two blocks for nearly each
        ("dx", 8, 4096, 4096, 4),
        ("forward", 8, 4096, 132 * 64, 2),
        ("forward", 8, 4096, 264 * 64, 1),
        ("dx", 8, 264 * 64, 4096, 1),
        ("forward", 8, 4096, 64, 8),  # 64 steps for four groups of warps, two each
        ("forward", 1, 576, 192, 1),  # 9 steps
        ("forward", 16, 4096, 1024, 8),
        ("dx", 4194241, 1, 4194113, 1),  # more tokens than one launch holds
    ],
)
def test_splits_of_known_shapes(operation, tokens, in_features, out_features, splits):
    assert splits == _plan.splits(
        operation,
        route="skinny",
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        multiprocessors=132,
    )


@pytest.mark.parametrize(
    ("tokens", "route", "tile"),
    [
        (1, "skinny", 8),
        (8, "skinny", 8),
        (9, "skinny", 16),
        (17, "skinny", 32),
        (33, "skinny", 64),
        (64, "skinny", 64),
        (65, "skinny", 64),
        (1, "tile", 128),
        (1000, "tile", 128),
    ],
)
def test_the_smallest_tile_that_holds_the_tokens(tokens, route, tile):
    plan = _plan.plan("forward", route=route, tokens=tokens, in_features=128, out_features=128)
    assert plan["launches"][0]["kernel"].endswith(f"_t{tile}")
    assert plan["launches"][0]["grid"][2] == math.ceil(tokens / tile)


def test_arguments_are_those_of_the_kernels():
    weight = [("pointer", name, 0) for name in ("packed", "absmax", "group_scales", "offsets", "where")]
    weight += [("int64", 3), ("int64", 7), ("int64", 9), ("int32", 6), ("int32", 1)]
    problem = {"in_features": 576, "out_features": 192, "layers": 3, "layer_groups": 7, "row_blocks": 9}
    (launch,) = _plan.plan("dx", tokens=5, **problem)["launches"]
    assert launch["arguments"] == [
        ("pointer", "x", 0),
        ("pointer", "y", 0),
        ("pointer", "y", 0),  # of partial sums, which are not written
        *weight,
        ("int64", 5),
        ("int64", 576),
        ("int64", 192),
        ("int32", 1),
    ]
    (launch,) = _plan.plan("dequantize", dtype="float32", weight_dtype="float16", **problem)["launches"]
    assert launch["arguments"] == [
        ("pointer", "dense", 0),
        *weight,
        ("int32", 2),
        ("int64", 576),
        ("int64", 192),
    ]


@settings(deadline=None)
@given(
    in_features=st.one_of(features, st.integers(2**20, 2**24)),
    out_features=st.one_of(features, st.integers(2**20, 2**24)),
    layout=st.sampled_from(["rows", "fragments"]),
    dtype=st.sampled_from(sorted(SHORT)),
)
def test_dequantize_covers_every_weight_once(in_features, out_features, layout, dtype):
    """Up to 2^48 weights: a thread of the rows kernel takes four times eight of them, a warp of the other a tile."""
    units, per_block = in_features * out_features, 256 * 8 * 4
    if layout == "fragments":
        units, per_block = math.ceil(in_features / 64) * math.ceil(out_features / 64), 8
    assume(units <= per_block * (2**31 - 1))
    plan = _plan.plan("dequantize", layout=layout, dtype=dtype, in_features=in_features, out_features=out_features)
    (launch,) = plan["launches"]
    assert launch["kernel"] == f"nf4_dequantize_{layout}_{SHORT[dtype]}"
    assert (launch["block"], launch["shared_bytes"], plan["partials_bytes"]) == ((256, 1, 1), 0, 0)
    assert launch["grid"][1:] == (1, 1)
    assert (launch["grid"][0] - 1) * per_block < units <= launch["grid"][0] * per_block


def test_every_kernel_is_planned_for_and_nothing_else():
    planned = set()
    for dtype, layout in itertools.product(SHORT, ("rows", "fragments")):
        plan = _plan.plan("dequantize", dtype=dtype, layout=layout, in_features=64, out_features=64)
        planned |= {launch["kernel"] for launch in plan["launches"]}
    for operation, dtype, tokens in itertools.product(("forward", "dx"), SIXTEEN_BITS, (8, 16, 32, 64, 128)):
        route = "tile" if tokens == 128 else "skinny"
        plan = _plan.plan(
            operation,
            route=route,
            dtype=dtype,
            weight_dtype=dtype,
            tokens=tokens,
            in_features=4096,
            out_features=4096,
            splits=2,
        )
        planned |= {launch["kernel"] for launch in plan["launches"]}
    assert planned == set(_plan.kernel_names())


@pytest.mark.parametrize("shape", _plan.product_shapes(), ids=lambda shape: f"t{shape['tokens']}")
def test_sizes_of_the_fused_kernels(shape):
    """Every GPU from sm_80 on can give 99 KiB to a block; the launch bound of a block is 1024 threads."""
    assert shape["shared_bytes"] <= 99 * 1024
    assert shape["shared_bytes"] % 16 == 0
    assert shape["threads"] % 32 == 0
    assert shape["threads"] <= 1024
    assert shape["rows"] % 16 == 0


def test_empty_problems_launch_nothing():
    nothing = {"launches": [], "partials_bytes": 0, "zero_bytes": 0}
    assert _plan.plan("forward", tokens=0, in_features=64, out_features=64) == nothing
    assert _plan.plan("forward", tokens=3, in_features=64, out_features=0) == nothing
    assert _plan.plan("dequantize", in_features=0, out_features=64) == nothing
    assert _plan.plan("forward", tokens=3, in_features=0, out_features=5) == nothing | {"zero_bytes": 30}
    assert _plan.splits("dx", route="tile", tokens=0, in_features=4, out_features=4, multiprocessors=100) == 1
    assert _plan.splits("dx", route="tile", tokens=4, in_features=4, out_features=0, multiprocessors=100) == 1


FUSED = {"tokens": 4, "in_features": 128, "out_features": 192}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "rows"}, "layout fragments"),
        ({"dtype": "float32"}, "16-bit activations"),
        ({"dtype": "float16", "weight_dtype": "bfloat16"}, "range of float16"),
        ({"block_size": 32}, "blocks of 64"),
        ({"splits": 0}, "2 steps cannot be split in 0"),
        ({"splits": 3}, "2 steps cannot be split in 3"),
        ({"tokens": 65535 * 64 + 1, "splits": 2}, "too large to be split"),
        ({"tokens": 2**40, "in_features": 2**40}, "too large"),
        ({"tokens": 2**16, "out_features": 2**38}, "more blocks than a CUDA grid holds"),
        ({"in_features": 2**31}, "contraction in 32 bits"),
        ({"tokens": -1}, "negative"),
    ],
)
def test_what_no_kernel_serves_is_refused_with_its_shape(changes, words):
    problem = FUSED | changes
    with pytest.raises(ValueError, match=words) as caught:
        _plan.plan("forward", **problem)
    shape = f"{problem['tokens']} rows, weight [in={problem['in_features']}, out={problem['out_features']}]"
    assert shape in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 16}, "blocks of 32"),
        ({"in_features": 2**22 * 64, "out_features": 2**22}, "more blocks than a CUDA grid holds"),
        ({"in_features": 2**40, "out_features": 2**40}, "too large"),
    ],
)
def test_dense_matrices_that_no_kernel_serves_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        _plan.plan("dequantize", layout="rows", **{"in_features": 64, "out_features": 64} | changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"operation": "backward"}, "operation must be one of forward, dx, dequantize, got backward"),
        ({"operation": "forward", "route": "wide"}, "route must be one of skinny, tile, got wide"),
        ({"operation": "forward", "block_size": 48}, "power of two"),
    ],
)
def test_unknown_words_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        _plan.plan(**FUSED | arguments)
