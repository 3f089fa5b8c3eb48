"""Options of the doors: a hint where a typo is plausible, none where it is a guess."""

import pytest

from qlora_jax.training.options import hint

KNOWN = [
    *("--run", "--prompt", "--prompts", "--chat", "--model", "--adapter", "--base", "--max-new-tokens", "--stop"),
    *("--temperature", "--template", "--top-k", "--seed", "--debug", "--version", "--help", "--batch-size", "--to"),
    "--repetition-penalty",
]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--promt", "--prompt"),
        ("--rnu", "--run"),
        ("--modle", "--model"),
        ("--topk", "--top-k"),
        ("--batchsize", "--batch-size"),
        ("--max-tokens", "--max-new-tokens"),
        ("--tokens", "--max-new-tokens"),
        ("--penalty", "--repetition-penalty"),
        ("--temp", "--temperature or --template"),
    ],
)
def test_typos_are_answered(typed, meant):
    assert hint(typed, KNOWN, "see --help") == f"did you mean {meant}?"


@pytest.mark.parametrize("typed", ["--nope", "--foo", "--verbose", "--x", "--length", "--lora"])
def test_guesses_are_not_made(typed):
    assert hint(typed, KNOWN, "see --help") == "see --help"
