"""The layout of the CUDA kernels against a lane-by-lane model of it, and everything that has to honour it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qlora_jax.nf4 import NF4Tensor, dequantize, nf4_matmul, quantize, use_kernels
from qlora_jax.nf4.tensor import leaf_shapes


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0, scale: float = 0.05) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def codes_of_rows(packed: np.ndarray) -> np.ndarray:
    """[out, in] codes of bitsandbytes' bytes."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(packed.shape[0], -1)


def fragments_lane_by_lane(codes: np.ndarray) -> np.ndarray:
    """What each lane's registers have to hold, byte by byte, as `mma.m16n8k16` numbers the entries of its A operand.

    Register r of lane (g, t) has row g + 8 (r & 1), columns 2t and 2t + 1, + 8 (r >> 1). A lane's 16 bytes are its
    registers of four 16 x 16 blocks, one byte (two codes) each; chunks are swizzled within groups of eight lanes.
    """
    out_features, in_features = codes.shape
    padded = np.full((-(-out_features // 64) * 64, -(-in_features // 64) * 64), 7, np.uint8)
    padded[:out_features, :in_features] = codes
    tiles = np.zeros((padded.shape[0] // 64, padded.shape[1] // 64, 2048), np.uint8)
    for nt, kt in np.ndindex(tiles.shape[:2]):
        for strip, lane, block, register in np.ndindex(4, 32, 4, 4):
            g, t = lane // 4, lane % 4
            chunk = lane ^ (((lane >> 3) & 3) << 1)
            row = 64 * nt + 16 * strip + g + 8 * (register & 1)
            column = 64 * kt + 16 * block + 2 * t + 8 * (register >> 1)
            byte = padded[row, column] | padded[row, column + 1] << 4
            tiles[nt, kt, 512 * strip + 16 * chunk + 4 * block + register] = byte
    return tiles


@pytest.mark.parametrize(("in_features", "out_features", "block_size"), [(128, 64, 64), (96, 100, 32), (192, 3, 64)])
def test_bytes_lie_where_each_lane_reads_them(in_features, out_features, block_size):
    w = quantize(normal(in_features, out_features), block_size=block_size)
    fragments = w.to_layout("fragments")
    np.testing.assert_array_equal(fragments.packed, fragments_lane_by_lane(codes_of_rows(np.asarray(w.packed))))
    for name in ("absmax", "absmax_scale", "absmax_offset"):
        assert getattr(fragments, name) is getattr(w, name)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 5),
    out_features=st.integers(1, 140),
    block_size=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    layers=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_come_back_from_fragments(blocks, out_features, block_size, layers, seed):
    in_features = blocks * block_size
    shapes = leaf_shapes((in_features, out_features), block_size, True)
    stack = () if layers is None else (layers,)
    rng = np.random.default_rng(seed)
    leaves = {
        name: jnp.asarray(rng.integers(0, 256, (*stack, *dims)).astype(dtype)) for name, (dims, dtype) in shapes.items()
    }
    w = NF4Tensor(**leaves, shape=(in_features, out_features), block_size=block_size)
    fragments = w.to_layout("fragments")
    expected, dtype = leaf_shapes(w.shape, block_size, True, "fragments")["packed"]
    assert (fragments.packed.shape, fragments.packed.dtype) == ((*stack, *expected), dtype)
    assert (fragments.num_layers, fragments.local_shape) == (layers, w.shape)
    back = fragments.to_layout("rows")
    assert back.layout == "rows"
    np.testing.assert_array_equal(back.packed, w.packed)


def test_what_lies_beyond_the_matrix_is_code_seven():
    w = quantize(jnp.full((96, 65), 0.5, jnp.bfloat16), block_size=32).to_layout("fragments")
    tiles = np.asarray(w.packed).reshape(2, 2, 4, 32, 4, 4)
    assert (tiles[1, :, 1:] == 0x77).all()  # outputs 80 .. 127
    assert (tiles[:, 1, :, :, 2:] == 0x77).all()  # inputs 96 .. 127
    assert (tiles[0, 0] == 0xFF).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantize_makes_the_layout_that_is_asked_for(double_quant):
    kernel = normal(2, 128, 70)
    made = quantize(kernel, double_quant=double_quant, layout="fragments")
    moved = quantize(kernel, double_quant=double_quant).to_layout("fragments")
    assert jax.tree.structure(made) == jax.tree.structure(moved)
    for left, right in zip(jax.tree.leaves(made), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(left, right)


def test_repacking_a_stack_needs_little_more_than_the_two_stacks():
    layers, width = 16, 512
    w = quantize(normal(layers, width, width))
    for layout in ("fragments", "rows"):
        compiled = jax.jit(lambda w, layout=layout: w.to_layout(layout).packed).lower(w).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 3 * width * width // 2
        w = w.to_layout(layout)
    made = jax.jit(lambda kernel: quantize(kernel, layout="fragments")).lower(dequantize(w)).compile()
    dense_layer = 2 * width * width  # what is being quantized
    assert made.memory_analysis().temp_size_in_bytes < dense_layer + 3 * width * width // 2


@pytest.mark.parametrize("kernels", ["xla", "ffi"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_and_weights_are_the_same_bits(kernels, dtype):
    stack = quantize(normal(3, 192, 100))
    fragments = stack.to_layout("fragments")
    x, dy = normal(5, 192, dtype=dtype, seed=1), normal(5, 100, dtype=dtype, seed=2)

    @jax.jit
    def of_layer(w, i):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, w.layer(i)), x)
        return y, pullback(dy)[0], dequantize(w.layer(i))

    with use_kernels(kernels):
        for i in (0, 2, 7, -1):
            for left, right in zip(of_layer(stack, i), of_layer(fragments, i), strict=True):
                np.testing.assert_array_equal(left, right)
        one = stack.to_layout("rows").layer(1)
        np.testing.assert_array_equal(nf4_matmul(x, fragments.layer(1)), nf4_matmul(x, one))
    np.testing.assert_array_equal(dequantize(fragments), dequantize(stack))
    view = fragments.layer(1)
    np.testing.assert_array_equal(view.to_layout("rows").where, view.where)
    assert view.to_layout("rows").layout == "rows"


@pytest.mark.parametrize("kernels", ["xla", "ffi"])
def test_fragments_under_scan_remat_vmap_and_grad(kernels):
    stack = quantize(normal(4, 64, 64, scale=0.1))
    x = normal(3, 64, dtype="float32", seed=1)

    def loss(x, stack):
        layer = jax.checkpoint(lambda h, i: (jnp.tanh(nf4_matmul(h, stack.layer(i))), None), prevent_cse=False)
        return jax.lax.scan(layer, x, jnp.arange(4))[0].sum()

    with use_kernels(kernels):
        both = [jax.jit(jax.grad(loss))(x, w) for w in (stack, stack.to_layout("fragments"))]
        np.testing.assert_array_equal(*both)
        each = [jax.jit(jax.vmap(nf4_matmul, (None, 0)))(x, w) for w in (stack, stack.to_layout("fragments"))]
        np.testing.assert_array_equal(*each)


@pytest.mark.parametrize("kernels", ["xla", "ffi"])
@pytest.mark.parametrize("split", ["out", "in"])
def test_shards_of_whole_tiles(split, kernels):
    """Groups of 256 scales begin inside rows and inside shards; 768/4 and 256/4 are whole tiles."""
    w = quantize(normal(768, 256))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(8, 768, dtype="float32", seed=1)

    def local(x, w):
        index = jax.lax.axis_index("x")
        if split == "out":
            return nf4_matmul(x, w.shard(index * 64, 0)), dequantize(w.shard(index * 64, 0))
        return jax.lax.psum(nf4_matmul(x, w.shard(0, index * 3)), "x"), dequantize(w.shard(0, index * 3))

    def run(w):
        tail = (None,) * (w.packed.ndim - 2)
        cut = ("x", None) if split == "out" else (None, "x")
        specs = dataclasses.replace(w, packed=P(*cut, *tail), absmax=P(*cut), absmax_scale=P(), absmax_offset=P())
        x_spec, y_spec = (P(), P(None, "x")) if split == "out" else (P(None, "x"), P())
        dense_spec = P(None, "x") if split == "out" else P("x", None)
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, specs), out_specs=(y_spec, dense_spec))
        gradient = jax.jit(jax.grad(lambda x: (sharded(x, w)[0] ** 2).sum()))(x)
        return *jax.jit(sharded)(x, w), gradient

    with use_kernels(kernels):
        rows, fragments = run(w), run(w.to_layout("fragments"))
    for left, right in zip(rows, fragments, strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(fragments[1], dequantize(w))


def cut(w: NF4Tensor, packed: tuple[slice, ...], absmax: tuple[slice, ...]) -> NF4Tensor:
    return dataclasses.replace(w, packed=w.packed[packed], absmax=w.absmax[absmax])


def test_buffers_cut_within_a_tile_are_refused():
    w = quantize(normal(256, 100)).to_layout("fragments")
    half = cut(w, (slice(0, 1),), (slice(0, 50),))
    x = jnp.ones((2, 256), jnp.bfloat16)
    for use in (half.shard, lambda _: half.local_shape, lambda _: nf4_matmul(x, half), lambda _: dequantize(half)):
        with pytest.raises(ValueError, match=r"packed \[1, 4, 2048\] and absmax \[50, 4\].*whole 64 x 64 tiles"):
            use(0)
    with pytest.raises(ValueError, match="whole 64 x 64 tiles"):
        cut(w, (slice(0, 2),), (slice(0, 64),)).shard(0)  # one tile's scales beside two tiles
    whole = quantize(normal(256, 128)).to_layout("fragments")
    local = cut(whole, (slice(1, 2), slice(2, 4)), (slice(64, 128), slice(2, 4)))
    np.testing.assert_array_equal(local.shard(64, 2).where, [0, 64, 2])
    np.testing.assert_array_equal(dequantize(local.shard(64, 2)), dequantize(whole)[128:, 64:])
    with pytest.raises(ValueError, match="first_row=32 lies within a 64 x 64 tile"):
        local.shard(32)
    fine = quantize(normal(256, 128), block_size=32).to_layout("fragments")
    with pytest.raises(ValueError, match="first_block=3 lies within"):
        fine.shard(0, 3)


def test_refusals_say_why():
    flat, w = quantize(normal(50, 33)), quantize(normal(64, 16))
    for refused in (
        lambda: flat.to_layout("fragments"),
        lambda: quantize(normal(50, 33), layout="fragments"),
        lambda: leaf_shapes((50, 33), 64, True, "fragments"),
    ):
        with pytest.raises(ValueError, match=r"no layout 'fragments': in_features 50 is not a multiple"):
            refused()
    assert flat.to_layout("rows") is flat
    for refused in (
        lambda: w.to_layout("fragment"),
        lambda: quantize(normal(64, 16), layout="fragment"),
        lambda: leaf_shapes((64, 16), 64, True, "fragment"),
    ):
        with pytest.raises(ValueError, match="got 'fragment'; did you mean 'fragments'"):
            refused()
    with pytest.raises(ValueError, match=r"layout must be 'rows' or 'fragments', got 'xyz'$"):
        w.to_layout("xyz")
