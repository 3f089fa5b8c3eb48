"""LLaMA's logits, masks, cache, gradients and dropout."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.errors import UserError
from qlora_jax.models.attention import visible
from qlora_jax.models.llama import Llama
from qlora_jax.models.loading import load_model


@pytest.fixture(scope="module")
def model(memory_checkpoint) -> Llama:
    """float32, 4-bit, grouped heads, untied, with adapters that do something."""
    model = load_model(memory_checkpoint(), rank=4, dropout=0.5, dtype=jnp.float32)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            module = model
            for name in path[:-1]:
                module = getattr(module, name)
            values = np.random.default_rng(len(path[-2])).normal(scale=0.05, size=leaf.get_value().shape)
            module.lora_b.set_value(jnp.asarray(values, jnp.float32))
    return model


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, size=shape).astype(np.int32)


def run(model: Llama, ids, **kwargs) -> np.ndarray:
    return np.asarray(_run(*nnx.split(model), ids, kwargs))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, ids, kwargs):
    return nnx.merge(graphdef, state)(ids, **kwargs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_golden_logits_of_base_and_adapter(golden_dir: Path, dtype) -> None:
    """Logits that transformers, bitsandbytes and PEFT computed in bf16 (tests/golden/README.md, section 4)."""
    golden = np.load(golden_dir / "interop" / "tiny_llama_logits.npz")
    model = load_model(golden_dir / "interop" / "tiny_llama_bf16", dtype=dtype)
    for name in ("logits_base", "logits_adapter"):
        if name == "logits_adapter":
            load_adapter(model, golden_dir / "interop" / "adapter_all_linear")
        logits = run(model, golden["ids"].astype(np.int32))
        assert logits.dtype == np.float32
        difference = logits - golden[name]
        assert np.abs(difference).max() < 1e-2
        assert np.sqrt(np.mean(difference**2)) < 3e-3
    assert np.abs(golden["logits_adapter"] - golden["logits_base"]).max() > 0.1


def test_packed_logits_equal_unpacked_ones(model: Llama) -> None:
    """Design table: packed against unpacked logits, 1e-5 relative in float32."""
    lengths = [5, 9, 2, 4]
    examples = [random_ids(20)[i : i + n] for i, n in enumerate(lengths)]
    packed, segments = np.zeros((2, 1, 24), np.int32)
    packed[0, :20] = np.concatenate(examples)
    segments[0, :20] = np.repeat([1, 2, 3, 4], lengths)
    together = run(model, packed, segment_ids=segments)
    assert np.isfinite(together).all()
    alone, start = [], 0
    for example in examples:
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(example)] = example
        alone.append(run(model, padded)[0, : len(example)])
        start += len(example)
    alone = np.concatenate(alone)
    assert np.linalg.norm(together[0, :20] - alone) / np.linalg.norm(alone) < 1e-5
    # Without the mask examples see each other.
    assert np.linalg.norm(run(model, packed)[0, :20] - alone) / np.linalg.norm(alone) > 1e-2


def test_positions_restart_in_each_segment_unless_given(model: Llama) -> None:
    ids = random_ids(1, 24)
    segments = np.repeat([1, 2, 0], [10, 9, 5])[None].astype(np.int32)
    positions = np.concatenate([np.arange(10), np.arange(9), np.arange(5)])[None].astype(np.int32)
    implied = run(model, ids, segment_ids=segments)
    np.testing.assert_array_equal(implied, run(model, ids, segment_ids=segments, positions=positions))
    stretched = run(model, ids, segment_ids=segments, positions=2 * positions)
    assert np.abs(implied - stretched).max() > 1e-2


def test_every_query_sees_itself_and_nothing_later_or_foreign() -> None:
    segments = jnp.asarray([[1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1]])
    mask = np.asarray(visible(segments, segments))
    for b in range(2):
        for t in range(6):
            for s in range(6):
                assert mask[b, t, s] == (s <= t and segments[b, t] == segments[b, s])
    np.testing.assert_array_equal(visible(segments[:, 4:], segments, offset=4), mask[:, 4:])


def test_cached_states_equal_those_without_a_cache(model: Llama) -> None:
    """Prompt, then two tokens, then one: as if all had been read at once. One row is padded on the left."""
    ids = random_ids(2, 11)
    segments = np.ones((2, 11), np.int32)
    segments[1, :3] = 0
    graphdef, state = nnx.split(model)

    @jax.jit
    def by_parts(state):
        model = nnx.merge(graphdef, state)
        cache, parts = model.init_cache(2, 16), []
        for start, stop in ((0, 8), (8, 10), (10, 11)):
            given = {"segment_ids": segments[:, start:stop]} if start == 0 else {}
            logits, cache = model(ids[:, start:stop], cache=cache, **given)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1), cache

    logits, cache = by_parts(state)
    np.testing.assert_allclose(logits, run(model, ids, segment_ids=segments), atol=2e-5)
    assert int(cache.length) == 11
    assert cache.keys.shape == (3, 2, 16, 2, 16)
    with pytest.raises(UserError, match="cache"):
        model.hidden(ids, cache=cache, rngs=jax.random.key(0))


def gradients(model: Llama, ids, segments, key=None) -> dict:
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(adapters, frozen):
        def loss(adapters):
            model = nnx.merge(graphdef, adapters, frozen)
            h = model.hidden(ids, segment_ids=segments, rngs=key)
            return jnp.mean(jax.nn.log_softmax(model.head(h))[..., 3])

        return jax.grad(loss)(adapters)

    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(gradient(adapters, frozen))}


def test_gradients_are_the_same_with_and_without_remat(model: Llama) -> None:
    ids = random_ids(2, 12)
    segments = np.repeat([1, 2, 0], [5, 4, 3])[None].repeat(2, axis=0).astype(np.int32)
    key = jax.random.key(3)
    assert model.remat
    with_remat = gradients(model, ids, segments, key)
    try:
        model.remat = False
        without = gradients(model, ids, segments, key)
    finally:
        model.remat = True
    assert len(with_remat) == 14
    for path, gradient in with_remat.items():
        assert gradient.shape[0] == 3, path
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
        np.testing.assert_allclose(gradient, without[path], rtol=1e-4, atol=1e-7)


def test_gradient_of_the_head_is_that_of_the_product(model: Llama) -> None:
    h = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 64)), jnp.float32)
    table = model.lm_head.weight.get_value().astype(jnp.float32)
    got = jax.grad(lambda h: jnp.sum(jnp.sin(model.head(h))))(h)
    expected = jax.grad(lambda h: jnp.sum(jnp.sin(jnp.einsum("bsd,vd->bsv", h, table))))(h)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert jax.grad(lambda h: jnp.sum(model.head(h)))(h.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_follows_the_key(model: Llama) -> None:
    ids = random_ids(1, 12)
    plain, first = run(model, ids), run(model, ids, rngs=jax.random.key(0))
    np.testing.assert_array_equal(first, run(model, ids, rngs=jax.random.key(0)))
    assert np.abs(first - run(model, ids, rngs=jax.random.key(1))).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3


def test_activations_take_the_dtype_and_weights_keep_theirs(memory_checkpoint) -> None:
    model = load_model(memory_checkpoint(dtype=np.float16, tie_word_embeddings=True))
    h = model.hidden(random_ids(1, 4))
    assert h.dtype == jnp.bfloat16
    assert model.head(h).dtype == jnp.float32
    assert model.lm_head is None
    assert model.layers.mlp.up_proj.kernel.get_value().dtype == "float16"
    assert model.embed_tokens.weight.get_value().dtype == jnp.float16
    assert model.layers.input_layernorm.weight.get_value().dtype == jnp.float16
