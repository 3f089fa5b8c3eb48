"""A T5's folders and adapters in transformers, bitsandbytes and PEFT."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import convert as convert_door
from qlora_jax import export as export_door
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.models.loading import load_model

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
VERSIONS = {"1.1": {}, "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True}}


@pytest.fixture
def seed() -> int:
    """Drawn anew for each test; pytest shows it where the test fails."""
    drawn = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {drawn}")
    return drawn


def logits_of_torch(model, source, target) -> np.ndarray:
    import torch

    ids, decoder = (torch.from_numpy(np.asarray(array, np.int64)) for array in (source, target))
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=decoder).logits.numpy()


def trained(theirs, folder: Path, **settings):
    """`theirs` with PEFT's adapter of every linear, which does something; saved in `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model

    linears = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=linears, task_type="SEQ_2_SEQ_LM", **settings)
    model = get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("version", VERSIONS)
def test_a_converted_folder_in_transformers(make_tiny_t5, tmp_path: Path, seed: int, version: str) -> None:
    """It loads, with our values in each linear; and those values give our logits."""
    import bitsandbytes
    import torch
    from transformers import T5ForConditionalGeneration

    base, out = make_tiny_t5(tmp_path / "base", seed, **VERSIONS[version]), tmp_path / "out"
    assert convert_door.main([str(base), str(out)]) == 0
    theirs = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16, device_map="cpu")
    checkpoint, packed = open_checkpoint(out), 0
    plain = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    parameters = dict(plain.named_parameters())
    for name, module in theirs.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or f"{name}.weight" not in parameters:
            continue
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            packed += 1
            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            expected = torch.from_numpy(checkpoint.read(f"{name}.weight").astype(np.float32))
            assert torch.equal(weight.float(), expected), name
        parameters[f"{name}.weight"].data = weight.float()
    assert packed == (2 * 4 + 2 * 8) + 4 * (1 if version == "1.0" else 2)
    source, target = np.random.default_rng(seed).integers(2, 128, (2, 2, 20)).astype(np.int32)
    got = np.asarray(load_model(base, dtype=jnp.float32)(source, target))
    assert np.abs(got - logits_of_torch(plain, source, target)).max() < 1e-4


def test_a_merged_folder_in_transformers(make_tiny_t5, tmp_path: Path, seed: int) -> None:
    import torch
    from transformers import T5ForConditionalGeneration

    base, out = make_tiny_t5(tmp_path / "base", seed), tmp_path / "out"
    trained(T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    merging = ["--to", "merged", "--base", "original", "--model", str(base)]
    assert export_door.main([str(tmp_path / "adapter"), str(out), *merging]) == 0
    theirs = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    source, target = np.random.default_rng(seed).integers(2, 128, (2, 2, 20)).astype(np.int32)
    got = np.asarray(load_model(out, quant_type=None, dtype=jnp.float32)(source, target))
    assert np.abs(got - logits_of_torch(theirs, source, target)).max() < 1e-4


def test_dora_in_peft_and_here(make_tiny_t5, tmp_path: Path, seed: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    base = make_tiny_t5(tmp_path / "base", seed)
    theirs = trained(
        T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter", use_dora=True
    )
    source, target = np.random.default_rng(seed).integers(2, 128, (2, 2, 20)).astype(np.int32)
    model = load_adapter(load_model(base, quant_type=None, dtype=jnp.float32), tmp_path / "adapter")
    got = np.asarray(model(source, target))
    assert np.abs(got - logits_of_torch(theirs, source, target)).max() < 1e-3
    save_adapter(model, tmp_path / "again", base_model=str(base), base_sha256="0" * 64)
    again = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    written = logits_of_torch(PeftModel.from_pretrained(again, tmp_path / "again").eval(), source, target)
    assert np.abs(got - written).max() < 1e-3
