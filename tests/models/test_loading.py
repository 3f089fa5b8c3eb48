"""load_model: bytes, memory, and what it says about checkpoints that do not fit."""

import json
import subprocess
import sys
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
from qlora_jax.nf4 import quantize, use_kernels, use_layout
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


def test_pure_jax_loads_the_same_bytes(memory_checkpoint) -> None:
    checkpoint = memory_checkpoint(dtype=np.float32)
    compiled = load_model(checkpoint, quant_type="fp4")
    with use_kernels("xla"):
        pure = load_model(checkpoint, quant_type="fp4")
    for name in BLOCK_LINEARS:
        left, right = (linear(model, name).kernel.get_value() for model in (compiled, pure))
        assert jax.tree.structure(left) == jax.tree.structure(right)
        jax.tree.map(np.testing.assert_array_equal, left, right)


_LOAD = """
import sys
from pathlib import Path
import numpy as np
from qlora_jax.models.loading import load_model

def peak(path):
    Path("/proc/self/clear_refs").write_text("5")  # from here on
    model = load_model(path)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0]), 1024 * int(status["VmRSS"].split()[0])

peak(sys.argv[1])  # compiles
before = peak(sys.argv[1])[1]
print(peak(sys.argv[2])[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures a process as Linux does")
def test_resident_memory_is_the_quantized_model_and_one_tensor(memory_checkpoint, tmp_path: Path) -> None:
    """From a folder, whose tensors are mapped: what has been read of the file counts, too."""
    from safetensors.numpy import save_file

    widths = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 256}
    small, large = memory_checkpoint(), memory_checkpoint(**widths, num_hidden_layers=6)
    for folder, checkpoint in ((tmp_path / "small", small), (tmp_path / "large", large)):
        folder.mkdir()
        config = checkpoint.config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (folder / "config.json").write_text(json.dumps(config))
        zeros = {name: np.zeros(checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}
        save_file(zeros, folder / "model.safetensors")
    sizes = [int(np.prod(shape)) for shape in large.shapes.values()]
    code = [sys.executable, "-c", _LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    ran = subprocess.run(code, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    # 4.13 bits a weight and two tensors of 2 bytes a weight; and 12 MB for programs and what the allocator keeps.
    bound = 4.13 / 8 * sum(sizes) + 2 * 2 * max(sizes) + 12e6
    assert int(ran.stdout) < bound < 0.45 * 2 * sum(sizes)


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


def test_what_does_not_fit_is_named_with_the_nearest_name(memory_checkpoint) -> None:
    """All of it: what is alike in many layers is one entry."""
    checkpoint = memory_checkpoint(num_hidden_layers=6)
    for layer in range(6):
        prefix = f"model.layers.{layer}"
        checkpoint.shapes[f"{prefix}.mlp.up.weight"] = checkpoint.shapes.pop(f"{prefix}.mlp.up_proj.weight")
        checkpoint.shapes[f"{prefix}.input_layernorm.weight"] = (65,)
        checkpoint.dtypes[f"{prefix}.mlp.up.weight"] = np.dtype(ml_dtypes.bfloat16)
    for layer in (1, 4):
        checkpoint.shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (32, 64)
    with pytest.raises(UserError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    up = "model.layers.{6 layers}.mlp"
    assert f"6 tensors are missing in memory: {up}.up_proj.weight (nearest: model.layers.0.mlp.up.weight)" in message
    assert f"no place in the model: {up}.up.weight (nearest: model.layers.0.mlp.up_proj.weight)" in message
    assert (
        "tensors model.layers.{6 layers}.input_layernorm.weight of memory have shape (65,), expected (64,)" in message
    )
    assert "tensors model.layers.{1,4}.self_attn.o_proj.weight of memory have shape (32, 64)" in message


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
