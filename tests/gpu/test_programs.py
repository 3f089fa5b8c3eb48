"""Products inside programs: views of layers, scan and its gradient, vmap, shards, CUDA graphs, equal repetitions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import Way, both, error, normal, tensor
from jax.sharding import Mesh, PartitionSpec
from packed_weight import make_weight

from qlora_jax.nf4 import NF4Tensor, nf4_matmul, quantize, use_kernels

LAYERS = 3
# XLA's options, which a CPU takes and leaves alone.
AS_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
    # Else XLA launches one by one while it is watched.
    "xla_enable_command_buffers_during_profiling": True,
}
ONE_BY_ONE = {"xla_gpu_enable_command_buffer": ""}


@pytest.mark.parametrize("rows", [5, 96])
def test_views_of_layers_equal_the_layers_alone(way: Way, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, dy = normal(rng, (rows, 192), "bfloat16"), normal(rng, (rows, 136), "bfloat16")
    stack = make_weight(rng, 192, 136, layers=LAYERS)
    for layer in range(LAYERS):
        seen = both(x, dy, tensor(stack, way.layout).layer(layer), way.kernels)
        alone = both(x, dy, tensor(stack.only_layer(layer), way.layout), way.kernels)
        for one, other in zip(seen, alone, strict=True):
            np.testing.assert_array_equal(one, other)


def loop(x: jax.Array, stack: NF4Tensor, how: str) -> jax.Array:
    """x through all layers."""

    def layer(x: jax.Array, i: Any) -> jax.Array:
        # Small steps: rounding errors are not multiplied.
        return x + nf4_matmul(x, stack.layer(i)) / 16

    if how == "scan":
        return jax.lax.scan(lambda x, i: (layer(x, i), None), x, jnp.arange(LAYERS))[0]
    if how == "scan, remat":
        return jax.lax.scan(lambda x, i: (jax.checkpoint(layer)(x, i), None), x, jnp.arange(LAYERS))[0]
    for i in range(LAYERS):
        x = layer(x, i)
    return x


@pytest.mark.parametrize("rows", [5, 96])
def test_scan_and_its_gradient_equal_the_loop(way: Way, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, dy = (jnp.asarray(normal(rng, (rows, 192), "bfloat16")) for _ in range(2))
    weight = make_weight(rng, 192, 192, layers=LAYERS)
    stack = tensor(weight, way.layout)
    results = {}
    for how in ("loop", "scan", "scan, remat"):
        with use_kernels(way.kernels):
            y, pullback = jax.vjp(lambda x, how=how: jax.jit(loop, static_argnums=2)(x, stack, how), x)
            results[how] = np.asarray(y), np.asarray(pullback(dy)[0])
    exact_y, exact_dx = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    matrices = [weight.only_layer(i).dense("bfloat16").astype(np.float64) / 16 for i in range(LAYERS)]
    for matrix in matrices:
        exact_y = exact_y + exact_y @ matrix.T
    for matrix in reversed(matrices):
        exact_dx = exact_dx + exact_dx @ matrix
    for y, dx in results.values():
        # A sum and a product are rounded in each of the layers.
        assert error(y, exact_y) < 6e-3
        assert error(dx, exact_dx) < 6e-3
    for y, dx in (results["scan"], results["scan, remat"]):
        assert error(y, np.asarray(results["loop"][0], np.float64)) < 4e-3
        assert error(dx, np.asarray(results["loop"][1], np.float64)) < 4e-3


def test_a_mapped_axis_is_more_rows(way: Way) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(normal(rng, (4, 6, 192), "bfloat16"))
    w = tensor(make_weight(rng, 192, 136), way.layout)
    with use_kernels(way.kernels):
        mapped = jax.jit(jax.vmap(nf4_matmul, in_axes=(0, None)))(x, w)
        flat = jax.jit(nf4_matmul)(x.reshape(24, 192), w)
    np.testing.assert_array_equal(np.asarray(mapped).reshape(24, 136), flat)


@pytest.mark.parametrize(
    "part", [(slice(0, 64), slice(2, 4)), (slice(64, 192), slice(0, 4)), (slice(128, 192), slice(3, 4))]
)
def test_a_shard_decodes_the_scales_of_the_whole(way: Way, part: tuple[slice, slice]) -> None:
    rng = np.random.default_rng(4)
    weight = make_weight(rng, 256, 192, layers=2, layer=1, shard=part)
    w = tensor(weight, way.layout, whole=(256, 192))
    matrix = weight.dense("bfloat16").astype(np.float64)
    x, dy = (normal(rng, (33, features), "bfloat16") for features in matrix.shape[::-1])
    y, dx = both(x, dy, w, way.kernels)
    assert error(y, x.astype(np.float64) @ matrix.T) <= way.bound("bfloat16", y.size)
    assert error(dx, dy.astype(np.float64) @ matrix) <= way.bound("bfloat16", dx.size)


def test_in_shard_map_over_the_devices_that_there_are(way: Way, device_of_way: jax.Device) -> None:
    rng = np.random.default_rng(6)
    weight = make_weight(rng, 192, 256)
    w, x = tensor(weight, way.layout), jnp.asarray(normal(rng, (9, 192), "bfloat16"))
    devices = jax.local_devices(backend=device_of_way.platform)
    count = max(n for n in (1, 2, 4) if n <= len(devices))
    mesh = Mesh(np.array(devices[:count]), ("out",))
    by_rows = PartitionSpec("out")
    specs = NF4Tensor(
        packed=by_rows,
        absmax=by_rows,
        absmax_scale=PartitionSpec(),
        absmax_offset=PartitionSpec(),
        shape=w.shape,
        block_size=w.block_size,
        dtype=w.dtype,
        layout=w.layout,
    )

    def product(x: jax.Array, w: NF4Tensor) -> jax.Array:
        return nf4_matmul(x, w.shard(jax.lax.axis_index("out") * (256 // count)))

    sharded = jax.shard_map(product, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec(None, "out"))
    with use_kernels(way.kernels):
        y = np.asarray(jax.jit(sharded)(x, w))
    expected = np.asarray(x, np.float64) @ weight.dense("bfloat16").astype(np.float64).T
    assert error(y, expected) <= way.bound("bfloat16", y.size)


def chain(x: jax.Array, stack: NF4Tensor) -> tuple[jax.Array, jax.Array]:
    """Every kind of launch: products forward and back, split or not, and what XLA fuses between them."""
    y, pullback = jax.vjp(lambda x: loop(x, stack, "loop"), x)
    return y, pullback(jnp.sin(y))[0]


def compile_chain(way: Way, options: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    rng = np.random.default_rng(9)
    operands = (
        jnp.asarray(normal(rng, (16, 192), "bfloat16")),
        tensor(make_weight(rng, 192, 192, layers=LAYERS), way.layout),
    )
    with use_kernels(way.kernels):
        return jax.jit(chain).lower(*operands).compile(compiler_options=options), operands


def test_a_cuda_graph_computes_what_single_launches_do(way: Way) -> None:
    results = []
    for options in (AS_GRAPHS, ONE_BY_ONE):
        compiled, (x, stack) = compile_chain(way, options)
        # The second run updates the graph of the first: other buffers, other values.
        results.append([np.asarray(part) for factor in (1, 2) for part in compiled(x * factor, stack)])
    for graph, single in zip(*results, strict=True):
        np.testing.assert_array_equal(graph, single)


def test_graphs_are_really_launched(way: Way, tmp_path: Path) -> None:
    """Seen in a profile, which on a CPU shows none."""
    for options, expected in ((AS_GRAPHS, way.device == "gpu"), (ONE_BY_ONE, False)):
        folder = tmp_path / str(len(options))
        compiled, operands = compile_chain(way, options)
        jax.block_until_ready(compiled(*operands))
        with jax.profiler.trace(str(folder)):
            for _ in range(3):
                jax.block_until_ready(compiled(*operands))
        (profile,) = folder.rglob("*.xplane.pb")
        assert (b"GraphLaunch" in profile.read_bytes()) == expected, options


@pytest.mark.parametrize("rows", [1, 16, 64, 130])
def test_results_repeat_bit_for_bit(way: Way, rows: int) -> None:
    """Also while other work is on the device, and where the contraction is long enough to be split."""
    rng = np.random.default_rng(rows)
    size = 4096 if way.device == "gpu" else 512
    w = tensor(make_weight(rng, size, 192), way.layout)
    x, dy = normal(rng, (rows, size), "bfloat16"), normal(rng, (rows, 192), "bfloat16")
    first = both(x, dy, w, way.kernels)
    for _ in range(4):
        noise = jnp.ones((256, 256)) @ jnp.ones((256, 256))
        for got, expected in zip(both(x, dy, w, way.kernels), first, strict=True):
            np.testing.assert_array_equal(got, expected)
        jax.block_until_ready(noise)


def test_quantize_gives_the_same_bytes_on_every_device(device: jax.Device) -> None:
    rng = np.random.default_rng(1)
    for dtype in ("bfloat16", "float16"):
        kernel = normal(rng, (192, 136), dtype)
        here = quantize(jnp.asarray(kernel))
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            there = quantize(jnp.asarray(kernel))
        np.testing.assert_array_equal(here.packed, there.packed)
        np.testing.assert_array_equal(here.absmax, there.absmax)
        np.testing.assert_allclose(here.absmax_offset, there.absmax_offset, rtol=1e-6)
