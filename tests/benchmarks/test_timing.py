"""Programs are timed in turns, and batches of calls are divided by their number."""

import pytest

from qlora_jax.benchmarks import timing


class Recorded:
    def __init__(self, name, order, calls=1):
        self.name, self.order, self.calls = name, order, calls

    def run(self, times):
        self.order += [self.name] * times


def test_programs_are_timed_in_turns():
    order = []
    programs = {name: Recorded(name, order) for name in "ab"}
    seconds = timing.interleave(programs, repeats=3, min_seconds=0)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 4


def test_a_time_is_that_of_one_call(monkeypatch):
    clock = [0.0]

    class Ticking(Recorded):
        def run(self, times):
            clock[0] += 0.5 * times

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = timing.interleave({"a": Ticking("a", [], calls=5)}, repeats=2, min_seconds=2.0)
    assert seconds == {"a": [0.1, 0.1]}
    assert clock[0] == 0.5 * (2 + 2 * 4)  # two to see how long it takes, then four a time


def test_ratios_are_of_the_same_turn():
    ratio = timing.ratios({"ours": [1.0, 4.0, 1.0], "peer": [2.0, 8.0, 4.0]}, "ours")
    assert ratio == {"peer": {"median": 0.5, "low": 0.375, "high": 0.5}}
    assert timing.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": pytest.approx(2.5)}


def test_a_program_elsewhere_takes_its_own_time_and_rests_before_it(monkeypatch):
    slept, order = [], []
    monkeypatch.setattr(timing.time, "sleep", slept.append)

    class Elsewhere(Recorded):
        def seconds(self, times):
            self.run(times)
            return 3.0 * times

    seconds = timing.interleave({"a": Elsewhere("a", order, calls=2)}, repeats=2, min_seconds=6.0, rest=0.5)
    assert seconds == {"a": [1.5, 1.5]}
    assert slept == [0.5, 0.5]
    assert len(order) == (1 + 1) + 2 * (1 + 2)  # one run before each measurement does not count
