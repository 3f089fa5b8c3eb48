"""The training step: one result however rows are divided, exact losses, nothing applied that is not finite."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import use_kernels
from qlora_jax.optim import host_kind_available, paged_jit
from qlora_jax.training.config import OptimSection
from qlora_jax.training.optimizer import learning_rate_schedule, make_optimizer
from qlora_jax.training.step import init_train_state, make_eval_step, make_train_step, split_model

ROWS, SEQ, VOCAB = 4, 24, 256
OPTIM = OptimSection(learning_rate=1e-2, warmup_steps=2, clip=0.5)
TINY = Path(__file__).parents[1] / "golden" / "interop" / "tiny_llama_bf16"

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
)


def tiny_split(dropout=0.0, remat=True, targets=None):
    """The tiny LLaMA in float32 activations, with adapters that do something (B not zero)."""
    model = load_model(TINY, rank=4, alpha=8.0, dropout=dropout, targets=targets, dtype=jnp.float32)
    model.remat = remat
    graphdef, adapters, frozen = split_model(model)
    leaves, treedef = jax.tree.flatten(adapters)
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(0.05 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return graphdef, treedef.unflatten(leaves), frozen


def rows(seed=0, lengths=(24, 9, 17, 12)):
    """One example per row with its own number of trained tokens, the rest padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, size=(ROWS, SEQ)).astype(np.int32)
    place = np.arange(SEQ)[None, :]
    real = place < np.asarray(lengths)[:, None]
    prompt = np.asarray([2, 8, 3, 5])[:, None]
    return {
        "input_ids": np.where(real, ids, 0).astype(np.int32),
        "positions": np.where(real, place, 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "loss_mask": real & (place >= prompt),
    }


def windows(batch, accumulation):
    return {key: value.reshape(accumulation, -1, SEQ) for key, value in batch.items()}


@functools.cache
def compiled_step(graphdef, optim, dropout_seed, kernels, micro_batches):
    """The optimizer and the step, which is kept: compiling is most of these tests' time."""
    schedule = learning_rate_schedule(optim, 10)
    optimizer = make_optimizer(optim, schedule)
    function = make_train_step(graphdef, optimizer, schedule, dropout_seed=dropout_seed)
    made = []

    def step(*arguments):
        if not made:
            made.append(paged_jit(function, *arguments, donate_argnums=0))
        return made[0](*arguments)

    return optimizer, step


def run(split, batches, *, optim=OPTIM, dropout_seed=None, kernels="ffi"):
    """Takes one step per window; returns the final state and each step's metrics."""
    graphdef, adapters, frozen = split
    optimizer, step = compiled_step(graphdef, optim, dropout_seed, kernels, len(batches[0]["input_ids"]))
    state = init_train_state(jax.tree.map(jnp.copy, adapters), optimizer)
    history = []
    with use_kernels(kernels):
        compilations.clear()
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            history.append(jax.device_get(metrics))
    assert len(compilations) <= 1, "batches of one shape compile once"
    return state, history


@functools.partial(jax.jit, static_argnums=0)
def dense_value_and_grad(graphdef, adapters, frozen, batch):
    def loss(adapters):
        model = nnx.merge(graphdef, adapters, frozen)
        logits = model(batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        log_p = jax.nn.log_softmax(logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, batch["input_ids"][:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(batch["loss_mask"][:, 1:], nll, 0)) / batch["loss_mask"].sum()

    return jax.value_and_grad(loss)(adapters)


def dense_loss(split, batch):
    """Mean loss over trained tokens, and its gradient, from the full logits, which the step never has."""
    return dense_value_and_grad(*split, batch)


def assert_same_course(one, other, rtol=1e-5):
    (state, history), (other_state, other_history) = one, other
    for metrics, other_metrics in zip(history, other_history, strict=True):
        np.testing.assert_allclose(metrics.loss, other_metrics.loss, rtol=rtol)
        np.testing.assert_allclose(metrics.grad_norm, other_metrics.grad_norm, rtol=10 * rtol)
        assert metrics.tokens == other_metrics.tokens
    # Adam divides a gradient by its own size: rounding of a gradient near 0 shows at the scale of the learning rate.
    leaves = zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other_state.trainable), strict=True)
    for leaf, other_leaf in leaves:
        assert np.linalg.norm(leaf - other_leaf) < 1e-3 * np.linalg.norm(leaf)


@pytest.fixture(scope="module")
def split():
    return tiny_split()


@pytest.fixture(scope="module")
def dropping():
    return tiny_split(dropout=0.3, targets=["v_proj"])


@pytest.fixture(scope="module")
def course(split):
    """Three steps of four rows in one micro-batch: what equivalent settings have to repeat."""
    return run(split, [windows(rows(seed), 1) for seed in range(3)])


def test_loss_and_gradient_norm_equal_the_dense_computation(split, course):
    loss, grads = dense_loss(split, rows(0))
    np.testing.assert_allclose(course[1][0].loss, loss, rtol=1e-5)
    np.testing.assert_allclose(course[1][0].grad_norm, optax.tree.norm(grads), rtol=1e-4)
    assert course[1][0].grad_norm > OPTIM.clip, "the norm is reported before clipping"
    assert course[1][0].tokens == rows(0)["loss_mask"].sum()


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(split, course, accumulation):
    assert_same_course(run(split, [windows(rows(seed), accumulation) for seed in range(3)]), course)


def test_a_mean_of_micro_batch_means_would_be_caught(split, course):
    """The rows have 22, 1, 14 and 7 trained tokens: averaging their means is another loss."""
    losses, counts = jax.jit(make_eval_step(split[0]))(split[1], split[2], rows(0))
    assert abs(np.mean(losses / counts) / course[1][0].loss - 1) > 1e-3


def test_rematerialization_changes_nothing(course):
    assert_same_course(run(tiny_split(remat=False), [windows(rows(seed), 1) for seed in range(3)]), course)


def test_kernels_agree(split, course):
    assert_same_course(run(split, [windows(rows(seed), 1) for seed in range(3)], kernels="xla"), course)


def test_unpaged_state_takes_the_same_course(split, course):
    unpaged = OPTIM.model_copy(update={"paged": False})
    assert_same_course(run(split, [windows(rows(seed), 1) for seed in range(3)], optim=unpaged), course)


@pytest.mark.skipif(not host_kind_available(), reason="this backend has no host memory kind")
def test_optimizer_state_stays_in_host_memory(course):
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(course[0].optimizer) if leaf.nbytes >= 4096}
    assert kinds == {"pinned_host"}


def test_packed_rows_have_the_loss_of_unpacked_ones(split):
    lengths = (6, 5, 7, 6)
    unpacked = rows(3, lengths)
    unpacked["loss_mask"] = unpacked["segment_ids"].astype(bool) & (np.arange(SEQ)[None, :] >= 2)
    packed = {
        key: np.concatenate([value[i, :n] for i, n in enumerate(lengths)])[None] for key, value in unpacked.items()
    }
    packed["segment_ids"] = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)[None]
    graphdef, adapters, frozen = split
    step = jax.jit(make_eval_step(graphdef))
    losses, counts = step(adapters, frozen, unpacked)
    packed_losses, packed_counts = step(adapters, frozen, packed)
    np.testing.assert_allclose(packed_losses.sum(), losses.sum(), rtol=1e-5)
    assert packed_counts.sum() == counts.sum() == sum(lengths) - 2 * len(lengths)


def test_evaluation_equals_the_dense_computation_and_has_no_dropout():
    split = tiny_split(dropout=0.5)
    losses, counts = jax.jit(make_eval_step(split[0]))(split[1], split[2], rows(0))
    np.testing.assert_allclose(losses.sum() / counts.sum(), dense_loss(split, rows(0))[0], rtol=1e-5)


class TestDropout:
    optim = OPTIM.model_copy(update={"learning_rate": 1e-30})  # the adapters stay what they are

    def losses(self, dropping, seed, skipped=()):
        """Losses of two steps over the same row in two micro-batches; those `skipped` have nothing to train."""
        batch = {key: np.repeat(value[:1], 2, axis=0).reshape(2, 1, SEQ) for key, value in rows(0).items()}
        for micro_batch in skipped:
            batch["loss_mask"][micro_batch] = False
        return [m.loss for m in run(dropping, [batch, batch], optim=self.optim, dropout_seed=seed)[1]]

    def test_follows_seed_and_step(self, dropping):
        first, second = self.losses(dropping, 0)
        assert first != second, "another mask at every step"
        assert self.losses(dropping, 0) == [first, second], "the same masks for the same seed"
        assert self.losses(dropping, 1)[0] != first

    def test_differs_between_micro_batches(self, dropping):
        first, second = (self.losses(dropping, 0, skipped=[other])[0] for other in (1, 0))
        assert abs(first / second - 1) > 1e-5


class TestNonFinite:
    def poisoned(self, split, token):
        """The model with an embedding of NaN for one token."""
        graphdef, adapters, frozen = split
        flat = nnx.to_flat_state(frozen)
        poisoned = []
        for path, variable in flat:
            if path == ("embed_tokens", "weight"):
                variable = variable.replace(variable.get_value().at[token].set(jnp.nan))
            poisoned.append((path, variable))
        return graphdef, adapters, nnx.from_flat_state(poisoned)

    def test_nothing_is_applied_and_the_row_is_named(self, split):
        good, bad = windows(rows(0), 2), windows(rows(1), 2)
        token = 255
        for batch in (good, bad):
            batch["input_ids"][batch["input_ids"] == token] = 1
        bad["input_ids"][1, 0, 3] = token
        poisoned = self.poisoned(split, token)
        state, (first, second, third) = run(poisoned, [good, bad, good])
        assert (first.applied, second.applied, third.applied) == (True, False, True)
        np.testing.assert_array_equal(second.finite_rows, [[True, True], [False, True]])
        without, (_, again) = run(poisoned, [good, good])
        assert third.loss == again.loss
        assert state.step == 2
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(without), strict=True):
            np.testing.assert_array_equal(leaf, other)

    def test_a_finite_loss_with_an_infinite_gradient_is_not_applied_either(self):
        class Root(nnx.Module):
            """States that are sqrt of an adapter at 0: value 0, slope infinite."""

            def __init__(self):
                self.adapter = nnx.LoRAParam(jnp.zeros(4))

            def hidden(self, input_ids, **_):
                return jnp.sqrt(jnp.broadcast_to(self.adapter.get_value(), (*input_ids.shape, 4)))

            def head(self, h):
                return h @ jnp.eye(4, VOCAB)

        state, (metrics,) = run(split_model(Root()), [windows(rows(0), 1)])
        assert np.isfinite(metrics.loss)
        assert not metrics.applied
        assert metrics.finite_rows.all()
        assert state.step == 0
        np.testing.assert_array_equal(state.trainable["adapter"].get_value(), np.zeros(4))


def test_window_without_trained_tokens_has_loss_zero(split):
    batch = windows(rows(0), 1)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    _, (metrics,) = run(split, [batch])
    assert (metrics.loss, metrics.grad_norm, metrics.tokens, metrics.applied) == (0, 0, 0, True)


def test_adapter_on_the_head_is_refused():
    class WithHead(nnx.Module):
        def __init__(self):
            self.lm_head = nnx.List([nnx.LoRAParam(jnp.zeros(3))])

    with pytest.raises(UserError, match="lm_head"):
        split_model(WithHead())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate_of_each_step(schedule, expected):
    optim = OptimSection(learning_rate=2e-4, schedule=schedule, warmup_steps=4)
    rates = learning_rate_schedule(optim, total_steps=8)
    np.testing.assert_allclose([rates(taken) for taken in range(8)], 2e-4 * np.asarray(expected), rtol=1e-5)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert learning_rate_schedule(OptimSection(learning_rate=1.0, warmup_steps=0), 3)(0) == 1.0


def test_reported_learning_rate_is_the_one_applied(split):
    """Without decay, Adam's first update of every entry is the learning rate, whatever its gradient (eps aside)."""
    state, (metrics,) = run(split, [windows(rows(0), 1)])
    np.testing.assert_allclose(metrics.learning_rate, 5e-3, rtol=1e-6)
    moved = np.abs(jax.tree.leaves(state.trainable)[0] - jax.tree.leaves(split[1])[0])
    np.testing.assert_allclose(np.median(moved), metrics.learning_rate, rtol=1e-3)
