"""What is lowered for CUDA, read in StableHLO: targets, attributes, operands, for each number of rows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.nf4 import dequantize, nf4_matmul, quantize, use_compute_capability, use_kernels

STACK = quantize(jnp.ones((3, 128, 192), jnp.bfloat16) / 64)
FRAGMENTS = STACK.to_layout("fragments")


def abstract(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x, w, i):
    return nf4_matmul(x, w.layer(i))


def gradient(dy, w, i):
    return jax.vjp(lambda x: nf4_matmul(x, w.layer(i)), jnp.zeros((dy.shape[0], 128), dy.dtype))[1](dy)[0]


def calls(text):
    """[(target, attributes, operand types)] of the kernels' calls."""
    pattern = r"custom_call @(qlora\w+)\(.*?mhlo\.backend_config = \{(.*?)\}.*?: \((.*?)\) -> (\S+)"
    found = []
    for target, attributes, operands, result in re.findall(pattern, text):
        values = dict(re.findall(r"(\w+) = (\d+) : i64", attributes))
        found.append((target, {k: int(v) for k, v in values.items()}, re.findall(r"tensor<(.*?)>", operands), result))
    return found


COMMON = {"row_blocks": 2, "block_size": 64, "weight_dtype": 1}
SCALES = ["3x384xui8", "3x2xf32", "3xf32", "3xi32"]


@pytest.mark.parametrize(("rows", "route"), [(1, 0), (64, 0), (65, 1), (256, 1)])
def test_fused_products(for_cuda, rows, route):
    attributes = {**COMMON, "layout": 1, "route": route}
    operands = ["3x12288xui8", *SCALES]
    forward = (("qlora_jax_nf4_matmul", attributes, [f"{rows}x128xbf16", *operands], f"tensor<{rows}x192xbf16>"),)
    text = for_cuda(product, abstract(rows, 128), FRAGMENTS, 1)
    assert calls(text) == list(forward)
    assert "dot_general" not in text
    backward = ("qlora_jax_nf4_matmul_dx", attributes, [f"{rows}x192xbf16", *operands], f"tensor<{rows}x128xbf16>")
    assert calls(for_cuda(gradient, abstract(rows, 192), FRAGMENTS, 1)) == [backward]


@pytest.mark.parametrize(
    ("rows", "target", "shape", "splits"),
    [
        (8, "qlora_jax_nf4_matmul", (4096, 64), 8),  # 64 steps, two at least for each of four groups of warps
        (8, "qlora_jax_nf4_matmul_dx", (64, 4096), 8),
        (128, "qlora_jax_nf4_matmul", (1024, 64), 8),
        (128, "qlora_jax_nf4_matmul", (1024, 16384), 1),
    ],
)
def test_partial_sums_are_a_second_result(for_cuda, rows, target, shape, splits):
    w = jax.eval_shape(lambda: quantize(jnp.ones(shape, jnp.bfloat16), layout="fragments"))
    dx = target.endswith("dx")
    width, out = shape[::-1] if dx else shape
    text = for_cuda(
        lambda x, w: (
            jax.vjp(lambda y: nf4_matmul(y, w), jnp.zeros((rows, shape[0]), x.dtype))[1](x)[0]
            if dx
            else nf4_matmul(x, w)
        ),
        abstract(rows, width),
        w,
    )
    results = re.findall(rf"custom_call @{target}\(.*?-> \(?(tensor<[^)\n]*)", text)
    y, partials = f"tensor<{rows}x{out}xbf16>", f"tensor<{splits}x{rows}x{out}xf32>"
    assert results == [f"{y}, {partials}" if splits > 1 else y]


@pytest.mark.parametrize(
    ("w", "rows", "dtype", "hlo"),
    [(FRAGMENTS, 257, "bfloat16", "bf16"), (STACK, 1, "bfloat16", "bf16"), (FRAGMENTS, 1, "float32", "f32")],
    ids=["many rows", "layout rows", "float32"],
)
def test_dequantize_and_dot(for_cuda, w, rows, dtype, hlo):
    packed = "3x12288xui8"
    attributes = {**COMMON, "layout": int(w.layout == "fragments")}
    precision = "HIGHEST, HIGHEST" if dtype == "float32" else "DEFAULT, DEFAULT"
    for function, width, contracting, out in ((product, 128, "[1] x [1]", 192), (gradient, 192, "[1] x [0]", 128)):
        text = for_cuda(function, abstract(rows, width, dtype=dtype), w, 1)
        assert calls(text) == [
            ("qlora_jax_nf4_dequantize", attributes, [packed, *SCALES], f"tensor<192x128x{hlo}>"),
        ]
        # The dot gives x's dtype itself: nothing has to be cast, so that XLA can let it start from another result.
        dot = (
            rf"dot_general .*contracting_dims = {re.escape(contracting)}, precision = \[{precision}\] : "
            rf"\(tensor<{rows}x{width}x{hlo}>, tensor<192x128x{hlo}>\) -> tensor<{rows}x{out}x{hlo}>"
        )
        assert len(re.findall(dot, text)) == 1


def test_the_call_hangs_on_x_and_no_stack_passes_a_barrier(for_cuda):
    text = for_cuda(product, abstract(512, 128), FRAGMENTS, 1)
    types = r"tensor<512x128xbf16>, tensor<3xi32>"
    first = re.search(rf"(%\d+):2 = stablehlo.optimization_barrier .* : {types}", text)
    assert first
    call = re.search(rf"(%\d+) = stablehlo.custom_call @qlora_jax_nf4_dequantize\(.*, {first[1]}#1\)", text)
    assert call
    # x passes once more with the dense weight: else products that share x would be merged, and their weights copied.
    second = re.search(rf"(%\d+):2 = stablehlo.optimization_barrier {first[1]}#0, {call[1]} :", text)
    assert second
    assert re.search(rf"dot_general {second[1]}#0, {second[1]}#1,", text)
    assert text.count("optimization_barrier") == 2


def test_a_flat_weight_and_one_without_double_quantization(for_cuda):
    flat = quantize(jnp.ones((50, 33), jnp.float16), double_quant=False)
    text = for_cuda(nf4_matmul, abstract(4, 50, dtype="float16"), flat)
    attributes = {"row_blocks": 0, "block_size": 64, "weight_dtype": 2, "layout": 0}
    operands = ["1x825xui8", "1x26xf32", "1x1xf32", "1xf32", "3xi32"]
    assert calls(text) == [("qlora_jax_nf4_dequantize", attributes, operands, "tensor<33x50xf16>")]


def test_the_device_and_the_overrides_are_part_of_the_key_of_the_caches(for_cuda):
    function, x = jax.jit(product), abstract(512, 128)

    def targets():
        text = function.trace(x, FRAGMENTS, 1).lower(lowering_platforms=("cuda",)).as_text()
        return [(target, attributes.get("route")) for target, attributes, _, _ in calls(text)]

    assert targets() == [("qlora_jax_nf4_dequantize", None)]
    with use_compute_capability("8.0"):
        assert targets() == [("qlora_jax_nf4_matmul", 1)]
        with use_kernels("skinny"):
            assert targets() == [("qlora_jax_nf4_matmul", 0)]
    with use_kernels("xla"):
        assert targets() == []
    with use_compute_capability("7.5"):
        assert targets() == []


def test_dequantize_is_one_call_for_each_layer(for_cuda):
    one = FRAGMENTS.layer(2)
    call = ("qlora_jax_nf4_dequantize", {**COMMON, "layout": 1}, ["3x12288xui8", *SCALES], "tensor<192x128xbf16>")
    assert calls(for_cuda(dequantize, one)) == [call]
    for_stack = for_cuda(lambda w: dequantize(w, jnp.float32), FRAGMENTS)
    assert calls(for_stack) == [(*call[:3], "tensor<192x128xf32>")]
    assert "stablehlo.while" in for_stack
    mapped = for_cuda(jax.vmap(lambda i: dequantize(FRAGMENTS.layer(i))), jnp.arange(3))
    assert [found[0] for found in calls(mapped)] == ["qlora_jax_nf4_dequantize"]


@pytest.mark.parametrize("w", [STACK, FRAGMENTS], ids=["rows", "fragments"])
def test_one_trace_serves_both_platforms(for_cuda, w):
    """The same traced program: what is lowered for the CPU has the CPU's attributes and runs."""
    x = jnp.ones((4, 128), jnp.bfloat16)
    traced = jax.jit(product).trace(x, w, 1)
    on_cuda = calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    on_cpu = calls(traced.lower(lowering_platforms=("cpu",)).as_text())
    expected = "qlora_jax_nf4_matmul" if w is FRAGMENTS else "qlora_jax_nf4_dequantize"
    assert [target for target, *_ in on_cuda] == [expected]
    assert [(target, attributes) for target, attributes, *_ in on_cpu] == [("qlora_jax_nf4_matmul", COMMON)]
    assert calls(traced.lower(lowering_platforms=("rocm",)).as_text()) == []
    expected = np.asarray(x, np.float32) @ np.asarray(dequantize(STACK.layer(1)), np.float32)
    np.testing.assert_allclose(np.asarray(traced.lower().compile()(x, w, 1), np.float32), expected, rtol=1e-2)
    np.testing.assert_array_equal(product(x, w, 1), jax.jit(product)(x, w, 1))
    assert dequantize(w).shape == (3, 128, 192)


def test_what_cannot_run_is_an_error_where_it_is_compiled_and_only_there(for_cuda):
    x = jnp.ones((4, 128), jnp.bfloat16)
    with use_kernels("tile"):
        traced = jax.jit(product).trace(x, FRAGMENTS, 1)
        assert calls(traced.lower(lowering_platforms=("cuda",)).as_text())
        for run in (traced.lower, lambda: product(x, FRAGMENTS, 1)):
            with pytest.raises(RuntimeError, match=r"'tile' kernel was asked for on cpu, .* CUDA GPUs only"):
                run()
        with pytest.raises(RuntimeError, match=r"'tile' kernel was asked for, but the weight has layout 'rows'"):
            for_cuda(product, x, STACK, 1)
    with use_kernels("dequantize"):
        assert calls(for_cuda(product, x, FRAGMENTS, 1))[0][0] == "qlora_jax_nf4_dequantize"
        assert product(x, FRAGMENTS, 1).shape == (4, 192)


def test_a_training_step_keeps_no_dense_weight(for_cuda):
    """In scan with remat: forward, recomputation and backward each make their own; what is kept is the packed stack."""
    stack = quantize(jnp.ones((4, 128, 128), jnp.bfloat16) / 64).to_layout("fragments")

    def loss(x, stack):
        layer = jax.checkpoint(lambda h, i: (jnp.tanh(nf4_matmul(h, stack.layer(i))), None), prevent_cse=False)
        return jax.lax.scan(layer, x, jnp.arange(4))[0].astype(jnp.float32).sum()

    text = for_cuda(jax.grad(loss), abstract(512, 128), stack)
    assert {target for target, *_ in calls(text)} == {"qlora_jax_nf4_dequantize"}
    assert "4x128x128xbf16" not in text
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: nf4_matmul(x, stack.layer(0)), x)[1], abstract(512, 128))
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(kept))


def test_shards(for_cuda):
    w = quantize(jnp.ones((128, 256), jnp.bfloat16)).to_layout("fragments")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dataclasses.replace(w, packed=P("x", None, None), absmax=P("x", None), absmax_scale=P(), absmax_offset=P())

    def local(x, w):
        return nf4_matmul(x, w.shard(jax.lax.axis_index("x") * 128))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "x"))
    operands = ["4x128xbf16", "1x8192xui8", "1x256xui8", "1x2xf32", "1xf32", "3xi32"]
    attributes = {**COMMON, "layout": 1, "route": 0}
    text = for_cuda(sharded, abstract(4, 128), w)
    assert calls(text) == [("qlora_jax_nf4_matmul", attributes, operands, "tensor<4x128xbf16>")]
    step = for_cuda(jax.grad(lambda x: (sharded(x, w) ** 2).sum()), abstract(600, 128))
    assert [target for target, *_ in calls(step)] == ["qlora_jax_nf4_dequantize"] * 2
