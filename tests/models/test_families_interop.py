"""Every decoder family against transformers, bitsandbytes and PEFT: tiny random models, another seed each time."""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.conversion import convert, write_dense
from qlora_jax.checkpoints.merging import MergedCheckpoint, adapter_for
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.evaluation.generation import generate
from qlora_jax.models.loading import load_model

from .decoders import FAMILIES, GGUF, VARIANTS, read_in_torch, save_random_decoder, torch_logits, write_gguf

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT calls what transformers will remove
]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_family = pytest.mark.parametrize("variant", FAMILIES)


@pytest.fixture
def seed() -> int:
    """Drawn anew for each test; pytest shows it where the test fails."""
    drawn = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {drawn}")
    return drawn


def random_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 160, size=shape).astype(np.int32)


def ours(model, ids, **kwargs) -> np.ndarray:
    return np.asarray(_run(*nnx.split(model), jnp.asarray(ids), kwargs))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, ids, kwargs):
    return nnx.merge(graph, state)(ids, **kwargs)


def dequantized_by_bitsandbytes(folder: Path, dense):
    """A torch model whose linears get the values that bitsandbytes decodes from a 4-bit folder."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    count = 0
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            decoded = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(decoded.to(torch.float32))
            count += 1
    return dense, count


def adapted(model, seed: int):
    """Random values in A and B, of a size that moves the logits."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.LoRAParam):
            leaf.set_value(jnp.asarray(0.1 * rng.normal(size=leaf.get_value().shape), jnp.float32))
    return model


@every_variant
def test_logits_of_padded_packed_and_cached_rows(tmp_path: Path, variant: str, seed: int) -> None:
    theirs = save_random_decoder(tmp_path, seed, variant)
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    ids = random_ids(seed, 2, 80)
    assert np.abs(torch_logits(theirs, ids)).max() > 1
    mask = np.ones_like(ids)
    mask[1, :30] = 0
    padded = ours(model, ids, segment_ids=mask)
    assert np.abs(padded - torch_logits(theirs, ids, mask))[mask == 1].max() <= 1e-4

    segments = np.repeat([[1, 2, 0], [1, 2, 3]], [33, 40, 7], axis=1).astype(np.int32)
    packed = ours(model, ids, segment_ids=segments)
    for segment in (1, 2):
        own = ids[:, segments[0] == segment]
        assert np.abs(packed[:, segments[0] == segment] - torch_logits(theirs, own)).max() <= 1e-4

    def by_parts(state):
        model = nnx.merge(graph, state)
        cache, parts = model.init_cache(2, 96), []
        for start, stop in ((0, 70), (70, 72), (72, 80)):
            given = {"segment_ids": mask[:, start:stop]} if start == 0 else {}
            logits, cache = model(ids[:, start:stop], cache=cache, **given)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    graph, state = nnx.split(model)
    np.testing.assert_allclose(jax.jit(by_parts)(state), padded, atol=5e-5)


@every_family
def test_greedy_answers_are_transformers(tmp_path: Path, variant: str, seed: int) -> None:
    """The same tokens, or different ones from a near-tie of transformers' two best logits (< 1e-3) on."""
    import torch

    theirs = save_random_decoder(tmp_path, seed, variant)
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    prompts = [random_ids(seed + length, length).tolist() for length in (4, 30)]
    for prompt, answer in zip(prompts, generate(model, prompts, max_new_tokens=20), strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        expected = made.sequences[0, len(prompt) :].tolist()
        for step, (got, wanted) in enumerate(zip(answer, expected, strict=True)):
            if got != wanted:
                best = torch.topk(made.logits[step][0], 2).values
                assert best[0] - best[1] < 1e-3, (step, answer, expected)
                break


@every_family
def test_4_bit_folders_both_ways(tmp_path: Path, variant: str, seed: int) -> None:
    """The folder that transformers quantizes, here; and ours there: logits over the weights bitsandbytes decodes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense = save_random_decoder(tmp_path / "base", seed, variant)
    ids = random_ids(seed, 2, 40)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(tmp_path / "theirs")
    convert(open_checkpoint(tmp_path / "base"), tmp_path / "ours", shard_bytes=100_000)
    quantized_here = load_model(tmp_path / "base", dtype=jnp.float32)
    for folder in ("theirs", "ours"):
        model = load_model(tmp_path / folder, dtype=jnp.float32)
        decoded, count = dequantized_by_bitsandbytes(tmp_path / folder, dense)
        assert count == len(model.config.block_linears()) * model.config.num_hidden_layers
        expected = torch_logits(decoded, ids)
        assert np.abs(ours(model, ids) - expected).max() <= 1e-3
    assert np.abs(ours(quantized_here, ids) - expected).max() <= 1e-3


@every_family
def test_adapters_both_ways_and_merged(tmp_path: Path, variant: str, seed: int) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    theirs = save_random_decoder(tmp_path / "base", seed, variant)
    ids = random_ids(seed, 2, 40)  # without a mask
    model = load_model(tmp_path / "base", quant_type=None, rank=4, alpha=10.0, dtype=jnp.float32)
    plain = ours(adapted(model, seed), ids)
    assert np.abs(plain - torch_logits(theirs, ids)).max() > 0.1
    save_adapter(model, tmp_path / "ours", base_model=str(tmp_path / "base"), base_sha256="ab")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about keys that it misses or does not know
        there = PeftModel.from_pretrained(read_in_torch(tmp_path / "base"), str(tmp_path / "ours"))
    assert np.abs(torch_logits(there, ids) - plain).max() <= 1e-3

    made = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM"))  # PEFT's own targets
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    made.save_pretrained(tmp_path / "theirs")
    here = load_adapter(load_model(tmp_path / "base", quant_type=None, dtype=jnp.float32), tmp_path / "theirs")
    assert np.abs(ours(here, ids) - torch_logits(made, ids)).max() <= 1e-3

    checkpoint = open_checkpoint(tmp_path / "base")
    adapter = adapter_for(checkpoint, tmp_path / "ours")
    write_dense(MergedCheckpoint(checkpoint, adapter, dtype="float32"), tmp_path / "merged", shard_bytes=200_000)
    assert np.abs(torch_logits(read_in_torch(tmp_path / "merged"), ids) - plain).max() <= 1e-3


@pytest.mark.parametrize("variant", GGUF)
def test_a_gguf_file_of_the_same_model(tmp_path: Path, variant: str, seed: int) -> None:
    """Written as llama.cpp's converter does it; also converted to 4 bits, and that folder read by transformers."""
    from transformers import AutoModelForCausalLM

    theirs = save_random_decoder(tmp_path / "base", seed, variant)
    checkpoint, ids = open_checkpoint(tmp_path / "base"), random_ids(seed, 2, 40)
    tensors = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.names()}
    write_gguf(tmp_path / "model.gguf", GGUF[variant], checkpoint.config, tensors)
    model = load_model(tmp_path / "model.gguf", quant_type=None, dtype=jnp.float32)
    assert np.abs(ours(model, ids) - torch_logits(theirs, ids)).max() <= 1e-4

    write_dense(open_checkpoint(tmp_path / "model.gguf"), tmp_path / "dense")
    assert np.abs(torch_logits(read_in_torch(tmp_path / "dense"), ids) - torch_logits(theirs, ids)).max() <= 1e-4
    convert(open_checkpoint(tmp_path / "model.gguf"), tmp_path / "4bit")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "4bit", device_map="cpu").is_loaded_in_4bit
