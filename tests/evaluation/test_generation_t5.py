"""generate with a T5: the source once, then a cache, against reading everything anew for each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.evaluation.generation import generate
from qlora_jax.evaluation.sampling import Sampling
from qlora_jax.models.loading import load_model

SOURCES = [[5, 9, 100, 31, 7, 1], [17, 1], [50, 3, 3, 8, 99, 2, 40, 41, 42, 43, 44, 45, 1]]
VERSIONS = {"1.1": {}, "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True}}


@pytest.fixture(scope="module", params=VERSIONS)
def model(request, make_tiny_t5, tmp_path_factory):
    folder = make_tiny_t5(tmp_path_factory.mktemp("t5") / "model", decoder_start_token_id=2, **VERSIONS[request.param])
    return load_model(folder, rank=2, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, source, source_segments, target):
    return nnx.merge(graphdef, state)(source, target, segment_ids=source_segments)


def anew(model, source: list[int], number: int) -> list[int]:
    """Greedy, without a cache: source and target through the model for each token; the source is padded at its end."""
    padded, segments = np.zeros((2, 1, 16), np.int32)
    padded[0, : len(source)], segments[0, : len(source)] = source, 1
    target = [model.config.decoder_start_token_id]
    for _ in range(number):
        read = np.zeros((1, 16), np.int32)
        read[0, : len(target)] = target
        logits = _logits(*nnx.split(model), padded, segments, read)
        target.append(int(np.argmax(logits[0, len(target) - 1])))
    return target[1:]


def test_greedy_equals_reading_everything_anew(model) -> None:
    expected = [anew(model, source, 12) for source in SOURCES]
    assert len({tuple(answer) for answer in expected}) == 3
    assert generate(model, SOURCES, max_new_tokens=12) == expected
    assert generate(model, SOURCES[1:2], max_new_tokens=12) == expected[1:2]
    stop = expected[0][4]
    until = [answer.index(stop) if stop in answer else 12 for answer in expected]
    stopped = generate(model, SOURCES, max_new_tokens=12, eos_ids={stop})
    assert stopped == [answer[:n] for answer, n in zip(expected, until, strict=True)]


def test_a_penalty_knows_the_target_alone(model) -> None:
    """One this large forbids to repeat; were the source in it, its tokens would be forbidden too."""
    first = generate(model, SOURCES, max_new_tokens=12)
    sources = [[*source[:-1], answer[0], 1] for source, answer in zip(SOURCES, first, strict=True)]
    first = generate(model, sources, max_new_tokens=12)
    varied = generate(model, sources, max_new_tokens=12, sampling=Sampling(repetition_penalty=1e9))
    assert all(len(set(answer)) == 12 for answer in varied)
    assert [answer[0] for answer in varied] == [answer[0] for answer in first]
    assert any(answer[0] in source for answer, source in zip(first, sources, strict=True))


def test_what_is_no_source(model) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(model, [[5], []], max_new_tokens=2)
    with pytest.raises(UserError, match="prompt 0 has token 128"):
        generate(model, [[128]], max_new_tokens=2)
