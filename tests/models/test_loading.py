"""load_model: bytes, memory, and what it says about checkpoints that do not fit."""

import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import quantize, use_layout
from qlora_jax.nn import FrozenParam, NF4Param


def linear(model, name: str):
    group, short = name.split(".")
    return getattr(getattr(model.layers, group), short)


def test_stacks_hold_the_bytes_of_each_layer_quantized_alone(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint(attention_bias=True, mlp_bias=True)
    model = load_model(checkpoint)
    for name in BLOCK_LINEARS:
        dense = linear(model, name)
        stack = dense.kernel.get_value()
        assert type(dense.kernel) is NF4Param
        assert dense.rank == 0
        for layer in range(3):
            prefix = f"model.layers.{layer}.{name}"
            alone = quantize(jnp.asarray(checkpoint.values(f"{prefix}.weight")).T)
            one = jax.tree.map(lambda leaf: leaf[layer], stack)  # noqa: B023
            assert jax.tree.structure(one) == jax.tree.structure(alone)
            for got, expected in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
                np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(dense.bias.get_value()[layer], checkpoint.values(f"{prefix}.bias"))
    norms = model.layers.post_attention_layernorm.weight.get_value()
    np.testing.assert_array_equal(norms[2], checkpoint.values("model.layers.2.post_attention_layernorm.weight"))
    np.testing.assert_array_equal(model.norm.weight.get_value(), checkpoint.values("model.norm.weight"))
    np.testing.assert_array_equal(model.lm_head.weight.get_value(), checkpoint.values("lm_head.weight"))
    np.testing.assert_array_equal(model.embed_tokens.weight.get_value(), checkpoint.values("model.embed_tokens.weight"))
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))


def test_weights_that_land_on_a_gpu_get_its_layout(memory_checkpoint, monkeypatch) -> None:
    checkpoint = memory_checkpoint()
    rows = load_model(checkpoint)
    with use_layout("fragments"), monkeypatch.context() as patch:
        patch.delattr("qlora_jax.nf4.tensor._permute")  # tensor by tensor: a whole stack is never repacked
        model = load_model(checkpoint)
    for name in BLOCK_LINEARS:
        stack, expected = (linear(m, name).kernel.get_value() for m in (model, rows))
        moved = expected.to_layout("fragments")
        assert jax.tree.structure(stack) == jax.tree.structure(moved)
        for left, right in zip(jax.tree.leaves(stack), jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(left, right)
    ids = jnp.arange(6)[None] % 11
    np.testing.assert_array_equal(model(ids), rows(ids))


def test_golden_folder_gives_bitsandbytes_bytes(golden_dir: Path) -> None:
    from safetensors.numpy import load_file

    model = load_model(golden_dir / "interop" / "tiny_llama_bf16")
    stored = load_file(golden_dir / "interop" / "tiny_llama_bnb4" / "model.safetensors")
    for name in BLOCK_LINEARS:
        kernel = linear(model, name).kernel.get_value()
        for layer in range(2):
            prefix = f"model.layers.{layer}.{name}.weight"
            np.testing.assert_array_equal(np.asarray(kernel.packed[layer]).reshape(-1, 1), stored[prefix])
            np.testing.assert_allclose(kernel.absmax_scale[layer], stored[f"{prefix}.nested_absmax"], rtol=1e-6)


def test_16_bit_kernels_keep_their_values(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint(dtype=np.float16)
    model = load_model(checkpoint, quant_type=None)
    for name in BLOCK_LINEARS:
        kernel = linear(model, name).kernel
        assert type(kernel) is FrozenParam
        assert kernel.get_value().dtype == jnp.float16
        for layer in range(3):
            expected = checkpoint.values(f"model.layers.{layer}.{name}.weight").T
            np.testing.assert_array_equal(kernel.get_value()[layer], expected)


def test_float32_linears_are_rounded_to_bfloat16(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint(dtype=np.float32)
    dense, packed = load_model(checkpoint, quant_type=None), load_model(checkpoint)
    assert packed.layers.mlp.up_proj.kernel.get_value().dtype == "bfloat16"
    np.testing.assert_array_equal(
        dense.layers.mlp.up_proj.kernel.get_value()[1],
        checkpoint.values("model.layers.1.mlp.up_proj.weight").T.astype(ml_dtypes.bfloat16),
    )
    assert dense.embed_tokens.weight.get_value().dtype == jnp.float32


def test_one_tensor_at_a_time(memory_checkpoint) -> None:
    """Host memory: the model in 4 bits and one tensor of the checkpoint, never the model in 16 bits."""
    checkpoint = memory_checkpoint(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, head_dim=64)
    sizes = [np.prod(shape) for shape in checkpoint.shapes.values()]
    load_model(checkpoint)  # compiles
    checkpoint.most_alive = 0
    tracemalloc.start()
    try:
        load_model(checkpoint)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert checkpoint.most_alive == 1
    # 4.13 bits a weight, and 8 bytes for each of the one tensor that is made (from float32 random numbers) and read.
    bound = 4.13 / 8 * sum(sizes) + 8 * max(sizes)
    assert peak < bound < 0.4 * 2 * sum(sizes)


def test_every_tensor_is_read_once_and_progress_is_told(memory_checkpoint) -> None:
    checkpoint, told = memory_checkpoint(), []
    load_model(checkpoint, progress=lambda done, total: told.append((done, total)))
    assert sorted(checkpoint.reads) == sorted(checkpoint.names())
    assert told == [(i + 1, len(checkpoint.reads)) for i in range(len(checkpoint.reads))]


def test_adapters_go_where_they_are_asked(memory_checkpoint) -> None:
    everywhere = load_model(memory_checkpoint(), rank=4, alpha=8.0, seed=1)
    assert all(linear(everywhere, name).lora_a.get_value().shape[0] == 3 for name in BLOCK_LINEARS)
    assert everywhere.layers.mlp.down_proj.scaling == 2.0
    some = load_model(memory_checkpoint(), rank=4, targets=["q_proj", "mlp.up_proj"])
    adapted = [name for name in BLOCK_LINEARS if linear(some, name).rank]
    assert adapted == ["self_attn.q_proj", "mlp.up_proj"]
    a = everywhere.layers.self_attn.q_proj.lora_a.get_value()
    same = load_model(memory_checkpoint(), rank=4, seed=1).layers.self_attn.q_proj.lora_a.get_value()
    np.testing.assert_array_equal(a, same)
    other = load_model(memory_checkpoint(), rank=4, seed=2).layers.self_attn.q_proj.lora_a.get_value()
    assert np.abs(a - other).max() > 0


def test_unknown_target_is_refused_before_anything_is_read(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint()
    with pytest.raises(UserError, match=r"(?s)'q_porj'.*did you mean q_proj"):
        load_model(checkpoint, rank=4, targets=["v_proj", "q_porj"])
    assert not checkpoint.reads


def test_all_that_does_not_fit_is_named_at_once_and_nothing_is_read(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint()
    del checkpoint.shapes["model.layers.1.mlp.up_proj.weight"]
    checkpoint.shapes["model.layers.3.mlp.up_proj.weight"] = (128, 64)
    checkpoint.dtypes["model.layers.3.mlp.up_proj.weight"] = np.dtype(ml_dtypes.bfloat16)
    checkpoint.shapes["model.embed_tokens.weight"] = (100, 64)
    checkpoint.dtypes["model.layers.2.self_attn.k_proj.weight"] = np.dtype(np.float16)
    with pytest.raises(UserError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    assert "missing in memory: model.layers.1.mlp.up_proj.weight" in message
    assert "no place in the model: model.layers.3.mlp.up_proj.weight" in message
    assert "'model.embed_tokens.weight' of memory has shape (100, 64), expected (96, 64)" in message
    assert "'model.layers.2.self_attn.k_proj.weight' of memory is stored as float16" in message
    assert not checkpoint.reads


@pytest.mark.parametrize("quant_type", ["nf4", None])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"],
)
def test_weights_that_are_not_finite_are_refused(memory_checkpoint, name: str, quant_type: str | None) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[7] = np.nan if name.endswith("proj.weight") else np.inf
        return values

    checkpoint = memory_checkpoint()
    checkpoint.change[name] = spoil
    with pytest.raises(UserError, match=f"{name!r} of memory has values that are NaN"):
        load_model(checkpoint, quant_type=quant_type)
