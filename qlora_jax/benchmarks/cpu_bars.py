"""What the CPU is held to: ratios of times of the same turns, each on the machines that it is about."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.benchmarks.bars import Bar, judge
from qlora_jax.benchmarks.cpu import PEAK_ROWS

# By rows of x: how many times faster than the faster mode of bitsandbytes' Linear4bit, and than torch's dense bfloat16
# linear, on a machine with AMX.
_PRODUCTS = {1: (1.0, 1.7), 8: (1.5, 0.9), 32: (4.0, 0.9), 128: (4.0, 0.95), 512: (2.0, 0.95), 2048: (1.5, 0.95)}
_DX_OF_DENSE = 0.8
_OF_FLOAT32 = 0.75
_QUANTIZE = 1e9  # bytes of bfloat16 in a second, on each core
_STEP_OF_PEFT, _STEP_OF_QWIX = 1.6, 2.6
_DEMO_OF_PEFT = 1.5


def evaluate(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines as those of bars.evaluate, of a report of `bench cpu`.

    `holds` is None where nothing was measured for a bar, or where it is about AMX and the kernels do not use it (about
    kernels without AMX, and they do).
    """
    amx = uses_amx(report)
    bitsandbytes = "the faster mode of bitsandbytes"
    if report["peers"] and report["eval_kernel"] is None:
        bitsandbytes = "bitsandbytes (no eval() kernel here)"
    results = report["results"]
    lines = []
    for rows, (of_bitsandbytes, of_dense) in _PRODUCTS.items():
        text = f"{rows} row{'s' * (rows > 1)}, forward: {{}} x the speed of {{}} (AMX)"
        faster = text.format(of_bitsandbytes, bitsandbytes)
        dense = text.format(of_dense, "torch's dense bf16 linear")
        lines += [
            judge(Bar(faster, of_bitsandbytes, _forward(rows, _over_bitsandbytes)), results, meant=amx),
            judge(Bar(dense, of_dense, _forward(rows, _over("torch"))), results, meant=amx),
        ]
    dx = Bar(f"dx: {_DX_OF_DENSE} x the speed of torch's dense bf16 product (AMX)", _DX_OF_DENSE, _dx)
    float32 = f"{PEAK_ROWS} rows and more: {_OF_FLOAT32} of the peak of float32 sums (no AMX)"
    quantize = Bar("quantize: 1 GB of bf16 a second on each core", 1.0, _quantize_rate)
    return [
        *lines,
        judge(dx, results, meant=amx),
        judge(Bar(float32, _OF_FLOAT32, _of_float32), results, meant=not amx),
        judge(quantize, report["quantize"], meant=True),
    ]


def evaluate_step(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a report of `bench step`: `ratio` of each run is the time of ours / its time."""
    return [
        _judge_run(f"step: {least} x the tokens/s of {text}", least, results, [name])
        for name, text, least in (
            ("peft", "transformers + peft + bitsandbytes", _STEP_OF_PEFT),
            ("qwix", "Qwix' NF4 QLoRA", _STEP_OF_QWIX),
        )
    ]


def evaluate_demo(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The line of a report of `bench demo`: the faster of the two ways that transformers was given."""
    text = f"the demo's step: {_DEMO_OF_PEFT} x the speed of transformers + peft + bitsandbytes"
    return [_judge_run(text, _DEMO_OF_PEFT, results, ["peft", "peft_answers"])]


def uses_amx(report: Mapping[str, Any]) -> bool:
    """Whether the kernels multiplied with AMX."""
    return "amx" in (report.get("instruction_set") or "")


def _judge_run(text: str, least: float, results: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    gains = [(1 / run["ratio"]["median"], run["name"]) for run in results if run["name"] in names]
    worst = min(gains, default=None)
    return {
        "bar": text,
        "least": least,
        "cases": len(gains),
        "missed": sum(gain < least for gain, _ in gains),
        "worst": worst and {"ratio": worst[0], "case": worst[1]},
        "holds": worst[0] >= least if worst else None,
    }


_Ratio = Callable[[Mapping[str, Any]], float | None]


def _over(way: str) -> _Ratio:
    """How many times faster than a peer in the same turns."""

    def gain(case: Mapping[str, Any]) -> float | None:
        measured = case["ratio"].get(way)
        return 1 / measured["median"] if measured else None

    return gain


def _over_bitsandbytes(case: Mapping[str, Any]) -> float | None:
    return _over(case["bitsandbytes"])(case) if case["bitsandbytes"] else None


def _forward(rows: int, gain: _Ratio) -> _Ratio:
    return lambda case: gain(case) if case["op"] == "forward" and case["rows"] == rows else None


def _dx(case: Mapping[str, Any]) -> float | None:
    return _over("torch")(case) if case["op"] == "dx" else None


def _of_float32(case: Mapping[str, Any]) -> float | None:
    return case["of_float32"]["median"] if "of_float32" in case else None


def _quantize_rate(case: Mapping[str, Any]) -> float:
    return float(case["bytes_per_second_and_core"]["ours"] / _QUANTIZE)
