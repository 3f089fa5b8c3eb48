"""The rows made of the running Python's docstrings: their own invariants, since they differ from Python to Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.data import docstrings
from qlora_jax.data.docstrings import DocstringSet, build_docstring_rows, build_docstring_set
from qlora_jax.errors import UserError


@pytest.fixture(scope="module")
def built() -> DocstringSet:
    return build_docstring_set()


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z0-9]+", text.lower()))


def test_rows_are_many_and_well_formed(built: DocstringSet) -> None:
    assert 3000 < len(built.train) < 5000
    assert 300 < len(built.evaluation) <= 400
    for row in [*built.train, *built.evaluation]:
        assert set(row) == {"instruction", "output", "name", "kind", "module"}
        assert f"`{row['name']}`" in row["instruction"]
        assert row["instruction"].startswith("In one sentence, what ")
        assert re.fullmatch(r"[A-Z`][ -~]*[.!?]", row["output"])
        assert 4 <= len(row["output"].split()) <= 36


def test_every_name_is_a_row_or_counted(built: DocstringSet) -> None:
    assert sum(built.dropped.values()) + len(built.train) + len(built.evaluation) == len(docstrings.scan_docstrings())


def test_modules_and_answers_are_on_one_side_only(built: DocstringSet) -> None:
    assert not {row["module"] for row in built.train} & {row["module"] for row in built.evaluation}
    answers = [row["output"] for row in [*built.train, *built.evaluation]]
    assert len(set(answers)) == len(answers)
    trained = [words(row["output"]) for row in built.train]
    for row in built.evaluation:
        mine = words(row["output"])
        assert all(len(mine & other) < 0.6 * len(mine | other) for other in trained), row


def test_some_rows_are_true(built: DocstringSet) -> None:
    answers = {row["name"]: row["output"] for row in [*built.train, *built.evaluation]}
    assert answers["os.killpg"] == "Kill a process group with a signal."
    assert answers["enumerate"] == "Return an enumerate object."
    assert "builtins.enumerate" not in answers
    assert {"os", "builtins"} <= {row["module"] for row in built.train}


def test_seed_chooses_modules_and_order(built: DocstringSet) -> None:
    other = build_docstring_set(seed=1, eval_rows=100)
    assert len(other.evaluation) <= 100
    assert {row["module"] for row in other.evaluation} != {row["module"] for row in built.evaluation}
    assert [row["name"] for row in built.train] != sorted(row["name"] for row in built.train)


def test_a_users_files_and_environment_change_nothing(
    built: DocstringSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csv.py").write_text('"""Return a users own file here."""\nprint("loud")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setenv("TERM", "xterm")
    assert build_docstring_rows() == (built.train, built.evaluation)


def test_the_callers_process_is_left_alone() -> None:
    program = (
        "import signal, sys, qlora_jax.data.docstrings as d\n"
        "modules, handlers = set(sys.modules), [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "train, _ = d.build_docstring_rows()\n"
        "assert train and handlers == [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "assert not {'turtle', 'sqlite3', 'unittest', 'ctypes', 'readline'} & (set(sys.modules) - modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_python_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", os.fspath(tmp_path / "python"))
    with pytest.raises(UserError, match=r"tmp.*python cannot be read(.|\n)*fix: data\.path="):
        build_docstring_rows()


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return a list.  More text.", "Return a list."),
        ("f(x, y) -> int\n\nAdd two numbers, e.g. Two and two. Then stop.", "Add two numbers, e.g. Two and two."),
        ("join(*parts)\n    Join\n    the parts\n\n    Second paragraph.", "Join the parts"),
        ("See pp. 3-4 and 3.5 there", "See pp. 3-4 and 3.5 there"),
        ("f(x)\n\n   \n", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert docstrings.first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("S.append(value) -- append value to the end", "Append value to the end."),
        ("Functools.py - Tools for working with functions", "Tools for working with functions."),
        ("Return ``x`` .", "Return `x`."),
        ("Stop now. it is late and so on", "Stop now."),
        ("Some text, e.g. this one", "Some text, e.g. this one."),
        ("Is it callable?", "Is it callable?"),
        ("", ""),
    ],
)
def test_finish(sentence: str, answer: str) -> None:
    assert docstrings.finish(sentence) == answer


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Return the name of a file.", None),
        ("Return the caller's own name.", None),
        ("", "empty or not ASCII"),
        ("Return the café of a file.", "empty or not ASCII"),
        ("Return x = y in the end.", "code in the sentence"),
        ("Return 'the name of a file.", "code in the sentence"),
        ("Return a :class:`Name` of it.", "signature or markup"),
        ("Equivalent to the other one there.", "refers to something else"),
        ("Return what is described below it.", "refers to something else"),
        ("This is deprecated since long ago.", "deprecated or internal"),
        ("Return one of the following:.", "cut sentence"),
        ("Return one (of the following.", "cut sentence"),
        ("5 is what it returns then.", "odd start"),
        ("Return it.", "length"),
        ("Return " + "a " * 40 + "b.", "length"),
        ("Return {} [] {} [] {} {}.", "mostly symbols"),
    ],
)
def test_faults(answer: str, fault: str | None) -> None:
    assert docstrings.fault_of(answer) == fault
