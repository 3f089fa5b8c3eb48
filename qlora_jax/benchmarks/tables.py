"""Reports as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

# Peers in the order in which they are shown; those that were not measured are left out.
_PEERS = ("xla", "dense", "cublas", "skinny", "tile", "dequantize", "bnb_fused", "bnb_dequantize")


def kernels_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Times in milliseconds; ratios below 1 say that ours is faster."""
    table = _table("nf4_matmul: ours / peer, below 1: ours is faster")
    peers = [name for name in _PEERS if any(name in case["ratio"] for case in results)]
    for heading in (
        "op",
        "in x out",
        "rows",
        "dtype",
        "route",
        "ms",
        "TFLOP/s",
        "floor",
        *(f"/ {peer}" for peer in peers),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in results:
        table.add_row(
            case["op"],
            f"{case['in']} x {case['out']}",
            str(case["rows"]),
            case["dtype"],
            case["route"],
            *_measured(case),
            *(_show_ratio(case["ratio"].get(peer), quartiles=len(peers) <= 2) for peer in peers),
        )
    return table


def memory_table(report: Mapping[str, Any]) -> Table:
    """Dequantization beside a copy."""
    table = _table("dequantization alone: bytes moved in a second, and how much of a copy's that is")
    for heading in ("in x out", "GB/s", "of a copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("copy", f"{report['copy']['bytes_per_second'] / 1e9:.0f}", "")
    for case in report["dequantize"]:
        known = "of_copy" in case
        shown = (f"{case['bytes_per_second'] / 1e9:.0f}", f"{case['of_copy']:.2f}") if known else ("failed", "")
        table.add_row(f"{case['in']} x {case['out']}", *shown)
    return table


def bars_table(bars: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Each bar with its worst case."""
    table = _table(title)
    for heading in ("bar", "holds", "cases", "missed", "worst"):
        table.add_column(heading, justify="left")
    for bar in bars:
        holds = {None: "not judged", True: "yes", False: "NO"}[bar["holds"]]
        worst = f"{bar['worst']['ratio']:.2f} ({bar['worst']['case']})" if bar["worst"] else ""
        table.add_row(bar["bar"], holds, str(bar["cases"]), str(bar["missed"]), worst)
    return table


def cpu_table(report: Mapping[str, Any]) -> Table:
    """Milliseconds, and ratios with quartiles."""
    kernel = {None: "", "bitsandbytes": "; eval(): its own kernel", "kernels": "; eval(): the kernel of `kernels`"}
    table = _table(f"nf4_matmul on the CPU: ours / peer, below 1: ours is faster{kernel[report['eval_kernel']]}")
    ways = {"torch": "torch bf16", "bnb_train": "bnb train()", "bnb_eval": "bnb eval()", "dense": "XLA bf16"}
    ways = {
        way: name
        for way, name in ways.items()
        if any(way in {**case["ratio"], **case["errors"]} for case in report["results"])
    }
    for heading in (
        "op",
        "in x out",
        "rows",
        "ms",
        *(f"/ {name}" for name in ways.values()),
        "of float32",
        "others",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in report["results"]:
        table.add_row(
            case["op"],
            f"{case['in']} x {case['out']}",
            str(case["rows"]),
            f"{case['seconds']['ours']['median'] * 1e3:.3f}",
            *(
                "wrong" if way in case["errors"] else _show_ratio(case["ratio"].get(way), quartiles=True)
                for way in ways
            ),
            _show_ratio(case.get("of_float32"), quartiles=True),
            "" if case["other_load"] is None else f"{case['other_load']:.0%}",
        )
    return table


def quantize_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """GB of bfloat16 in a second, on each core."""
    table = _table("quantize: GB of bfloat16 a second on each core")
    for heading in ("in x out", "ours", "bitsandbytes", "ours / bitsandbytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        rates = {name: f"{rate / 1e9:.2f}" for name, rate in case["bytes_per_second_and_core"].items()}
        ratio = _show_ratio(case["ratio"].get("bnb"), quartiles=True)
        table.add_row(f"{case['in']} x {case['out']}", rates["ours"], rates.get("bnb", ""), ratio)
    return table


_RUNS = {
    "ours": "ours",
    "ffi": "QLoRA, compiled kernels",
    "xla": "QLoRA, pure JAX",
    "dense": "16-bit LoRA",
    "peft": "transformers + peft + bitsandbytes",
    "peft_answers": "the same, head at answers only",
    "qwix": "Qwix",
}


def runs_table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """One line per run."""
    table = _table(f"{title}: ours / peer, below 1: ours is faster")
    for heading in ("run", "steps", "s", "quartiles", "tokens/s", "ours / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in results:
        seconds, ratio = run["seconds"], run["ratio"]
        rate = f"{run['tokens_per_second']:.0f}" if "tokens_per_second" in run else ""
        quartiles = f"{seconds['low']:.3f} to {seconds['high']:.3f}"
        shown = _show_ratio(ratio, quartiles="low" in ratio)
        table.add_row(_RUNS[run["name"]], str(run["steps"]), f"{seconds['median']:.3f}", quartiles, rate, shown)
    return table


def datatypes_table(report: Mapping[str, Any]) -> Table:
    """One line per type, in the order of the study."""
    text = report["text"]
    table = _table(f"{report['model']}: {text['windows']} windows of {text['context']} tokens ({text['source']})")
    for heading in ("type", "relative squared error", "loss", "perplexity", "loss - 16-bit", "standard error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in report["results"]:
        difference = f"{line['difference']:+.4f}", f"{line['standard_error']:.4f}"
        table.add_row(
            line["name"],
            f"{line['relative_squared_error']:.5f}",
            f"{line['loss']:.4f}",
            f"{line['perplexity']:.2f}",
            *(difference if line["quant_type"] else ("", "")),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD)


def _measured(case: Mapping[str, Any]) -> tuple[str, str, str]:
    """Milliseconds, TFLOP/s, and the floor as a share of the time."""
    own = case["seconds"].get(case["route"])
    if own is None:
        return "failed", "", ""
    floor = case["floor_seconds"]
    rate = case["flops_per_second"][case["route"]]
    return f"{own['median'] * 1e3:.4f}", f"{rate / 1e12:.3f}", f"{floor / own['median']:.2f}" if floor else ""


def _show_ratio(ratio: Mapping[str, float] | None, *, quartiles: bool) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f}" + (f" ({ratio['low']:.2f}-{ratio['high']:.2f})" if quartiles else "")
