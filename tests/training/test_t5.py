"""A T5 through the training door: source and target, packed or not, learned, stopped and gone on bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data.loader import Loader, eval_batches
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.training.preparation import marked_example, prepare
from qlora_jax.training.resume import dataset_sha256
from qlora_jax.training.step import make_eval_step, model_arrays, split_model

from .conftest import build, write_rows
from .test_resume import THOROUGH, assert_same_run, stop_after

V1_0 = {"feed_forward_proj": "relu", "tie_word_embeddings": True}


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, make_tiny_t5):
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "model")


@pytest.fixture
def settings(tiny_settings, tiny_t5):
    return tiny_settings | {"model.path": str(tiny_t5), "train.seq_len": 40, "train.target_len": 24}


@pytest.fixture
def train_t5(train, tiny_t5):
    """`train` on the T5."""
    own = {"model.path": str(tiny_t5), "train.seq_len": 40, "train.target_len": 24}
    return lambda on_step=None, **changes: train(on_step, **own | changes)


def test_it_learns_and_resumes_bit_for_bit(train_t5, tmp_path):
    settings = THOROUGH | {"optim.learning_rate": 0.02}
    whole, never_stopped, _ = train_t5(**settings, output_dir=str(tmp_path / "whole"))
    assert whole.last_eval_loss < 0.8 * whole.first_eval_loss
    train_t5(stop_after(2), **settings)
    _, folder, printed = train_t5(**settings, resume=True)
    assert "after step 2" in printed
    assert_same_run(folder, never_stopped, 6)


def test_other_sources_are_other_rows(settings, tmp_path):
    def digest(asked: str) -> str:
        path = str(write_rows(tmp_path / "rows.jsonl", [(asked, "yes")] * 3))
        return dataset_sha256(prepare(build(settings | {"data.path": path})).dataset)

    assert digest("ape") == digest("ape") != digest("bee")


@pytest.mark.parametrize("version", [{}, V1_0], ids=["1.1", "1.0"])
def test_losses_are_those_of_the_whole_logits_packed_or_not(settings, make_tiny_t5, tmp_path, version):
    folder = make_tiny_t5(tmp_path / "t5", **version)
    prepared = prepare(config := build(settings | {"model.path": str(folder)}))
    split = split_model(load_model(folder, rank=2, dtype=jnp.float32))
    lengths = {"seq_len": config.train.target_len, "source_len": config.train.seq_len}
    rows = prepared.dataset.train[:12]
    (alone,) = eval_batches(rows, batch_size=12, **lengths)
    packed = list(Loader(rows, batch_size=12, packing=True, seed=0, repeat=False, **lengths))
    assert sum(len(lines) > 1 for batch in packed for lines in batch["lines"]) > 1

    @jax.jit
    def whole_logits(adapters, frozen, source, source_segments, target):
        model = nnx.merge(split.graphdef, adapters, frozen)
        return model(source, target, segment_ids=source_segments)

    logits = whole_logits(*split[1:], *(alone[key] for key in ("source_ids", "source_segment_ids", "input_ids")))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(alone["input_ids"][:, 1:, None]), -1)
    expected = dict(zip((row.line for row in rows), -(chosen[..., 0] * alone["loss_mask"][:, 1:]).sum(1), strict=True))
    step = jax.jit(make_eval_step(split.graphdef))
    for batch in (alone, *packed):
        losses, counts = step(*split[1:], model_arrays(batch))
        wanted = [sum(float(expected[line]) for line in lines) for lines in batch["lines"]]
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)
        np.testing.assert_array_equal(counts, batch["loss_mask"].sum(axis=1))


def test_the_plan_and_the_first_row(settings, tiny_t5):
    prepared = prepare(build(settings | {"train.target_len": None, "lora.targets": ["q", "v"]}))
    assert "(longer than train.seq_len=40 or train.target_len=10)" in prepared.plan
    # q and v: 2 layers of the encoder with one attention, 2 of the decoder with two.
    assert f"{6 * 2 * 4 * (64 + 64):,} trained in adapters" in prepared.plan
    adapters = split_model(load_model(tiny_t5, rank=4, targets=["q", "v"])).trainable
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 6 * 2 * 4 * (64 + 64)
    shown = marked_example(prepared.tokenizer, prepared.dataset.train[0], colour=False)
    assert shown == "ape x1</s>\n<pad>[[ape</s>]]"


def test_what_does_not_fit(settings, tiny_model):
    with pytest.raises(UserError, match=r"(?s)seq_len=3 and train.target_len=24 .*train.seq_len=8 train.target_len="):
        prepare(build(settings | {"train.seq_len": 3}))
    with pytest.raises(UserError, match=r"train.target_len=24, but .* is a decoder alone"):
        prepare(build(settings | {"model.path": str(tiny_model)}))
    with pytest.raises(UserError, match=r"lora.targets names q_proj, .*\n.*linears are k, o, q, v, wi_0, wi_1, wo"):
        prepare(build(settings | {"lora.targets": ["q_proj"]}))


def test_an_adapter_on_the_embedding_is_refused(tiny_t5):
    model = load_model(tiny_t5, rank=2)
    model.shared.lora_a = nnx.LoRAParam(jnp.ones(2))
    with pytest.raises(UserError, match=r"an adapter on shared"):
        split_model(model)
