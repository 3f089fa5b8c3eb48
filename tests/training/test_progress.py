"""What a run prints while it works."""

import io

import pytest
from rich.console import Console

from qlora_jax.training.progress import Progress, clock_face


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(progress, clock, steps=6, compile_seconds=60.0):
    progress.start(steps)
    progress.step(0, eval_loss=4.5)
    clock.now += compile_seconds
    for step in range(1, steps + 1):
        clock.now += 2.0
        progress.step(
            step,
            loss=3.0,
            lr=1e-3,
            grad_norm=0.5,
            tokens_per_second=412.3,
            memory_bytes=2_310_000_000,
            eval_loss=2.9 if step == 3 else None,
        )
    progress.finish()
    progress.finish()


def test_plain_lines_off_a_terminal():
    clock, out = Clock(), io.StringIO()
    run(Progress(console=Console(file=out, width=20), clock=clock), clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 0/6  eval loss 4.5000"
    assert lines[1] == "step 1/6  loss 3.0000  lr 1.00e-03  grad 0.500  412 tok/s  peak 2.31 GB"
    assert lines[2].endswith("peak 2.31 GB  0:08 left")
    assert "eval loss 2.9000" in lines[3]
    assert len(lines) == 7
    assert "\x1b" not in out.getvalue()


def test_every_thins_the_lines_but_keeps_evaluations_and_the_end():
    clock, out = Clock(), io.StringIO()
    run(Progress(every=4, console=Console(file=out), clock=clock), clock)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["0/6", "3/6", "4/6", "6/6"]


def test_time_left_follows_the_pace_of_steps_not_the_compilation():
    clock = Clock()
    progress = Progress(console=Console(file=io.StringIO()), clock=clock)
    progress.start(100, first_step=50)
    assert progress.seconds_left() is None
    clock.now += 60
    progress.step(51, loss=1.0)
    assert progress.seconds_left() is None
    clock.now += 3
    progress.step(52, loss=1.0)
    assert progress.seconds_left() == pytest.approx(3 * 48)


def test_a_bar_on_a_terminal():
    clock, out = Clock(), io.StringIO()
    progress = Progress(console=Console(file=out, force_terminal=True, width=140), clock=clock)
    run(progress, clock)
    assert "step 3/6  loss 3.0000  eval loss 2.9000" in out.getvalue()
    assert "━" in out.getvalue()


def test_clock_face():
    assert [clock_face(seconds) for seconds in (0, 75.2, 3700)] == ["0:00", "1:15", "1:01:40"]
