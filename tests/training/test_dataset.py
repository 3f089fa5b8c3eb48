"""Reading, splitting and counting rows; what a run will hold, from headers alone."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.data.rendering import Example
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.dataset import check_vocabulary, load_dataset
from qlora_jax.training.plan import Epoch, describe_plan, measure_epoch, measure_model, planned_steps


class LengthRenderer:
    """A row renders to as many tokens as its answer says; the last one is trained."""

    def render(self, conversation):
        length = int(conversation.messages[-1].content)
        tokens = np.arange(length, dtype=np.int32)
        return Example(tokens, tokens == length - 1, conversation.line)


def write_rows(path: Path, lengths) -> str:
    path.write_text("".join(json.dumps({"prompt": "?", "response": str(length)}) + "\n" for length in lengths))
    return str(path)


def load(path: str, *, seq_len: int = 10, seed: int = 0, eval_rows: int | None = None, **data):
    config = TrainConfig(seed=seed, data={"path": path, **data}, train={"seq_len": seq_len}, eval={"rows": eval_rows})
    return load_dataset(config, LengthRenderer())


def test_long_rows_are_dropped_and_counted(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.jsonl", [3, 10, 11, 5, 12]), eval_split=0)
    assert [len(example.input_ids) for example in dataset.train] == [3, 10, 5]
    assert (dataset.train_too_long, dataset.eval_too_long) == (2, 0)
    assert (dataset.tokens, dataset.trained_tokens) == (18, 3)
    assert dataset.evaluation == dataset.held_out == []


def test_a_split_holds_each_row_once_and_depends_on_the_seed_alone(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", range(2, 42))

    def held(**settings):
        dataset = load(path, seq_len=100, **settings)
        train = {example.line for example in dataset.train}
        evaluation = [example.line for example in dataset.evaluation]
        assert train | set(evaluation) == set(range(1, 41))
        assert not train & set(evaluation)
        assert [conversation.line for conversation in dataset.held_out] == evaluation
        return evaluation

    assert len(held(eval_split=0.25)) == 10
    assert len(held(eval_split=7)) == 7
    assert len(held(eval_split=0.001)) == 1
    assert len(held()) == 2
    assert held(eval_split=7) == held(eval_split=7)
    assert held(eval_split=7) != held(eval_split=7, seed=1)


def test_a_file_of_held_out_rows_is_read_whole_and_cut_to_eval_rows(tmp_path):
    path, other = write_rows(tmp_path / "rows.jsonl", [3] * 4), write_rows(tmp_path / "held.jsonl", [4, 20, 5, 6])
    dataset = load(path, eval_path=other)
    assert len(dataset.train) == 4
    assert [len(example.input_ids) for example in dataset.evaluation] == [4, 5, 6]
    assert dataset.eval_too_long == 1
    cut = load(path, eval_path=other, eval_rows=2)
    assert [len(example.input_ids) for example in cut.evaluation] == [4, 5]
    assert [conversation.messages[-1].content for conversation in cut.held_out] == ["4", "5"]


@pytest.mark.parametrize(
    ("lengths", "settings", "named"),
    [
        ([11, 12, 13], {"eval_split": 0}, r"train.seq_len=10 leaves none of the 3 rows of .*rows.jsonl"),
        ([3, 4], {"eval_split": 2}, r"holds out 2 of the 2 rows"),
        ([3], {}, r"data.eval_split=0.05 holds out 1 of the 1 rows"),
    ],
)
def test_no_row_left_is_an_error(tmp_path, lengths, settings, named):
    with pytest.raises(UserError, match=named):
        load(write_rows(tmp_path / "rows.jsonl", lengths), **settings)


def test_no_held_out_row_left_is_an_error(tmp_path):
    path, other = write_rows(tmp_path / "rows.jsonl", [3] * 4), write_rows(tmp_path / "held.jsonl", [11, 15])
    with pytest.raises(UserError, match=r"held\.jsonl") as caught:
        load(path, eval_path=other)
    assert "11 to 15 tokens" in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "<pad>": 2})
    check_vocabulary(tokenizer, 3, "model")
    with pytest.raises(UserError, match=r"'<pad>' \(2\)"):
        check_vocabulary(tokenizer, 2, "model")


class Headers:
    """A checkpoint of two blocks that knows shapes only."""

    path = "somewhere"
    shapes = {  # noqa: RUF012
        "model.embed_tokens.weight": (50, 64),
        "model.norm.weight": (64,),
        **{
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(2)
            for name, shape in {
                "self_attn.q_proj": (64, 64),
                "mlp.up_proj": (96, 64),
                "input_layernorm": (64,),
            }.items()
        },
    }

    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return np.dtype(ml_dtypes.bfloat16)


def test_sizes_come_from_shapes():
    sizes = measure_model(Headers(), TrainConfig(lora={"rank": 4}))
    linears = 2 * (64 * 64 + 96 * 64)
    others = 50 * 64 + 64 + 2 * 64
    assert sizes.parameters == linears + others
    assert sizes.trained == 2 * 4 * (64 + 64 + 96 + 64)
    # 4 bits each; a byte per 64 weights; a float32 per 256 of those, and one offset, for each linear.
    blocks = [64, 96] * 2
    assert (
        sizes.weight_bytes
        == linears // 2 + sum(count + 4 * math.ceil(count / 256) + 4 for count in blocks) + 2 * others
    )
    assert (sizes.adapter_bytes, sizes.optimizer_bytes) == (4 * sizes.trained, 8 * sizes.trained)

    sixteen = measure_model(Headers(), TrainConfig(quant={"type": "none"}, lora={"rank": 4, "targets": ["q_proj"]}))
    assert sixteen.weight_bytes == 2 * sixteen.parameters
    assert sixteen.trained == 2 * 4 * 128
    single = measure_model(Headers(), TrainConfig(quant={"double_quant": False}))
    assert single.weight_bytes == linears // 2 + 4 * sum(blocks) + 2 * others


def test_targets_that_are_not_there_are_refused_with_those_that_are():
    with pytest.raises(UserError, match="k_proj") as caught:
        measure_model(Headers(), TrainConfig(lora={"targets": ["q_proj", "k_proj"]}))
    assert "q_proj, up_proj" in str(caught.value)
    with pytest.raises(UserError, match=r"did you mean up_proj\?"):
        measure_model(Headers(), TrainConfig(lora={"targets": ["upproj"]}))


def test_steps_follow_from_epochs_or_are_given():
    config = TrainConfig(train={"epochs": 1.5, "accumulation": 2})
    assert planned_steps(config, Epoch(batches=10, fill=1.0)) == 8
    assert planned_steps(TrainConfig(train={"steps": 3}), Epoch(batches=10, fill=1.0)) == 3


def test_an_epoch_of_unpacked_rows(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.jsonl", [5] * 9), eval_split=0)
    config = TrainConfig(train={"packing": False, "batch_size": 2, "seq_len": 10})
    assert measure_epoch(config, dataset.train) == Epoch(batches=5, fill=0.5)


def test_an_epoch_of_packed_rows_is_measured_by_packing(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.jsonl", [5] * 12), eval_split=0)
    config = TrainConfig(train={"packing": True, "batch_size": 2, "seq_len": 10})
    assert measure_epoch(config, dataset.train) == Epoch(batches=3, fill=1.0)


def test_the_plan_states_counts_and_bytes(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.jsonl", [5] * 9 + [11]), eval_split=0)
    config = TrainConfig(
        model={"path": "models/Tiny"},
        data={"path": "rows.jsonl"},
        train={"steps": 10, "batch_size": 2, "accumulation": 3, "seq_len": 10},
    )
    text = describe_plan(config, measure_model(Headers(), config), dataset, Epoch(batches=5, fill=0.5))
    for wanted in (
        "Tiny: ",
        "9 of 10 rows kept, 1 dropped (longer than train.seq_len=10)",
        "0 rows evaluated",
        "45 per epoch, 20.0% of them trained",
        "50% full",
        "10 steps of 6 rows (batch_size 2 x accumulation 3), 6 epochs",
    ):
        assert wanted in text
    assert "caution" not in text


def test_the_plan_warns_of_rows_beyond_the_models_positions(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.jsonl", [5] * 9 + [9, 10]), eval_split=0)
    config = TrainConfig(train={"steps": 1, "seq_len": 10})
    plan = (config, measure_model(Headers(), config), dataset, Epoch(batches=5, fill=0.5))
    assert "caution  2 rows longer than the 8 positions" in describe_plan(*plan, positions=8)
    assert "train.seq_len=9 drops it" in describe_plan(*plan, positions=9)
    assert "caution" not in describe_plan(*plan, positions=10)
