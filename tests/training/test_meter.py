"""What a door prints while it reads or writes a model."""

import re

import pytest

from qlora_jax.training import meter as module
from qlora_jax.training.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows 3 s more each time that it is looked at, so that every line is due."""
    times = iter(range(0, 3000, 3))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(times)))


@pytest.mark.parametrize(
    ("unit", "total", "lines"),
    [
        ("tensors", 4, ["loading: 1 of 4 tensors", "loading: 4 of 4 tensors"]),
        ("bytes", 4 * 10**9, ["loading: 1.00 GB of 4.00 GB", "loading: 4.00 GB of 4.00 GB"]),
    ],
)
def test_lines_where_there_is_no_terminal(clock, capsys, unit, total, lines):
    with Meter("loading", unit) as meter:
        for quarter in range(5):
            meter.show(quarter * total // 4, total)
    printed = capsys.readouterr()
    assert printed.out == ""
    told = [re.fullmatch(r"(.*), (\d+) s", line) for line in printed.err.splitlines()]
    assert [told[0][1], told[-1][1]] == lines
    seconds = [int(line[2]) for line in told]
    assert seconds == sorted(set(seconds))


def test_what_is_quick_is_not_told(capsys):
    with Meter("loading", "tensors") as meter:
        for done in range(291):
            meter.show(done, 291)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("unit", "text"), [("tensors", "7/291 tensors"), ("bytes", "7/291 bytes")])
def test_a_bar_on_a_terminal(monkeypatch, capsys, unit, text):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Meter("loading", unit) as meter:
        meter.show(7, 291)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed.err)
