"""What the kernels are held to on an H100, computed from one report: each a ratio of times of the same run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEVICE = "H100"
_MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """`ratio` of each case that is meant (None: the case does not count, or was not measured so) must reach `least`."""

    text: str
    least: float
    ratio: Callable[[Mapping[str, Any]], float | None]


def evaluate(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each bar `bar`, `least`, `cases`, `missed`, `worst` (ratio and case) and `holds`.

    `holds` is None where no case counted, or the device is none that the bars are about.
    """
    meant = DEVICE in report["device"]
    published = (report.get("published") or {}).get("bandwidth")
    products = [judge(bar, report["results"], meant=meant) for bar in _product_bars(published)]
    return [*products, judge(_DEQUANTIZE, report["dequantize"], meant=meant)]


def judge(bar: Bar, cases: Sequence[Mapping[str, Any]], *, meant: bool) -> dict[str, Any]:
    """One line of a report's bars; `meant`: the bar is about such a machine."""
    ratios = [(ratio, case) for case in cases if (ratio := _checked(bar, case)) is not None]
    worst = min(ratios, key=lambda pair: pair[0], default=None)
    return {
        "bar": bar.text,
        "least": bar.least,
        "cases": len(ratios),
        "missed": sum(ratio < bar.least for ratio, _ in ratios),
        "worst": worst and {"ratio": worst[0], "case": _name(worst[1])},
        "holds": worst[0] >= bar.least if worst and meant else None,
    }


def _checked(bar: Bar, case: Mapping[str, Any]) -> float | None:
    """A case whose own result is wrong counts as infinitely slow."""
    ratio = bar.ratio(case)
    return 0.0 if ratio is not None and case.get("route", "ours") in case["errors"] else ratio


def _product_bars(bandwidth: float | None) -> list[Bar]:
    def of_bandwidth(case: Mapping[str, Any]) -> float | None:
        packed = case["in"] * case["out"] / 2
        if bandwidth is None or case["rows"] > 64 or packed < 8 * _MIB or not case["seconds"]:
            return None
        return case["bytes_per_second"] / bandwidth

    def against_cublas_when_skinny(case: Mapping[str, Any]) -> float | None:
        large = 2 * case["in"] * case["out"] >= 32 * _MIB
        return _gain(case, _CUBLAS) if case["rows"] <= 64 and large else None

    def against_fused(case: Mapping[str, Any]) -> float | None:
        return _gain(case, ["bnb_fused"]) if case["rows"] <= 64 else None

    def against_better(low: int, high: int) -> Callable[[Mapping[str, Any]], float | None]:
        def ratio(case: Mapping[str, Any]) -> float | None:
            if not low <= case["rows"] <= high or not case.get("bitsandbytes"):
                return None
            return _gain(case, [case["bitsandbytes"], "dequantize"])

        return ratio

    def against_cublas(rows: int) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda case: _gain(case, _CUBLAS) if case["rows"] == rows else None

    def against_peer(case: Mapping[str, Any]) -> float | None:
        return _gain(case, [case["bitsandbytes"]]) if case["rows"] == 2048 and case.get("bitsandbytes") else None

    better = "faster than the better of bitsandbytes and its own dequantization with cuBLAS"
    return [
        Bar("1-64 rows: never slower than bitsandbytes' fused kernel", 1.0, against_fused),
        Bar("1-64 rows: 3 x faster than bf16 cuBLAS (32 MiB of bf16 or more)", 3.0, against_cublas_when_skinny),
        Bar("1-64 rows: 75 % of the published bandwidth (8 MiB packed or more)", 0.75, of_bandwidth),
        Bar(f"128-256 rows: 1.2 x {better}", 1.2, against_better(128, 256)),
        Bar(f"257-1024 rows: not slower ({better})", 1.0, against_better(257, 1024)),
        *(
            Bar(f"{rows} rows: {least} of bf16 cuBLAS, dequantization included", least, against_cublas(rows))
            for rows, least in ((2048, 0.86), (4096, 0.92), (16384, 0.97))
        ),
        Bar("2048 rows: 1.1 x faster than bitsandbytes' path", 1.1, against_peer),
    ]


_CUBLAS = ["dense", "cublas"]
_DEQUANTIZE = Bar("dequantization: 85 % of the measured copy bandwidth", 0.85, lambda case: case.get("of_copy"))


def _gain(case: Mapping[str, Any], peers: Sequence[str]) -> float | None:
    """How many times faster than the quickest of those peers that were measured; None where none was."""
    times = [peer["median"] for name in peers if (peer := case["seconds"].get(name)) and name not in case["errors"]]
    own = case["seconds"].get(case["route"])
    return min(times) / own["median"] if times and own else None


def _name(case: Mapping[str, Any]) -> str:
    size = f"{case['in']} x {case['out']}"
    return f"{case['op']}, {size}, {case['rows']} rows" if "rows" in case else size
