"""Times of programs that are run in turns, so that what disturbs the machine disturbs all alike."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

# A measurement takes at least this long, so that starting and awaiting it does not count.
MIN_SECONDS = 0.004


class Program(Protocol):
    """Something that makes `calls` products each time it is run."""

    @property
    def calls(self) -> int:
        """Products in one run."""

    def run(self, times: int) -> None:
        """Runs the program that often and waits for the last result."""


def interleave(
    programs: Mapping[str, Program], *, repeats: int, min_seconds: float = MIN_SECONDS
) -> dict[str, list[float]]:
    """Seconds of one call, `repeats` times for each program, taken in turns."""
    times = {}
    for name, program in programs.items():
        program.run(1)
        began = time.perf_counter()
        program.run(1)
        times[name] = max(1, round(min_seconds / (time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            program.run(times[name])
            seconds[name].append((time.perf_counter() - began) / (times[name] * program.calls))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """Ours / peer, for each peer, of times taken in the same turn."""
    return {
        peer: spread([own / theirs for own, theirs in zip(seconds[ours], times, strict=True)])
        for peer, times in seconds.items()
        if peer != ours
    }
