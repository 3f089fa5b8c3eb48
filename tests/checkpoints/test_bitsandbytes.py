"""Folders that bitsandbytes quantized: their bytes, their values, and what is refused."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.digest import sha256_of
from qlora_jax.errors import UserError
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import NF4Tensor, dequantize, quantize, use_layout
from qlora_jax.nf4.codebook import CODEBOOKS, DYNAMIC_MAP

UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def folder(golden_dir: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny LLaMA that transformers saved with bitsandbytes' NF4 and double quantization."""
    return Path(shutil.copytree(golden_dir / "interop" / "tiny_llama_bnb4", tmp_path / "model"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_quantization(folder: Path, edit) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = edit(config["quantization_config"])
    file.unlink()
    file.write_text(json.dumps(config))
    return folder


def as_json(state: dict) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8).copy()


def state_of(tensors: dict, name: str = STATE) -> dict:
    return json.loads(tensors[name].tobytes())


def store(tensors: dict, name: str, weight: np.ndarray, quant_type: str, block_size: int = 64) -> None:
    """Puts a weight `[out, in]` under `name` as bitsandbytes stores it without double quantization."""
    drop(tensors, name)
    w = quantize(jnp.asarray(weight).T, quant_type, block_size, double_quant=False)
    tensors[name] = np.asarray(w.packed).reshape(-1, 1)
    tensors[f"{name}.absmax"] = np.asarray(w.absmax).reshape(-1)
    tensors[f"{name}.quant_map"] = CODEBOOKS[quant_type].values
    state = {"quant_type": quant_type, "blocksize": block_size, "dtype": str(weight.dtype), "shape": weight.shape}
    tensors[f"{name}.quant_state.bitsandbytes__{quant_type}"] = as_json(state)


def drop(tensors: dict, name: str) -> None:
    for key in [key for key in tensors if key == name or key.startswith(f"{name}.")]:
        del tensors[key]


def linear(model, name: str):
    return functools.reduce(getattr, name.split("."), model.layers)


def run(model, ids) -> np.ndarray:
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids))


def assert_stored_bytes(model, tensors: dict) -> None:
    for name in BLOCK_LINEARS:
        stack = linear(model, name).kernel.get_value()
        for layer in range(2):
            prefix = f"model.layers.{layer}.{name}.weight"
            np.testing.assert_array_equal(np.ravel(stack.packed[layer]), tensors[prefix].view(np.uint8).reshape(-1))
            np.testing.assert_array_equal(np.ravel(stack.absmax[layer]), tensors[f"{prefix}.absmax"])
            if stack.absmax_scale is not None:
                np.testing.assert_array_equal(stack.absmax_scale[layer], tensors[f"{prefix}.nested_absmax"])
                offset = state_of(tensors, f"{prefix}.quant_state.bitsandbytes__nf4")["nested_offset"]
                assert stack.absmax_offset[layer] == np.float32(offset)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stored_bytes_and_golden_logits(golden_dir, folder, dtype):
    """The golden logits were computed in bfloat16: a float32 forward lies within 5e-3 (tests/golden/README.md)."""
    model = load_model(folder, dtype=dtype)
    assert_stored_bytes(model, tensors_of(folder))
    golden = np.load(golden_dir / "interop" / "tiny_llama_logits.npz")
    difference = run(model, golden["ids"].astype(np.int32)) - golden["logits_base"]
    assert np.abs(difference).max() < (5e-3 if dtype == jnp.float32 else 1e-2)
    assert np.sqrt(np.mean(difference**2)) < 2e-3


def test_names_shapes_and_dtypes_are_those_of_the_dense_model(golden_dir, folder):
    plain, packed = open_checkpoint(golden_dir / "interop" / "tiny_llama_bf16"), open_checkpoint(folder)
    assert sorted(packed.names()) == sorted(plain.names())
    for name in plain.names():
        assert (packed.shape(name), packed.dtype(name)) == (plain.shape(name), plain.dtype(name))
        read = packed.read(name)
        assert (read.shape, read.dtype) == (plain.shape(name), plain.dtype(name))
        assert np.linalg.norm((read - plain.read(name)).astype(np.float32)) < 0.15 * np.linalg.norm(
            plain.read(name).astype(np.float32)
        )
    assert packed.fingerprint() == sha256_of([folder / "model.safetensors"])


@pytest.mark.parametrize("storage", [ml_dtypes.bfloat16, np.float16, np.float32, np.int8])
def test_quant_storage_is_only_another_view_of_the_bytes(folder, storage):
    expected = load_model(folder)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        tensors[name] = tensors[name].reshape(-1).view(storage).reshape(-1, 1)
    model = load_model(rewrite(folder, tensors))
    for left, right in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(expected)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("quant_type", "block_size"), [("fp4", 64), ("nf4", 128), ("nf4", 64)])
def test_fp4_other_block_sizes_and_plain_scales(golden_dir, folder, quant_type, block_size):
    plain = open_checkpoint(golden_dir / "interop" / "tiny_llama_bf16")
    tensors = tensors_of(folder)
    for name in plain.names():
        if f"{name}.absmax" in tensors:
            store(tensors, name, plain.read(name), quant_type, block_size)
    model = load_model(rewrite(folder, tensors))  # blocks of 128 straddle the rows of 192
    assert_stored_bytes(model, tensors)
    kernel = linear(model, "mlp.up_proj").kernel.get_value()
    assert (kernel.quant_type, kernel.block_size, kernel.absmax_scale) == (quant_type, block_size, None)
    expected = load_model(
        golden_dir / "interop" / "tiny_llama_bf16", quant_type=quant_type, block_size=block_size, double_quant=False
    )
    ids = np.arange(3, 35, dtype=np.int32)[None]
    np.testing.assert_array_equal(run(model, ids), run(expected, ids))


def test_skipped_modules_stay_dense(golden_dir, folder):
    plain = open_checkpoint(golden_dir / "interop" / "tiny_llama_bf16")
    tensors, before = tensors_of(folder), load_model(folder)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        drop(tensors, name)
        tensors[name] = plain.read(name)
    drop(tensors, UP)
    tensors[UP] = plain.read(UP)
    edit_quantization(folder, lambda config: config | {"llm_int8_skip_modules": "null"})
    model = load_model(rewrite(folder, tensors))
    dense = linear(model, "self_attn.v_proj").kernel.get_value()
    np.testing.assert_array_equal(dense[1], plain.read("model.layers.1.self_attn.v_proj.weight").T)
    # In 4 bits in one layer of two: dense in both, with the values that the bytes stand for.
    mixed = linear(model, "mlp.up_proj").kernel.get_value()
    np.testing.assert_array_equal(mixed[0], plain.read(UP).T)
    np.testing.assert_array_equal(mixed[1], dequantize(linear(before, "mlp.up_proj").kernel.get_value())[1])
    assert isinstance(linear(model, "mlp.gate_proj").kernel.get_value(), NF4Tensor)


def test_another_map_of_scales_is_decoded_with_that_map(folder):
    """On some processors bitsandbytes computes a map that differs from ours in a last bit."""
    tensors = tensors_of(folder)
    other = np.nextafter(DYNAMIC_MAP, np.float32(2))
    for name in [name for name in tensors if name.endswith(".nested_quant_map")]:
        tensors[name] = other
    kernel = linear(load_model(rewrite(folder, tensors)), "mlp.up_proj").kernel.get_value()
    assert kernel.absmax_scale is None
    groups = np.arange(tensors[f"{UP}.absmax"].size) // 256
    scales = other[tensors[f"{UP}.absmax"]] * tensors[f"{UP}.nested_absmax"][groups]
    expected = scales + np.float32(state_of(tensors)["nested_offset"])
    np.testing.assert_array_equal(np.ravel(kernel.absmax[0]), expected)


def test_layout_of_the_kernels(folder):
    rows = load_model(folder)
    with use_layout("fragments"):
        model = load_model(folder)
    left, right = (linear(m, "mlp.up_proj").kernel.get_value() for m in (model, rows))
    assert (left.layout, right.layout) == ("fragments", "rows")
    np.testing.assert_array_equal(left.to_layout("rows").packed, right.packed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: {"load_in_4bit": True},
        lambda config: {key: value for key, value in config.items() if not key.startswith("_")},
        lambda config: {"_load_in_4bit": True, "quant_method": "bitsandbytes"},
        lambda config: config | {"bnb_4bit_quant_type": "fp4"},  # each tensor says what it is
    ],
)
def test_configs_of_other_versions(folder, edit):
    assert_stored_bytes(load_model(edit_quantization(folder, edit)), tensors_of(folder))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes, 8 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"bits": 4}, "unknown"),
        ("nf4", "'nf4'"),
    ],
)
def test_other_quantizations_are_refused_by_name(folder, config, named):
    with pytest.raises(UserError, match=f"method that is not read: {named}"):
        open_checkpoint(edit_quantization(folder, lambda _: config))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quant_type": None}, "quant.type=none .*quantized otherwise.*fix: quant.type=nf4"),
        ({"quant_type": "int4"}, "quant.type=int4 .*fix: quant.type=nf4"),
        ({"block_size": 128}, "quant.block_size=128 .*fix: quant.block_size=64"),
        ({"double_quant": False, "block_size": 32}, "quant.block_size=32.*quant.double_quant=false"),
    ],
)
def test_settings_that_contradict_the_bytes(folder, arguments, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        load_model(folder, **arguments)


def change(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def remove(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def state(**changes):
    return change(STATE, lambda raw: as_json(json.loads(raw.tobytes()) | changes))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (remove(f"{UP}.absmax"), "absmax' is missing"),
        (remove(f"{UP}.quant_map"), "quant_map' is missing"),
        (remove(f"{UP}.nested_absmax"), "nested_absmax' is missing"),
        (remove(UP), "missing"),
        (remove(STATE), "stored as uint8, without a quant_state"),
        (change(UP, lambda w: w[:-1]), "12287 bytes.*12288 hold .192, 128."),
        (change(f"{UP}.absmax", lambda a: a[:-1]), r"absmax of uint8\[383\], not uint8\[384\]"),
        (change(f"{UP}.absmax", lambda a: a.astype(np.float32)), r"absmax of float32\[384\], not uint8"),
        (
            change(f"{UP}.nested_absmax", lambda a: a.astype(ml_dtypes.bfloat16)),
            "bfloat16.*after an evaluation on a CPU",
        ),
        (change(f"{UP}.quant_map", lambda m: m[::-1].copy()), "quant_map is not nf4's"),
        (change(f"{UP}.nested_absmax", lambda a: a * np.nan), "NaN or infinite"),
        (change(STATE, lambda raw: raw[:-5]), "not as bitsandbytes writes it.*JSONDecodeError"),
        (state(quant_type="nf5"), "quant_type='nf5' in its quant_state.*nf4"),
        (state(quant_type="fp4"), "quant_type='fp4' in its quant_state.*nf4"),
        (state(blocksize=48), "blocksize=48"),
        (state(dtype="int8"), "dtype='int8'"),
        (state(nested_blocksize=128), "nested_blocksize=128.*256"),
        (state(nested_offset=None), "nested_offset=None"),
        (state(shape=[192, 128, 1]), r"shape=\(192, 128, 1\)"),
        (state(shape=[128, 192]), r"shape \(128, 192\), expected \(192, 128\)"),
        (lambda tensors: tensors.update({f"{UP}.surplus": np.zeros(1, np.float32)}), "surplus"),
    ],
)
def test_damaged_tensors_are_refused(folder, edit, words):
    tensors = tensors_of(folder)
    edit(tensors)
    with pytest.raises(UserError, match=f"(?s)(mlp.up_proj|tensor).*{words}"):
        load_model(rewrite(folder, tensors))


def test_unknown_kinds_and_folders_without_4_bits(golden_dir, folder):
    tensors = tensors_of(folder)
    tensors[STATE.replace("nf4", "int8")] = tensors.pop(STATE)
    with pytest.raises(UserError, match=r"up_proj.*of type 'int8'"):
        open_checkpoint(rewrite(folder, tensors))
    rewrite(folder, load_file(golden_dir / "interop" / "tiny_llama_bf16" / "model.safetensors"))
    with pytest.raises(UserError, match="no tensor in 4 bits"):
        open_checkpoint(folder)


def test_a_plain_config_does_not_make_sense_of_the_bytes(folder):
    edit_quantization(folder, lambda _: None)
    with pytest.raises(UserError, match="U8"):
        open_checkpoint(folder)
