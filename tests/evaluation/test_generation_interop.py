"""Greedy answers against transformers': the same tokens, or different first at a near-tie of its two best (< 1e-3)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint
from qlora_jax.evaluation.generation import generate
from qlora_jax.evaluation.sampling import Sampling
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.models.llama import Llama
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import dequantize

pytestmark = pytest.mark.interop


def dequantized_in_torch(checkpoint: Checkpoint, model: Llama):
    """transformers' LLaMA in float32 with the values that the model's 4-bit weights stand for."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).to(torch.float32).eval()
    state = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.names()}
    for linear in BLOCK_LINEARS:
        group, name = linear.split(".")
        kernels = dequantize(getattr(getattr(model.layers, group), name).kernel.get_value(), jnp.float32)
        for layer, kernel in enumerate(np.asarray(kernels)):
            state[f"model.layers.{layer}.{linear}.weight"] = np.ascontiguousarray(kernel.T)
    missing, unexpected = theirs.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.lm_head is None else [])
    theirs.tie_weights()
    return theirs


def first_gap(theirs, prompt: list[int], answer: list[int], max_new_tokens: int, eos_ids=(), **rules) -> float | None:
    """None where `answer` is transformers' greedy one; else the gap of its two best scores at the first difference."""
    import torch

    ids = torch.tensor([prompt])
    made = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **rules,
    )
    expected = made.sequences[0, len(prompt) :].tolist()
    expected = expected[:-1] if expected[-1] in eos_ids else expected
    if answer == expected:
        return None
    step = next(step for step in range(max_new_tokens) if answer[step : step + 1] != expected[step : step + 1])
    best = torch.topk(made.scores[step][0], 2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_models_answer_as_in_transformers(tmp_path: Path, tied: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(int(tied))
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=jnp.float32)
    theirs = dequantized_in_torch(open_checkpoint(tmp_path), model)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 200, size=length).tolist() for length in (3, 8, 21, 40)]
    answers = generate(model, prompts, max_new_tokens=24)
    gaps = [first_gap(theirs, prompt, answer, 24) for prompt, answer in zip(prompts, answers, strict=True)]
    assert all(gap is None or gap < 1e-3 for gap in gaps), gaps
    assert len({tuple(answer) for answer in answers}) == 4
    penalized = generate(model, prompts, max_new_tokens=24, sampling=Sampling(repetition_penalty=1.3))
    assert penalized != answers
    pairs = zip(prompts, penalized, strict=True)
    gaps = [first_gap(theirs, prompt, answer, 24, repetition_penalty=1.3) for prompt, answer in pairs]
    assert all(gap is None or gap < 1e-3 for gap in gaps), gaps


QUESTIONS = [
    "What is the capital of France?",
    "In one sentence, what does the Python function `os.path.join` do?",
    "Write a haiku about the sea.",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "What is 7 times 8?",
    "Give me a short recipe for pancakes.",
]


@pytest.mark.real
def test_smollm2_answers_as_in_transformers() -> None:
    from qlora_jax.data.formats import Message
    from qlora_jax.data.rendering import Renderer
    from qlora_jax.training.demo import fetch_demo_model

    checkpoint = open_checkpoint(fetch_demo_model())
    model = load_model(checkpoint, dtype=jnp.float32)
    renderer = Renderer(checkpoint.tokenizer())
    prompts = [renderer.prompt([Message("user", question)]) for question in QUESTIONS]
    answers = generate(model, prompts, max_new_tokens=32, eos_ids=renderer.stop_ids)
    theirs = dequantized_in_torch(checkpoint, model)
    pairs = zip(prompts, answers, strict=True)
    gaps = [first_gap(theirs, prompt, answer, 32, renderer.stop_ids) for prompt, answer in pairs]
    assert all(gap is None or gap < 1e-3 for gap in gaps), gaps
    text = [renderer.tokenizer.decode(answer) for answer in answers]
    assert "Paris" in text[0], text
