"""Perplexity by datatype on the real model, on the first windows of this Python's docstrings."""

import math

import pytest

from qlora_jax.benchmarks.datatypes import Datatype, run_study

pytestmark = pytest.mark.real
WINDOWS = 24
# Loss less the 16-bit one's and its standard error over 128 windows, by an independent simulation in torch on the
# docstrings of Python 3.12.1. Another Python has other windows of the same kind of text.
REFERENCE = {"nf4+dq/64": (0.246, 0.004), "fp4+dq/64": (0.399, 0.005), "e2m1/32": (0.279, 0.004)}


def test_types_cost_what_an_independent_simulation_found():
    types = [Datatype("nf4", double_quant=True), Datatype("fp4", double_quant=True), Datatype("e2m1", 32)]
    base, *lines = run_study(types, windows=WINDOWS)["results"]
    assert 2.4 < base["loss"] < 3.2
    for line in lines:
        difference, standard_error = REFERENCE[line["name"]]
        # Two standard errors of these few windows.
        assert line["standard_error"] < 0.02
        assert abs(line["difference"] - difference) <= 2 * math.hypot(line["standard_error"], standard_error), line
    nf4, fp4, _ = lines
    assert nf4["loss"] < fp4["loss"]
