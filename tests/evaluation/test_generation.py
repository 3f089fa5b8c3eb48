"""generate: the compiled loop with its cache against reading everything anew for each token."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.evaluation import generation
from qlora_jax.evaluation.generation import generate
from qlora_jax.evaluation.sampling import Sampling
from qlora_jax.models.llama import Llama
from qlora_jax.models.loading import load_model

PROMPTS = [[5, 9, 200, 31, 7], [17], [250, 3, 3, 8, 99, 1, 40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Llama:
    return load_model(golden_dir / "interop" / "tiny_llama_bf16", dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits_at(graphdef, state, ids, position):
    return nnx.merge(graphdef, state)(ids)[0, position]


def continue_anew(model: Llama, prompt: list[int], number: int) -> list[int]:
    """Greedy, without a cache: the whole text through the model for each token."""
    text = list(prompt)
    for _ in range(number):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(_logits_at(*nnx.split(model), padded, len(text) - 1))))
    return text[len(prompt) :]


def test_greedy_equals_reading_everything_anew(model: Llama) -> None:
    expected = [continue_anew(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == 3
    assert generate(model, PROMPTS, max_new_tokens=12) == expected
    assert generate(model, PROMPTS[1:2], max_new_tokens=12) == expected[1:2]


def test_each_row_stops_at_its_own_stop_token(model: Llama) -> None:
    whole = generate(model, PROMPTS, max_new_tokens=12)
    stops = {whole[0][4], whole[2][0]}
    until = [next((i for i, token in enumerate(answer) if token in stops), 12) for answer in whole]
    assert until[2] == 0
    assert generate(model, PROMPTS, max_new_tokens=12, eos_ids=stops) == [
        answer[:n] for answer, n in zip(whole, until, strict=True)
    ]


def test_samples_follow_seed_and_temperature(model: Llama) -> None:
    sample = functools.partial(generate, model, max_new_tokens=20, sampling=Sampling(1.0))
    first = sample(PROMPTS, seed=0)
    assert first == sample(PROMPTS, seed=0)
    assert first != sample(PROMPTS, seed=1)
    assert first[:1] == sample(PROMPTS[:1], seed=0)
    assert all(0 <= token < 256 for answer in first for token in answer)
    # The colder, the closer to greedy.
    assert generate(model, PROMPTS, max_new_tokens=8, sampling=Sampling(1e-4)) == generate(
        model, PROMPTS, max_new_tokens=8
    )


def test_sampled_tokens_have_the_models_probabilities(model: Llama) -> None:
    logits = np.asarray(model(np.asarray([PROMPTS[0]], np.int32)))[0, -1] * 24
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    draws = generate(model, [PROMPTS[0]] * 2048, max_new_tokens=1, sampling=Sampling(1 / 24))
    counts = np.bincount([draw[0] for draw in draws], minlength=256) / 2048
    assert 0.5 * np.abs(counts - expected).sum() < 0.1  # total variation


def test_a_prompt_samples_by_its_number_whatever_the_batch(model: Llama) -> None:
    sample = functools.partial(generate, model, max_new_tokens=8, sampling=Sampling(1.0), seed=5)
    together = sample(PROMPTS)
    assert sample(PROMPTS[::-1], row_numbers=[2, 1, 0]) == together[::-1]
    assert [sample([prompt], row_numbers=[i])[0] for i, prompt in enumerate(PROMPTS)] == together


def test_a_penalty_over_prompt_and_answer_leaves_no_token_twice(model: Llama) -> None:
    """So large a penalty forbids what was seen; also in a batch, where padding must not count as seen."""
    sampling = Sampling(repetition_penalty=1e9)
    answers = generate(model, PROMPTS, max_new_tokens=24, sampling=sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(set(answer)) == 24
        assert not set(answer) & set(prompt)
    assert generate(model, PROMPTS[1:2], max_new_tokens=24, sampling=sampling) == answers[1:2]
    # Token 0 is what prompts are padded with: of two models that would write it first, neither is kept from it.
    biased = nnx.clone(model)
    head = biased.lm_head.weight
    state = model.hidden(jnp.asarray([PROMPTS[1]]))[0, -1]
    head.set_value(head.get_value().at[0].set((100 * state).astype(head.get_value().dtype)))
    assert generate(biased, PROMPTS[1:2], max_new_tokens=1, sampling=sampling) == [[0]]


def test_who_watches_sees_answers_grow_and_changes_nothing(model: Llama) -> None:
    looks: list[list[list[int]]] = []
    whole = generate(model, PROMPTS, max_new_tokens=40)
    before = generation._continue._cache_size()
    assert generate(model, PROMPTS, max_new_tokens=40, watch=lambda answers: looks.append(answers) or ()) == whole
    assert generation._continue._cache_size() == before
    assert len(looks) >= 4
    assert [len(answer) for answer in looks[0]] == [1, 1, 1]
    assert looks[-1] == whole
    for earlier, later in itertools.pairwise(looks):
        assert all(b[: len(a)] == a for a, b in zip(earlier, later, strict=True))


def test_who_watches_ends_rows(model: Llama) -> None:
    whole = generate(model, PROMPTS, max_new_tokens=40)
    looks = []

    def enough_of_row_0(answers):
        looks.append(answers)
        return [0] if len(answers[0]) >= 3 else []

    answers = generate(model, PROMPTS, max_new_tokens=40, watch=enough_of_row_0)
    assert answers[1:] == whole[1:]
    assert answers[0] == whole[0][: len(answers[0])]
    assert 3 <= len(answers[0]) < 40
    assert generate(model, PROMPTS, max_new_tokens=40, watch=lambda answers: range(3)) == [a[:1] for a in whole]


def test_a_16_bit_head_in_float32_multiplies_the_same_values(golden_dir: Path) -> None:
    model = load_model(golden_dir / "interop" / "tiny_llama_bf16", dtype=jnp.bfloat16)
    wide = generation._with_wide_head(model)
    h = model.hidden(jnp.asarray([PROMPTS[0]]))
    np.testing.assert_allclose(wide.head(h.astype(jnp.float32)), model.head(h), rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight.get_value().dtype == jnp.bfloat16


def test_prompts_of_many_lengths_share_one_program(model: Llama) -> None:
    generate(model, [[1, 2]], max_new_tokens=5)
    sizes = [program._cache_size() for program in (generation._begin, generation._continue)]
    for length in (1, 2, 17, 32):
        generate(model, [list(range(length))], max_new_tokens=length + 5, eos_ids=())
    assert [program._cache_size() for program in (generation._begin, generation._continue)] == sizes


def test_refusals(model: Llama) -> None:
    assert generate(model, [], max_new_tokens=3) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=3)
    with pytest.raises(UserError, match="vocabulary has 256"):
        generate(model, [[1, 256]], max_new_tokens=3)
    with pytest.raises(UserError, match="token -1"):
        generate(model, [[1, -1]], max_new_tokens=3)
    with pytest.raises(UserError, match=r"(?s)128 positions.*max_new_tokens=28"):
        generate(model, [[1] * 100], max_new_tokens=29)
    with pytest.raises(UserError, match="temperature"):
        generate(model, [[1]], max_new_tokens=3, sampling=Sampling(-1.0))
    with pytest.raises(UserError, match="max_new_tokens=0"):
        generate(model, [[1]], max_new_tokens=0)
