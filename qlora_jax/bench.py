"""The timing door: `python -m qlora_jax.bench [kernels|cpu|step|demo|datatypes] [--out FILE] ...`.

`kernels` times nf4_matmul and its input gradient beside their peers, dequantization beside a copy, and says which bars
hold; `cpu` does so on a CPU, beside bitsandbytes and torch in another Python (`--peers`); `step` times an optimizer
step of a small LLaMA, `demo` that of the demo; `datatypes` measures the perplexity of each 4-bit type. The report is
one JSON object:

    benchmark, date, versions, platform, device, compute_capability, published (data sheet), dispatch, cpu, threads, ...
    results     kernels, cpu: one object for each product and direction: op ("forward" or "dx"), in, out, rows, dtype,
                models, copies (weights rotated over), route (ours: "skinny", "tile", "dequantize", or "ffi", "xla";
                cpu: "ours"), seconds of one product by way (median, low, high: quartiles), ratio (ours / way, from the
                same turns), bitsandbytes (the way that is its own: "bnb_fused" or "bnb_dequantize"; cpu: the faster of
                its modes, "bnb_train" or "bnb_eval"), floor_seconds (published limits), bytes_per_second,
                flops_per_second, distance (from the dense result; cpu: of ours from bitsandbytes'), errors by way;
                cpu, 128 rows and more: float32_flops_per_second (the quickest dense float32 product, by XLA or torch:
                what stands for the peak of the cores' multiply-add units), of_float32 (our rate as a share of it)
    other_load  of all cores' time, what other processes took (0 to 1; cpu: in each of the results)
    copy, dequantize    bytes moved in a second by a copy, and by dequantization of each shape
    quantize    cpu: seconds, ratio and bytes of bfloat16 a second on each core, for each shape
    eval_kernel cpu: what bitsandbytes' eval() mode ran on (see peer_linear.py)
    peers       versions of what ran in the other Pythons
    left_out    cases for which there was no time
    bars        bar, least, cases, missed, worst, holds

What `results` of `step`, `demo` and `datatypes` are, their modules say (benchmarks/step.py, demo.py, datatypes.py).
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.benchmarks.options import make_parser
from qlora_jax.errors import UserError
from qlora_jax.training.console import prepare_console, report_fault, report_mistakes

if TYPE_CHECKING:
    from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes
    from qlora_jax.benchmarks.kernels import Settings, Sweep
    from qlora_jax.benchmarks.peers import Peer

_DTYPES = {"cpu": ("bfloat16", "float32"), "gpu": ("bfloat16",)}
_MINUTES, _CPU_MINUTES = 9.0, 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    prepare_console()
    try:
        options = make_parser().read(list(sys.argv[1:] if arguments is None else arguments))
        if options.threads is not None:
            _pin(options.threads)
        _check_environment()
        _DOORS[options.what](options)
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


def _pin(threads: int) -> None:
    """Keeps this process, and those that it starts, on so many cores, for which XLA then makes threads.

    Raises:
      UserError: the machine has fewer, or cannot do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            "--threads is for Linux", why="this system does not bind processes to cores", fix="leave it out"
        )
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f"--threads {threads}, but this process may run on {len(cores)} cores", fix="a smaller number")
    os.sched_setaffinity(0, cores[:threads])


def _demo(options: argparse.Namespace) -> None:
    from qlora_jax.benchmarks.cpu_bars import evaluate_demo
    from qlora_jax.benchmarks.demo import time_demo
    from qlora_jax.benchmarks.load import OtherLoad
    from qlora_jax.benchmarks.tables import bars_table, runs_table

    with _peers(options, peers="peer_peft.py") as peers:
        report = _head("demo", options, peers)
        load = OtherLoad([peer.pid for peer in peers.values()])
        report["results"] = time_demo(quick=options.quick, peer=peers.get("peers"))
        report["other_load"] = load.share()
        report["bars"] = evaluate_demo(report["results"])
    _write(options.out, report)
    tables = [runs_table("a step of the demo", report["results"])]
    _show(report, [*tables, *([bars_table(report["bars"], _machine(report))] if peers else [])], options)


def _step(options: argparse.Namespace) -> None:
    from qlora_jax.benchmarks import step
    from qlora_jax.benchmarks.cpu_bars import evaluate_step
    from qlora_jax.benchmarks.tables import bars_table, runs_table

    with _peers(options, peers="peer_peft.py", qwix="peer_qwix.py") as started:
        names = {"peers": "peft", "qwix": "qwix"}
        report = _head("step", options, started)
        shape, repeats = (step.QUICK, 3) if options.quick else (step.SHAPE, 9)
        report |= step.time_step(shape, {names[name]: peer for name, peer in started.items()}, repeats=repeats)
        report["bars"] = evaluate_step(report["results"])
    _write(options.out, report)
    title = f"a QLoRA step of {shape.tokens} tokens, hidden {shape.hidden_size}, {shape.num_hidden_layers} layers"
    _show(report, [runs_table(title, report["results"]), bars_table(report["bars"], _machine(report))], options)


def _cpu(options: argparse.Namespace) -> None:
    _choose_device("cpu")
    from qlora_jax.benchmarks import cpu
    from qlora_jax.benchmarks.cpu_bars import evaluate
    from qlora_jax.benchmarks.environment import threads
    from qlora_jax.benchmarks.kernels import check_kernels
    from qlora_jax.benchmarks.shapes import QUICK_ROWS, QUICK_SHAPES
    from qlora_jax.benchmarks.tables import bars_table, cpu_table, quantize_table

    check_kernels()
    shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if options.quick else (cpu.SHAPES, cpu.ROWS)
    settings = cpu.Settings(
        shapes=tuple(options.shapes or shapes),
        rows=tuple(options.rows or rows),
        repeats=3 if options.quick else 9,
        seconds=60 * (_CPU_MINUTES if options.minutes is None else options.minutes),
        copies=2 if options.quick else cpu.COPIES,
    )
    with _peers(options, peers="peer_linear.py") as peers:
        report = _head("cpu", options, peers)

        def take(sweep: cpu.Sweep) -> None:
            report.update({name: getattr(sweep, name) for name in ("results", "quantize", "eval_kernel", "left_out")})
            report["bars"] = evaluate(report)
            _write(options.out, report)

        cpu.run_sweep(settings, peers.get("peers"), threads(), take)
    tables = [cpu_table(report), quantize_table(report["quantize"]), bars_table(report["bars"], _machine(report))]
    _show(report, tables, options)


def _datatypes(options: argparse.Namespace) -> None:
    from qlora_jax.benchmarks import datatypes
    from qlora_jax.benchmarks.tables import datatypes_table

    report = _head("datatypes", options, {})

    def take(study: dict[str, Any]) -> None:
        report.update(study)
        _write(options.out, report)

    types, windows = (datatypes.QUICK, 4) if options.quick else (datatypes.DATATYPES, datatypes.WINDOWS)
    datatypes.run_study(types, windows=options.windows or windows, after_each=take)
    _show(report, [datatypes_table(report)], options)


def _kernels(options: argparse.Namespace) -> None:
    _choose_device(options.device)
    from qlora_jax.benchmarks.bars import evaluate
    from qlora_jax.benchmarks.kernels import check_kernels, run_sweep
    from qlora_jax.benchmarks.tables import bars_table, kernels_table, memory_table

    check_kernels()
    report = _head("kernels", options, {})

    def take(sweep: "Sweep") -> None:
        measured = {name: getattr(sweep, name) for name in ("copy", "dequantize", "results", "left_out")}
        report.update(measured)
        report["bars"] = evaluate(report)
        _write(options.out, report)

    run_sweep(_settings(options, _library(options.bitsandbytes)), take)
    title = f"what is asked of an H100; this is: {report['device']}"
    _show(report, [kernels_table(report["results"]), memory_table(report), bars_table(report["bars"], title)], options)


_DOORS = {"kernels": _kernels, "cpu": _cpu, "step": _step, "demo": _demo, "datatypes": _datatypes}


def _settings(options: argparse.Namespace, library: "BitsAndBytes | None") -> "Settings":
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
        bitsandbytes=library,
        seconds=60 * (_MINUTES if options.minutes is None else options.minutes),
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


def _library(path: Path | None) -> "BitsAndBytes | None":
    if path is None:
        return None
    if not path.is_file():
        raise UserError(
            f"--bitsandbytes {path} is no file",
            why="its shared library is meant",
            fix="--bitsandbytes .../site-packages/bitsandbytes/libbitsandbytes_cuda130.so",
        )
    from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes

    return BitsAndBytes(path)


@contextlib.contextmanager
def _peers(options: argparse.Namespace, **calls: str) -> "Iterator[dict[str, Peer]]":
    """Processes of the Pythons that options name, by option; they end with the block.

    Raises:
      UserError: one cannot be started, or a call failed in one.
    """
    from qlora_jax.benchmarks.environment import threads
    from qlora_jax.benchmarks.peers import Peer, PeerError

    with contextlib.ExitStack() as stack:
        started = {
            option: stack.enter_context(Peer(f"--{option}", getattr(options, option), file, threads()))
            for option, file in calls.items()
            if getattr(options, option) is not None
        }
        try:
            yield started
        except PeerError as error:
            raise UserError(
                "a peer cannot do what is to be measured", why=str(error), fix="another version?"
            ) from error


def _head(what: str, options: argparse.Namespace, peers: "dict[str, Peer]") -> dict[str, Any]:
    from qlora_jax.benchmarks.environment import describe

    versions = {name: peer.versions for name, peer in peers.items()}
    return {"benchmark": what, **describe(), "peers": versions, "quick": options.quick}


def _machine(report: dict[str, Any]) -> str:
    """The title of a CPU's bars."""
    from qlora_jax.benchmarks.cpu_bars import uses_amx

    amx = "with AMX" if uses_amx(report) else "without AMX"
    return f"what is asked of a CPU; this is: {report['cpu']}, {report['threads']} threads, {amx}"


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


if __name__ == "__main__":
    sys.exit(main())
