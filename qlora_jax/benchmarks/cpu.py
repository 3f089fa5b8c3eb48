"""nf4_matmul on the CPU beside bitsandbytes' Linear4bit and torch's dense linear, which run in a Python of their own.

Products of one size are timed in turns, ours and theirs, on the same cores. bitsandbytes multiplies in two ways: in
train() mode it dequantizes and calls torch, in eval() mode it may run a kernel of its own on weights that it has
repacked; it is compared with the faster one of each size.
"""

import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.benchmarks import hardware
from qlora_jax.benchmarks.kernels import check_kernels
from qlora_jax.benchmarks.load import OtherLoad
from qlora_jax.benchmarks.peers import Peer, PeerError
from qlora_jax.benchmarks.programs import (
    OPS,
    Weights,
    dense_product,
    make_activations,
    make_matrix,
    make_weights,
    packed_product,
)
from qlora_jax.benchmarks.shapes import Size
from qlora_jax.benchmarks.timing import Program, interleave, ratios, spread
from qlora_jax.nf4.streaming import quantize_rows

SHAPES = ((4096, 4096), (4096, 11008))
ROWS = (1, 8, 32, 128, 512, 2048)
# Where reading the weight takes most of the time, a program takes so many in turn, which no cache holds.
COPIES, _COPIED_ROWS = 8, 32
# From here on products are judged by the rate of their sums; a float32 product of 512 rows is at its full rate.
PEAK_ROWS = 128
_FLOAT32_ROWS = 512
# Threads of the other process have gone to sleep after so long.
_REST = 0.03
_MIN_SECONDS = 0.03
# Relative Frobenius distance of two products with the same 4-bit weight: roundings to bfloat16, of scales as well.
_ALIKE = 1e-2
_DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: `shapes` (in, out), `rows`, how often, and after how many seconds no case is begun."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    repeats: int = 7
    seconds: float = float("inf")
    copies: int = COPIES


@dataclasses.dataclass
class Sweep:
    """What was measured, growing; fields as in bench.py's docstring."""

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    quantize: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    eval_kernel: str | None = None
    left_out: int = 0


@dataclasses.dataclass
class _PeerProgram:
    """A way to multiply in the peer's process, which times itself."""

    peer: Peer
    name: str
    calls: int

    def run(self, times: int) -> None:
        self.seconds(times)

    def seconds(self, times: int) -> float:
        return float(self.peer.call("seconds", name=self.name, times=times))


@dataclasses.dataclass
class _Repeated:
    """A function of arrays, made `calls` times in a run."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    calls: int = 1

    def run(self, times: int) -> None:
        for _ in range(times * self.calls):
            jax.block_until_ready(self.function(*self.operands))


def run_sweep(
    settings: Settings, peer: Peer | None, threads: int, after_each: Callable[[Sweep], None] = lambda sweep: None
) -> Sweep:
    """Measures quantization and every product; `after_each` sees what there is so far.

    Args:
      settings: what is measured.
      peer: with the calls of peer_linear.py; None: XLA's dense product is the only one beside ours.
      threads: that both run on.

    Raises:
      UserError: the compiled kernels are not there, or the peer's process ended.
    """
    check_kernels()
    began = time.perf_counter()
    sweep = Sweep()
    todo = [(shape, rows) for shape in settings.shapes for rows in settings.rows]
    made: tuple[tuple[int, int], int] | None = None
    weights: Weights | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for done, (shape, rows) in enumerate(todo):
            if time.perf_counter() - began > settings.seconds:
                sweep.left_out = len(OPS) * (len(todo) - done)
                _say(f"time is up: {sweep.left_out} cases are left out")
                after_each(sweep)
                break
            copies = settings.copies if rows <= _COPIED_ROWS else 1
            if weights is None or made != (shape, copies):
                weights = None  # the old copies make room first
                made, weights = (shape, copies), make_weights(shape, _DTYPE, copies)
                if peer is not None:
                    sweep.eval_kernel = _send_weight(peer, shape, copies, Path(scratch))
            sweep.results += _measure(Size(*shape, rows), weights, peer, settings, Path(scratch))
            if shape not in [(case["in"], case["out"]) for case in sweep.quantize]:
                sweep.quantize.append(_time_quantize(shape, peer, copies, threads, settings))
            after_each(sweep)
    return sweep


def _measure(
    size: Size, weights: Weights, peer: Peer | None, settings: Settings, scratch: Path
) -> list[dict[str, Any]]:
    activations = make_activations(size, _DTYPE, weights.copies)
    if peer is not None:
        paths = {name: _write(scratch / name, activations[op][0]) for name, op in (("x", "forward"), ("dy", "dx"))}
        peer.call("load_activations", float32_rows=_FLOAT32_ROWS, **paths)
    results = []
    for op in OPS:
        xs = activations[op]
        programs: dict[str, Program] = {
            "ours": packed_product(op, xs, weights, "auto").compile(),
            "dense": dense_product(op, xs, weights).compile(),
        }
        if peer is not None:
            for way in ("torch", "bnb_train", *(["bnb_eval"] if op == "forward" else [])):
                programs[way] = _PeerProgram(peer, f"{op} {way}", weights.copies)
        float32 = _float32_programs(xs[0], weights, peer) if size.rows >= PEAK_ROWS and op == "forward" else {}
        case = {
            "op": op,
            "in": size.in_features,
            "out": size.out_features,
            "rows": size.rows,
            "dtype": _DTYPE,
            "copies": weights.copies,
            "route": "ours",
        }
        _say(" ".join(f"{key}={case[key]}" for key in ("op", "in", "out", "rows")))
        results.append(case | _timed(size, op, programs, float32, peer, settings, scratch))
    return results


def _timed(
    size: Size,
    op: str,
    programs: Mapping[str, Program],
    float32: Mapping[str, Program],
    peer: Peer | None,
    settings: Settings,
    scratch: Path,
) -> dict[str, Any]:
    errors: dict[str, str] = {}
    sound = {**programs, **float32}
    if peer is not None:
        distances = _distances(op, programs, peer, scratch, errors)
        sound = {name: program for name, program in sound.items() if name not in errors}
    else:
        distances = {}
    load = OtherLoad([] if peer is None else [peer.pid])
    seconds = interleave(sound, repeats=settings.repeats, min_seconds=_MIN_SECONDS, rest=_REST)
    flops = hardware.product_flops(size.rows, *size.shape)
    spreads = {name: spread(own) for name, own in seconds.items() if name not in float32}
    gains = {way: own for way, own in ratios(seconds, "ours").items() if way not in float32}
    modes = [mode for mode in ("bnb_train", "bnb_eval") if mode in gains]
    report: dict[str, Any] = {
        "errors": errors,
        "distance": distances,
        "other_load": load.share(),
        "seconds": spreads,
        "ratio": gains,
        "flops_per_second": {name: flops / own["median"] for name, own in spreads.items()},
        "bitsandbytes": max(modes, key=lambda mode: gains[mode]["median"], default=None),
    }
    if float32:
        rows = min(size.rows, _FLOAT32_ROWS)
        rates = [[hardware.product_flops(rows, *size.shape) / own for own in seconds[way]] for way in float32]
        peaks = [max(turn) for turn in zip(*rates, strict=True)]
        own = [flops / elapsed for elapsed in seconds["ours"]]
        report["float32_flops_per_second"] = spread(peaks)
        report["of_float32"] = spread([rate / peak for rate, peak in zip(own, peaks, strict=True)])
    return report


def _float32_programs(x: jax.Array, weights: Weights, peer: Peer | None) -> dict[str, Program]:
    """Dense float32 products: the quickest stands for the peak of the cores' fused multiply-add units."""
    operands = x[:_FLOAT32_ROWS].astype(jnp.float32), weights.matrices[0].astype(jnp.float32)
    programs: dict[str, Program] = {"float32_xla": _Repeated(jax.jit(jnp.matmul), operands)}
    if peer is not None:
        programs["float32_torch"] = _PeerProgram(peer, "float32", 1)
    return programs


def _distances(
    op: str, programs: Mapping[str, Any], peer: Peer, scratch: Path, errors: dict[str, str]
) -> dict[str, float]:
    """Relative distance of our result from each of bitsandbytes'; an error where they are not the same product."""
    for name in ("ours", "dense"):
        programs[name].run(1)
    ours = programs["ours"].last_result()
    distances = {}
    for way in programs:
        if not isinstance(programs[way], _PeerProgram):
            continue
        path = scratch / "result.npy"
        try:
            peer.call("save_result", name=programs[way].name, path=str(path))
        except PeerError as error:
            errors[way] = str(error)
            continue
        result = np.load(path)
        if way != "torch":  # whose weight is not rounded to 4 bits
            distances[way] = float(np.linalg.norm(ours - result) / np.linalg.norm(result))
            if not distances[way] <= _ALIKE:
                errors[way] = f"its result is {distances[way]:.3g} away from ours"
    return distances


def _time_quantize(
    shape: tuple[int, int], peer: Peer | None, copies: int, threads: int, settings: Settings
) -> dict[str, Any]:
    """A bfloat16 weight `[out, in]`, as a checkpoint has it, by what load_model and convert do."""
    weight = np.ascontiguousarray(np.asarray(make_matrix(shape)).T)
    how: dict[str, Any] = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    programs: dict[str, Program] = {"ours": _Repeated(functools.partial(quantize_rows, **how), (weight,))}
    if peer is not None:
        programs["bnb"] = _PeerProgram(peer, "quantize", copies)
    _say(f"quantize in={shape[0]} out={shape[1]}")
    seconds = interleave(programs, repeats=settings.repeats, min_seconds=_MIN_SECONDS, rest=_REST)
    spreads = {name: spread(own) for name, own in seconds.items()}
    rates = {name: 2 * shape[0] * shape[1] / own["median"] / threads for name, own in spreads.items()}
    return {
        "in": shape[0],
        "out": shape[1],
        "route": "ours",
        "errors": {},
        "seconds": spreads,
        "ratio": ratios(seconds, "ours"),
        "bytes_per_second_and_core": rates,
    }


def _send_weight(peer: Peer, shape: tuple[int, int], copies: int, scratch: Path) -> str | None:
    path = _write(scratch / "weight", make_matrix(shape).T)
    answer = peer.call("load_weight", path=path, copies=copies)
    return answer["eval_kernel"]  # type: ignore[no-any-return]


def _write(path: Path, values: jax.Array) -> str:
    """bfloat16 numbers as their bits, for a Python that may not know the type."""
    path = path.with_suffix(".npy")
    np.save(path, np.ascontiguousarray(np.asarray(values)).view(np.uint16))
    return str(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
