"""Perplexity by datatype: the text, the paired difference, and that rounded kernels stand for a 4-bit model."""

import functools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.benchmarks import datatypes, text
from qlora_jax.benchmarks.datatypes import Datatype
from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.errors import UserError
from qlora_jax.models import loading
from qlora_jax.models.loading import load_model

DOCUMENTS = [f"document {n}\n" + "".join(chr(97 + (n * i) % 26) for i in range(500)) for n in range(1, 13)]


@pytest.fixture
def tiny(monkeypatch, tiny_llama) -> Path:
    model, _ = tiny_llama
    monkeypatch.setattr(datatypes.demo, "fetch_demo_model", lambda say: model)
    monkeypatch.setattr(datatypes, "long_docstrings", lambda: DOCUMENTS)
    monkeypatch.setattr(datatypes, "CONTEXT", 64)
    return model


def test_a_study_compares_each_type_with_16_bits_window_by_window(tiny, monkeypatch):
    # float32 activations show more than bfloat16 would.
    load = functools.partial(load_model, dtype=jnp.float32)
    monkeypatch.setattr(loading, "load_model", load)
    seen = []
    types = (Datatype("nf4", 32, double_quant=True),) * 2
    study = datatypes.run_study(types, windows=6, after_each=lambda study: seen.append(len(study["results"])))
    assert seen == [1, 2, 3]
    base, nf4, again = study["results"]
    assert [line["name"] for line in study["results"]] == ["16-bit", "nf4+dq/32", "nf4+dq/32"]
    assert (base["difference"], base["standard_error"], base["relative_squared_error"]) == (0, 0, 0)
    # Each type rounds the checkpoint's kernels, not what the one before left.
    assert {**again, "seconds": 0} == {**nf4, "seconds": 0}
    assert 0.005 < nf4["relative_squared_error"] < 0.01
    assert nf4["difference"] == pytest.approx(nf4["loss"] - base["loss"], abs=1e-6)
    assert nf4["perplexity"] == pytest.approx(math.exp(nf4["loss"]))
    assert nf4["standard_error"] > 0
    assert study["text"]["windows"] == 6
    # The claim by which one program serves every type: a model of 4-bit kernels computes the same.
    ids, _ = datatypes._windows(open_checkpoint(tiny).tokenizer(), 6)
    quantized = load(tiny, quant_type="nf4", block_size=32)
    assert np.mean(datatypes.window_losses(quantized, ids)) == pytest.approx(nf4["loss"], abs=2e-5)
    assert abs(nf4["difference"]) > 10 * 2e-5


def test_the_standard_error_is_that_of_the_paired_difference():
    losses, base = np.array([2.0, 3.0, 4.0, 5.0]), np.array([1.0, 2.5, 3.0, 4.5])
    line = datatypes._line(Datatype("nf4"), losses, base)
    assert line["difference"] == pytest.approx(0.75)
    assert line["standard_error"] == pytest.approx(np.std([1, 0.5, 1, 0.5], ddof=1) / 2)


def test_too_little_text_is_told(tiny):
    with pytest.raises(UserError, match=r"2000 windows need 128000(.|\n)*--windows \d+"):
        datatypes.run_study((), windows=2000)


def test_the_text_is_every_long_docstring_once(monkeypatch):
    long = "a" * 400
    entries = [("os.one", long), ("os.two", "b" * 299), ("os.three", f"{long}é"), ("os.four", None), ("os.five", long)]
    entries += [("re.six", "c" * 300)]
    monkeypatch.setattr(text, "scan_docstrings", lambda: [{"name": name, "doc": doc} for name, doc in entries])
    assert sorted(text.long_docstrings()) == [f"os.one\n{long}", "re.six\n" + "c" * 300]


# tests/benchmarks/datatypes-*.json beside an independent simulation in torch (fp32 code * absmax, rounded to bfloat16)
# of the same model and text, Python 3.12.1: loss less the 16-bit one's, its standard error, relative squared error.
REFERENCE = {
    "nf4/64": (0.244, 0.004, 0.00874),
    "nf4+dq/64": (0.246, 0.004, 0.00876),
    "fp4/64": (0.401, 0.005, 0.01565),
    "fp4+dq/64": (0.399, 0.005, 0.01567),
    "int4/64": (0.437, 0.006, 0.01271),
    "e2m1/64": (0.300, 0.004, 0.01118),
    "e3m0/64": (0.935, 0.011, 0.03499),
    "nf4/32": (0.211, 0.004, 0.00781),
    "nf4/128": (0.274, 0.005, 0.00964),
    "nf4/256": (0.380, 0.006, 0.01058),
    "nf4/4096": (0.628, 0.007, 0.01769),
    "e2m1/32": (0.279, 0.004, 0.00989),
    "int4/32": (0.297, 0.005, 0.01022),
}


def test_the_recorded_study_agrees_with_an_independent_one():
    (path,) = Path(__file__).parent.glob("datatypes-*.json")
    results = {line["name"]: line for line in json.loads(path.read_text())["results"]}
    assert results.keys() == {"16-bit", *REFERENCE}
    for name, (difference, standard_error, squared_error) in REFERENCE.items():
        line = results[name]
        assert abs(line["difference"] - difference) <= math.hypot(line["standard_error"], standard_error), name
        assert line["relative_squared_error"] == pytest.approx(squared_error, abs=1.5e-5), name
