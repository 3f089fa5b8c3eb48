"""The timing door: `python -m qlora_jax.bench [kernels|demo] [--json] [--out FILE] [--quick]`.

`kernels` times nf4_matmul and its input gradient, `demo` the training step of the demo. Each is timed beside its peers:
"xla", the same product by dequantizing in pure JAX, and "dense", XLA's product with unpacked weights.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.errors import UserError

if TYPE_CHECKING:
    import jax
    from rich.table import Table

    from qlora_jax.nf4 import NF4Tensor

# (in, out) of the linears of SmolLM2-135M, and one of the size of LLaMA-7B's.
SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (4096, 4096))
# Decoding one and sixteen sequences, a short prompt, and a step of the demo (8 rows of 96 tokens).
ROWS = (1, 16, 128, 768)
DTYPES = ("bfloat16", "float32")
QUICK_SHAPES, QUICK_ROWS, QUICK_DTYPES = ((576, 192),), (1, 128), ("bfloat16",)

# What the demo is run with: name, kernels, quant.type.
_DEMO_RUNS = (("ffi", "ffi", "nf4"), ("xla", "xla", "nf4"), ("dense", "auto", "none"))

# Calls of less than this many seconds are timed several at a time.
_MIN_SECONDS = 0.005


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, or 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.out is not None:
            _check_out(options.out)
        measure, table = (time_demo, demo_table) if options.what == "demo" else (time_kernels, kernels_table)
        results = measure(quick=options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {"benchmark": options.what, **describe(), "quick": options.quick, "results": results}
    text = json.dumps(report, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 120).print(table(results))
    return 0


def time_kernels(
    *,
    quick: bool = False,
    shapes: Sequence[tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Times both directions of nf4_matmul for every shape `(in, out)`, number of rows and dtype.

    Returns:
      For each case `op` ("forward" or "dx"), `in`, `out`, `rows`, `dtype`, `gflops` (of the compiled kernel), `seconds`
      (by "ffi", "xla", "dense") and `ratio` (ours / peer, by peer), these with `median`, `low`, `high` (quartiles).

    Raises:
      UserError: the compiled kernels are not there.
    """
    import jax

    from qlora_jax.nf4 import kernel_report

    status = kernel_report().get(jax.default_backend(), "not built")
    if status != "loaded":
        raise UserError(
            f"the compiled kernels for {jax.default_backend()} are not there: {status}",
            why="there is nothing to compare with XLA",
            fix="pip install --force-reinstall --no-deps .",
        )
    results = []
    for in_features, out_features in shapes or (QUICK_SHAPES if quick else SHAPES):
        for dtype in dtypes or (QUICK_DTYPES if quick else DTYPES):
            weights = kernel_weights(in_features, out_features, dtype)
            for m in rows or (QUICK_ROWS if quick else ROWS):
                for op, programs in kernel_programs(weights, m).items():
                    case = {"op": op, "in": in_features, "out": out_features, "rows": m, "dtype": dtype}
                    print(" ".join(f"{key}={value}" for key, value in case.items()), file=sys.stderr)
                    seconds = interleave(programs, repeats=3 if quick else 9)
                    spreads = {name: spread(times) for name, times in seconds.items()}
                    gflops = 2e-9 * m * in_features * out_features / spreads["ffi"]["median"]
                    results.append({**case, "gflops": gflops, "seconds": spreads, "ratio": ratios(seconds)})
    return results


def kernel_weights(in_features: int, out_features: int, dtype: str) -> tuple["NF4Tensor", "jax.Array"]:
    """A random weight in 4 bits, and unpacked `[in, out]`."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.nf4 import dequantize, quantize

    w = quantize(jax.random.normal(jax.random.key(0), (in_features, out_features), jnp.bfloat16))
    return w, dequantize(w, dtype)


def kernel_programs(
    weights: tuple["NF4Tensor", "jax.Array"], m: int
) -> dict[str, dict[str, Callable[[], "jax.Array"]]]:
    """What is timed: for "forward" and "dx", by name ("ffi", "xla", "dense"), a call that waits for its result.

    A call is a `functools.partial` of the compiled program and its operands.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qlora_jax.nf4 import nf4_matmul, use_kernels

    w, matrix = weights
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((m, features)), matrix.dtype) for features in w.shape)
    peers: dict[str, tuple[Callable[..., Any], Any]] = {
        "ffi": (nf4_matmul, w),
        "xla": (nf4_matmul, w),
        "dense": (jnp.matmul, matrix),
    }
    programs: dict[str, dict[str, Callable[[], jax.Array]]] = {"forward": {}, "dx": {}}
    for name, (product, weight) in peers.items():

        def forward(x: "jax.Array", weight: Any, product: Callable[..., Any] = product) -> "jax.Array":
            return product(x, weight)

        def dx(dy: "jax.Array", weight: Any, product: Callable[..., Any] = product) -> "jax.Array":
            # The product at 0 is not used, so XLA leaves it out.
            return jax.vjp(lambda x: product(x, weight), jnp.zeros_like(x))[1](dy)[0]

        with use_kernels("auto" if name == "dense" else name):
            for op, function, operand in (("forward", forward, x), ("dx", dx, dy)):
                compiled = jax.jit(function).lower(operand, weight).compile()
                programs[op][name] = functools.partial(_run, compiled, operand, weight)
    return programs


def _run(program: "jax.stages.Compiled", *operands: Any) -> "jax.Array":
    return program(*operands).block_until_ready()


def time_demo(*, quick: bool = False) -> list[dict[str, Any]]:
    """Times the demo's optimizer step: QLoRA with the compiled kernels, with XLA's, and 16-bit LoRA ("dense").

    The three run one after another (`quick`: ours alone), in folders of their own that are removed. The first step
    compiles and is not counted.

    Returns:
      For each run `name`, `steps` counted, `seconds` of a step (`median`, `low`, `high`), and `ratio`, ours / this one.

    Raises:
      UserError: the demo's model cannot be fetched.
    """
    from qlora_jax.nf4 import use_kernels
    from qlora_jax.training.demo import fetch_demo_model, write_demo_rows

    steps = 3 if quick else 8
    times = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows, _ = write_demo_rows(Path(scratch))
        model = fetch_demo_model(lambda line: print(line, file=sys.stderr))
        for name, kernels, quant_type in _DEMO_RUNS[:1] if quick else _DEMO_RUNS:
            settings = {
                "output_dir": str(Path(scratch) / name),
                "model.path": str(model),
                "quant.type": quant_type,
                "data.path": str(rows),
                "data.eval_split": 0,
                "train.steps": steps + 1,
                "eval.samples": 0,
                "log.tensorboard": False,
            }
            print(f"demo, {name}: {steps + 1} steps", file=sys.stderr)
            with use_kernels(kernels):
                times[name] = _step_seconds(settings)
    ours = statistics.median(times["ffi"])
    return [
        {"name": name, "steps": len(own), "seconds": spread(own), "ratio": ours / statistics.median(own)}
        for name, own in times.items()
    ]


def _step_seconds(settings: Mapping[str, Any]) -> list[float]:
    """Seconds of each optimizer step after the first, of the demo's configuration with other settings."""
    from rich.console import Console

    from qlora_jax.training import demo
    from qlora_jax.training.loop import run_training
    from qlora_jax.training.progress import Progress
    from qlora_jax.training.run_folder import RunFolder
    from qlora_jax.training.settings import Setting, build_config, find_config, read_yaml

    ends: list[float] = []

    class Clock(Progress):
        def step(self, step: int, **values: Any) -> None:
            ends.append(time.perf_counter())
            super().step(step, **values)

    own = {key: Setting(value, "bench") for key, value in settings.items()}
    config = build_config(read_yaml(find_config(demo.CONFIG)) | own)
    folder = RunFolder(config.output_dir)
    folder.create(config)
    run_training(config, folder, progress=Clock(console=Console(file=sys.stderr)))
    return [end - begin for begin, end in itertools.pairwise(ends)]


def interleave(calls: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of a call, `repeats` times for each, taken in turns: what disturbs the machine disturbs all alike."""
    counts = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        counts[name] = max(1, round(_MIN_SECONDS / (time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(counts[name]):
                call()
            seconds[name].append((time.perf_counter() - began) / counts[name])
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Ours / peer, for each peer, of times taken in the same turn."""
    return {
        peer: spread([ours / theirs for ours, theirs in zip(seconds["ffi"], times, strict=True)])
        for peer, times in seconds.items()
        if peer != "ffi"
    }


def kernels_table(results: Sequence[Mapping[str, Any]]) -> "Table":
    """Times in milliseconds; ratios below 1 say that ours is faster."""
    table = _table("nf4_matmul: ours / peer with quartiles, below 1: ours is faster")
    for heading in ("op", "in x out", "rows", "dtype", "ms", "GFLOP/s", "/ xla", "/ dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in results:
        table.add_row(
            case["op"],
            f"{case['in']} x {case['out']}",
            str(case["rows"]),
            case["dtype"],
            f"{case['seconds']['ffi']['median'] * 1e3:.3f}",
            f"{case['gflops']:.0f}",
            *(_show_ratio(case["ratio"][peer]) for peer in ("xla", "dense")),
        )
    return table


def demo_table(results: Sequence[Mapping[str, Any]]) -> "Table":
    """One line per run."""
    table = _table("a step of the demo: ours / peer, below 1: ours is faster")
    names = {"ffi": "QLoRA, compiled kernels", "xla": "QLoRA, pure JAX", "dense": "16-bit LoRA"}
    for heading in ("run", "steps", "s", "quartiles", "ours / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in results:
        seconds = run["seconds"]
        quartiles = f"{seconds['low']:.3f} to {seconds['high']:.3f}"
        cells = str(run["steps"]), f"{seconds['median']:.3f}", quartiles, f"{run['ratio']:.2f}"
        table.add_row(names[run["name"]], *cells)
    return table


def _table(title: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD)


def _show_ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def describe() -> dict[str, Any]:
    """When, with what and on what the numbers were taken."""
    import jax
    import jaxlib

    from qlora_jax import __version__

    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "qlora_jax": __version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    library = sys.modules.get("qlora_jax._lib._cpu")
    if library is not None and jax.default_backend() == "cpu":
        report["instruction_set"] = library.instruction_set()
    return report


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _check_out(path: Path) -> None:
    """Refuses before minutes are spent."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise UserError(f"--out {path} {what}", why="the report is one JSON file", fix="--out bench.json")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out {path} cannot be written", why="no permission", fix="--out bench.json")


def _parser() -> argparse.ArgumentParser:
    from qlora_jax import __version__

    parser = argparse.ArgumentParser(
        prog="python -m qlora_jax.bench",
        description="Times the NF4 kernels, or the demo's training step, beside XLA.",
        epilog="Exit codes: 0 done, 2 something you can mend, 1 anything else.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("kernels", "demo"),
        default="kernels",
        help="kernels (default): nf4_matmul and its input gradient, every shape of SmolLM2-135M and 4096 x 4096, some "
        "minutes; demo: the demo's optimizer step, which fetches its model the first time",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON to FILE as well")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one shape, few repeats, the demo without peers: a smoke test, not a measurement",
    )
    parser.add_argument("--version", action="version", version=f"qlora_jax {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
