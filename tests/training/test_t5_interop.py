"""One step on a T5 against transformers and PEFT: the same adapter, the same rows, float32."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.data.loader import Loader
from qlora_jax.models.loading import load_model
from qlora_jax.training.preparation import prepare
from qlora_jax.training.step import init_train_state, make_train_step, model_arrays, split_model

from .conftest import build, write_rows

pytestmark = pytest.mark.interop

VERSIONS = {"1.1": {}, "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True}}
ROWS = [("translate: ape", "singe"), ("eel", "anguille de mer"), ("a fox, a hen and a gnu", "b"), ("cat", "chat")]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_equals_that_of_peft(version, make_tiny_t5, tiny_settings, tmp_path: Path) -> None:
    """Four examples packed in two rows here, four padded rows there; plain gradient descent shows the gradients."""
    import torch
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    folder = make_tiny_t5(tmp_path / "t5", seed, **VERSIONS[version])
    own = {"model.path": str(folder), "data.path": str(write_rows(tmp_path / "rows.jsonl", ROWS))}
    config = build(tiny_settings | own | {"data.eval_path": None, "data.eval_split": 0, "train.target_len": 32})
    examples = prepare(config).dataset.train
    model = load_model(folder, quant_type=None, rank=4, alpha=8.0, dtype=jnp.float32, seed=seed % 1000)
    graphdef, adapters, frozen = split_model(model)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), adapters)
    before = _saved(graphdef, adapters, frozen, tmp_path / "before")

    optimizer = optax.sgd(1.0)
    (batch,) = Loader(examples, batch_size=2, seq_len=32, source_len=48, packing=True, seed=0, repeat=False)
    assert sum(len(lines) for lines in batch["lines"]) == len(ROWS)
    step = jax.jit(make_train_step(graphdef, optimizer, lambda count: 1.0))
    window = {key: value[None] for key, value in model_arrays(batch).items()}
    state, metrics = step(init_train_state(adapters, optimizer), frozen, window)
    after = _saved(graphdef, state.trainable, frozen, tmp_path / "after")

    base = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "before", is_trainable=True).eval()
    source, labels = (torch.full((4, 48), fill) for fill in (0, -100))
    for row, example in enumerate(examples):
        source[row, : len(example.source_ids)] = torch.from_numpy(example.source_ids)
        labels[row, : len(example.input_ids) - 1] = torch.from_numpy(example.input_ids[1:])
    loss = theirs(input_ids=source, attention_mask=(source != 0).long(), labels=labels).loss
    loss.backward()
    assert abs(float(loss.detach()) - float(metrics.loss)) < 1e-5
    names = {name.replace(".default", ""): parameter.grad for name, parameter in theirs.named_parameters()}
    assert before.keys() == {name for name, gradient in names.items() if gradient is not None}
    for name in before:
        expected, got = names[name].numpy(), before[name] - after[name]
        assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected), name


def _saved(graphdef, adapters, frozen, folder: Path) -> dict[str, np.ndarray]:
    model = nnx.merge(graphdef, adapters, frozen)
    save_adapter(model, folder, base_model="t5", base_sha256="0" * 64)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_adapter_of_a_run_in_peft(train, make_tiny_t5, tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForSeq2SeqLM

    folder = make_tiny_t5(tmp_path / "t5")
    changes = {"model.path": str(folder), "quant.type": "none", "train.seq_len": 40, "train.target_len": 24}
    _, run, _ = train(**changes, **{"optim.learning_rate": 0.02})
    source, target = np.random.default_rng(0).integers(2, 128, (2, 3, 20)).astype(np.int32)
    model = load_model(folder, quant_type=None, dtype=jnp.float32)
    plain = np.asarray(model(source, target))
    got = np.asarray(load_adapter(model, run.adapter)(source, target))
    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(run.adapter, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = (torch.from_numpy(array.astype(np.int64)) for array in (source, target))
        expected = theirs(**dict(zip(("input_ids", "decoder_input_ids"), ids, strict=True))).logits.numpy()
    assert np.abs(got - plain).max() > 0.1
    assert np.abs(got - expected).max() < 1e-3
