"""The timing door: `python -m qlora_jax.bench [kernels|demo] [--device cpu|gpu] [--out FILE] ...`.

`kernels` times nf4_matmul and its input gradient beside their peers, dequantization beside a copy, and says which bars
hold; `demo` times the training step of the demo. The report is one JSON object:

    benchmark, date, versions, platform, device, compute_capability, published (data sheet), dispatch, ...
    results     kernels: one object for each product and direction: op ("forward" or "dx"), in, out, rows, dtype,
                models, copies (weights rotated over), route (ours: "skinny", "tile", "dequantize", or "ffi", "xla"),
                seconds of one product by way (median, low, high: quartiles), ratio (ours / way, from the same turns),
                bitsandbytes (the way that is its own: "bnb_fused" or "bnb_dequantize"), floor_seconds (published
                limits), bytes_per_second, flops_per_second, distance (from the dense result), errors by way
    copy, dequantize    bytes moved in a second by a copy, and by dequantization of each shape
    left_out    cases for which there was no time
    bars        bar, least, cases, missed, worst, holds
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_jax.errors import UserError
from qlora_jax.training.console import prepare_console, report_fault, report_mistakes

if TYPE_CHECKING:
    from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes
    from qlora_jax.benchmarks.kernels import Settings, Sweep

_HELP = "python -m qlora_jax.bench --help lists every option"
_EXAMPLES = """\
examples:
  python -m qlora_jax.bench                                    the kernels of this machine's device, beside XLA
  python -m qlora_jax.bench kernels --device cpu --shapes 4096x4096 --rows 1 128
  python -m qlora_jax.bench kernels --bitsandbytes libbitsandbytes_cuda130.so --out h100.json
  python -m qlora_jax.bench demo                               the demo's training step

Exit codes: 0 done (whether or not bars hold), 2 something you can mend, 130 interrupted, 1 anything else."""
_DTYPES = {"cpu": ("bfloat16", "float32"), "gpu": ("bfloat16",)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=_HELP)

    def check_names(self, arguments: Sequence[str]) -> None:
        """Names the nearest option for an unknown one."""
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                close = difflib.get_close_matches(name, self._option_string_actions, n=1)
                raise UserError(f"unknown option {name}", fix=f"did you mean {close[0]}?" if close else _HELP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    prepare_console()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser()
        parser.check_names(given)
        options = parser.parse_args(given)
        if options.out is not None:
            _check_out(options.out)
        _check_environment()
        _demo(options) if options.what == "demo" else _kernels(options)
    except UserError as error:
        return report_mistakes(error)
    except KeyboardInterrupt:
        print("interrupted; --out holds what was measured before", file=sys.stderr)
        return 130
    except Exception:
        return report_fault()
    return 0


def _check_environment() -> None:
    from qlora_jax.nf4.environment import check_environment

    check_environment()


def _demo(options: argparse.Namespace) -> None:
    from qlora_jax.benchmarks.demo import time_demo
    from qlora_jax.benchmarks.tables import demo_table

    results = time_demo(quick=options.quick)
    report = _head("demo", options) | {"results": results}
    _write(options.out, report)
    _show(report, [demo_table(results)], options)


def _kernels(options: argparse.Namespace) -> None:
    _choose_device(options.device)
    from qlora_jax.benchmarks.bars import evaluate
    from qlora_jax.benchmarks.kernels import check_kernels, run_sweep
    from qlora_jax.benchmarks.tables import bars_table, kernels_table, memory_table

    check_kernels()
    report = _head("kernels", options)

    def take(sweep: "Sweep") -> None:
        measured = {name: getattr(sweep, name) for name in ("copy", "dequantize", "results", "left_out")}
        report.update(measured)
        report["bars"] = evaluate(report)
        _write(options.out, report)

    run_sweep(_settings(options, _peer(options.bitsandbytes)), take)
    tables = [kernels_table(report["results"]), memory_table(report), bars_table(report["bars"], report["device"])]
    _show(report, tables, options)


def _settings(options: argparse.Namespace, peer: "BitsAndBytes | None") -> "Settings":
    import jax

    from qlora_jax.benchmarks import shapes
    from qlora_jax.benchmarks.kernels import Settings

    gpu = jax.default_backend() == "gpu"
    usual = (
        (shapes.QUICK_SHAPES, shapes.QUICK_ROWS)
        if options.quick
        else (shapes.gpu_shapes(), shapes.GPU_ROWS)
        if gpu
        else (shapes.cpu_shapes(), shapes.CPU_ROWS)
    )
    return Settings(
        shapes=tuple(options.shapes or usual[0]),
        rows=tuple(options.rows or usual[1]),
        dtypes=("bfloat16",) if options.quick else _DTYPES["gpu" if gpu else "cpu"],
        repeats=3 if options.quick else 7,
        copy_bytes=2**20 if options.quick else 2**30 if gpu else 2**26,
        bitsandbytes=peer,
        seconds=60 * options.minutes,
    )


def _choose_device(device: str | None) -> None:
    """Before JAX has looked for devices.

    Raises:
      UserError: a GPU was asked for, and JAX finds none.
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if device == "gpu" and jax.default_backend() != "gpu":
        raise UserError(
            f"--device gpu, but JAX runs on {jax.default_backend()}",
            why="it finds no CUDA GPU, or has no CUDA plugin",
            fix="python -m qlora_jax.doctor says which",
        )


def _peer(path: Path | None) -> "BitsAndBytes | None":
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"--bitsandbytes {path} is no file", why="its shared library is meant", fix=_HELP)
    from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes

    return BitsAndBytes(path)


def _head(what: str, options: argparse.Namespace) -> dict[str, Any]:
    from qlora_jax.benchmarks.environment import describe

    return {"benchmark": what, **describe(), "quick": options.quick}


def _write(path: Path | None, report: dict[str, Any]) -> None:
    from qlora_jax.training.run_folder import write_atomically

    if path is not None:
        write_atomically(path, json.dumps(report, indent=2) + "\n")


def _show(report: dict[str, Any], tables: Sequence[Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


def _check_out(path: Path) -> None:
    """Refuses before minutes are spent."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise UserError(f"--out {path} {what}", why="the report is one JSON file", fix="--out bench.json")
    # Written beside, then renamed.
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path} cannot be written", why="no permission", fix="--out bench.json")


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: INxOUT, such as 4096x11008")
    in_features, out_features = text.split("x")
    return int(in_features), int(out_features)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows: 1, 2, ...")
    return int(text)


def _minutes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return float(text)


def _parser() -> _Parser:
    from qlora_jax import __version__

    parser = _Parser(
        prog="python -m qlora_jax.bench",
        description="Times the NF4 kernels, or the demo's training step, beside XLA, cuBLAS and bitsandbytes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "what",
        nargs="?",
        choices=("kernels", "demo"),
        default="kernels",
        help="kernels (default): nf4_matmul and its input gradient; demo: the demo's optimizer step, which fetches its "
        "model the first time",
    )
    add(
        "--device",
        choices=("cpu", "gpu"),
        help="where the kernels run; default: JAX's own choice. The same code and the same JSON on both",
    )
    add(
        "--shapes",
        metavar="INxOUT",
        nargs="+",
        type=_shape,
        help="weights; default: every linear of LLaMA 7B, 65B, 8B, 70B and 13B on a GPU, of SmolLM2-135M and one of "
        "4096x4096 on a CPU",
    )
    add(
        "--rows",
        metavar="M",
        nargs="+",
        type=_positive,
        help="rows of the activations; default: 1 to 16384 on a GPU, what tells most first; 1 to 768 on a CPU",
    )
    add(
        "--minutes",
        metavar="N",
        type=_minutes,
        default=9.0,
        help="begin no case after so long (9); what was left out is counted in the report",
    )
    add(
        "--bitsandbytes",
        metavar="FILE",
        type=Path,
        help="bitsandbytes' libbitsandbytes_cuda130.so: its kernels and cuBLAS become peers (torch is not needed)",
    )
    add("--json", action="store_true", help="print JSON in place of the tables")
    add("--out", type=Path, metavar="FILE", help="write the JSON to FILE as well, again after every case")
    add(
        "--quick",
        action="store_true",
        help="one shape, few repeats, the demo without peers: a smoke test, not a measurement",
    )
    add("--version", action="version", version=f"qlora_jax {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
