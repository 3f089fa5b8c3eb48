"""Times of programs that are run in turns, so that what disturbs the machine disturbs all alike."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

# A measurement takes at least this long, so that starting and awaiting it does not count.
MIN_SECONDS = 0.004


class Program(Protocol):
    """Something that makes `calls` products each time it is run."""

    @property
    def calls(self) -> int:
        """Products in one run."""

    def run(self, times: int) -> None:
        """Runs the program that often and waits for the last result."""


@runtime_checkable
class SelfTimed(Protocol):
    """A program in another process, which takes its own time: asking it to run takes some, too."""

    def seconds(self, times: int) -> float:
        """Runs the program that often and says how long that took."""


def interleave(
    programs: Mapping[str, Program], *, repeats: int, min_seconds: float = MIN_SECONDS, rest: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of one call, `repeats` times for each program, taken in turns.

    Args:
      programs: what is timed.
      repeats: measurements of each.
      min_seconds: of one measurement.
      rest: seconds to wait before each measurement, with a run that does not count after them. For programs of several
        processes: threads of one go on spinning for a while, and the caches hold its data.
    """
    times = {}
    for name, program in programs.items():
        program.run(1)
        times[name] = max(1, round(min_seconds / elapsed(program, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            if rest:
                time.sleep(rest)
                if times[name] > 1:  # a long one brings its data as it runs
                    program.run(1)
            seconds[name].append(elapsed(program, times[name]) / (times[name] * program.calls))
    return seconds


def elapsed(program: Program, times: int) -> float:
    """Seconds that so many runs take."""
    if isinstance(program, SelfTimed):
        return program.seconds(times)
    began = time.perf_counter()
    program.run(times)
    return time.perf_counter() - began


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
