"""Environment variables: a wrong word is a user's mistake, said before anything is loaded."""

import pytest

from qlora_jax import generate, train
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.nf4.environment import check_environment

NAMES = ("QLORA_JAX_KERNELS", "QLORA_JAX_LAYOUT", "QLORA_JAX_COMPUTE_CAPABILITY")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_variable_counts_as_unset(monkeypatch, name):
    monkeypatch.setenv(name, "")
    check_environment()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("QLORA_JAX_KERNELS", "fii", "must be one of auto, ffi"),
        ("QLORA_JAX_KERNELS", "skinny", "'skinny' kernel was asked for on cpu"),
        ("QLORA_JAX_LAYOUT", "fragment", "did you mean 'fragments'"),
        ("QLORA_JAX_COMPUTE_CAPABILITY", "hopper", "such as 9.0, got 'hopper'"),
    ],
)
def test_a_wrong_word_is_named_with_what_mends_it(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught:
        check_environment()
    assert f"unset {name}" in str(caught.value)


def test_all_wrong_words_at_once(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "foo")
    with pytest.raises(UserErrors) as caught:
        check_environment()
    assert len(caught.value.errors) == 3


@pytest.mark.parametrize("door", ["train", "dry-run", "generate"])
def test_doors_say_it_and_exit_with_2(monkeypatch, tmp_path, capsys, door):
    monkeypatch.setenv("QLORA_JAX_KERNELS", "fii")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    if door == "generate":
        code = generate.main(["--model", str(tmp_path), "--prompt", "hello"])
    else:
        settings = [f"data.path={data}", f"model.path={tmp_path}", f"output_dir={tmp_path / 'run'}"]
        code = train.main([*settings, *(["--dry-run"] if door == "dry-run" else [])])
    assert code == 2
    assert "QLORA_JAX_KERNELS must be one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
