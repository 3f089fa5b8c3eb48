"""The sweep over shapes and numbers of rows: every way to multiply, timed in turns, each result checked."""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qlora_jax.benchmarks import hardware
from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes, uses_fused
from qlora_jax.benchmarks.programs import (
    OPS,
    Source,
    Weights,
    copied,
    dense_product,
    dequantized,
    make_activations,
    make_weights,
    packed_product,
)
from qlora_jax.benchmarks.shapes import Size, sizes
from qlora_jax.benchmarks.timing import Program, interleave, ratios, spread
from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor, kernel_report
from qlora_jax.nf4.dispatch import cuda_route
from qlora_jax.nf4.kernels import chosen_kernels, platform_name

# Rows at which each way is timed beside the one that the dispatch table picks, so that its thresholds can be moved.
_ROUTE_ROWS = {"skinny": (1, 256), "tile": (16, 4096), "dequantize": (64, 1 << 62)}
_FUSED_PEER_ROWS = 64
# Results of up to this many rows are brought to the host and compared.
_CHECKED_ROWS = 256
# Relative Frobenius distance of two ways' results: two roundings to bfloat16, and kernels that round the scaled weight.
_ALIKE = 1e-2
_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """What a sweep is to measure.

    Attributes:
      shapes: `(in, out)` of the weights.
      rows: numbers of rows of x.
      dtypes: of activations.
      repeats: measurements of each program.
      copy_bytes: read by the copy that dequantization is compared with.
      bitsandbytes: its kernels, or None.
      seconds: after this time no more cases are begun.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    dtypes: tuple[str, ...]
    repeats: int
    copy_bytes: int = _COPY_BYTES
    bitsandbytes: BitsAndBytes | None = None
    seconds: float = float("inf")


@dataclass
class Sweep:
    """Measurements, growing: `results` of products, `dequantize` and `copy` of memory, `left_out` cases."""

    results: list[dict[str, Any]] = field(default_factory=list)
    dequantize: list[dict[str, Any]] = field(default_factory=list)
    copy: dict[str, Any] | None = None
    left_out: int = 0


def run_sweep(settings: Settings, after_each: Callable[[Sweep], None] = lambda sweep: None) -> Sweep:
    """Measures memory first, then every product; `after_each` sees what there is so far.

    A program that fails leaves its error in its case, and the sweep goes on.

    Raises:
      UserError: the compiled kernels of the default device are not there.
    """
    check_kernels()
    began = time.perf_counter()
    sweep = Sweep()
    for _ in _measure_memory(settings, sweep):
        after_each(sweep)
    todo = [(size, dtype) for size in sizes(settings.shapes, settings.rows) for dtype in settings.dtypes]
    made: Any = None
    weights: Weights | None = None
    for done, (size, dtype) in enumerate(todo):
        if time.perf_counter() - began > settings.seconds:
            sweep.left_out = len(OPS) * (len(todo) - done)
            _say(f"time is up: {sweep.left_out} cases are left out")
            after_each(sweep)
            break
        key = (size.shape, dtype, copies_for(size.rows, size.shape, dtype))
        if weights is None or made != key:
            weights = None  # the old copies make room first
            made, weights = key, make_weights(*key)
        sweep.results += measure(size, dtype, weights, settings)
        after_each(sweep)
    return sweep


def check_kernels() -> None:
    """UserError where the default device has no compiled kernels."""
    platform = platform_name(jax.default_backend())
    status = kernel_report().get(platform, "not built")
    if status != "loaded":
        raise UserError(
            f"the compiled kernels for {platform} are not there: {status}",
            why="there is nothing to compare with XLA",
            fix="python -m qlora_jax.doctor says why, and how to get them",
        )


def copies_for(rows: int, shape: tuple[int, int], dtype: str) -> int:
    """Copies of a weight to rotate over (see hardware.rotated_copies)."""
    sheet = hardware.published(jax.devices()[0].device_kind)
    item_bytes = np.dtype(jax.numpy.dtype(dtype)).itemsize
    return hardware.rotated_copies(
        hardware.product_bytes(rows, *shape, item_bytes=item_bytes),
        hardware.floor_seconds(rows, *shape, sheet) if sheet else None,
        on_gpu=_on_gpu(),
        sheet=sheet,
    )


def measure(size: Size, dtype: str, weights: Weights, settings: Settings) -> list[dict[str, Any]]:
    """Both directions of one product (see the fields in bench.py's docstring)."""
    activations = make_activations(size, dtype, weights.copies)
    ours = {op: route(op, size.rows, weights.stack, dtype) for op in OPS}
    sources: dict[tuple[str, str], Source] = {}
    errors: dict[str, dict[str, str]] = {op: {} for op in OPS}
    for op in OPS:
        wanted = {
            name: functools.partial(packed_product, op, activations[op], weights, name)
            for name in routes(size.rows, ours[op], weights.stack, dtype)
        }
        wanted["dense"] = functools.partial(dense_product, op, activations[op], weights)
        for name, lower in wanted.items():
            _attempt(sources, errors, op, name, lower)
    programs: dict[tuple[str, str], Program] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        compiling = {key: pool.submit(source.compile) for key, source in sources.items()}
        for (op, name), future in compiling.items():
            _attempt(programs, errors, op, name, future.result)
    if settings.bitsandbytes is not None:
        for (op, name), make in _peers(settings.bitsandbytes, size, activations, weights).items():
            _attempt(programs, errors, op, name, make)
    results = []
    for op in OPS:
        own = {name: program for (of, name), program in programs.items() if of == op}
        case = {
            "op": op,
            "in": size.in_features,
            "out": size.out_features,
            "rows": size.rows,
            "dtype": dtype,
            "models": size.models,
            "copies": weights.copies,
            "route": ours[op],
        }
        _say(" ".join(f"{key}={case[key]}" for key in ("op", "in", "out", "rows", "dtype", "route")))
        results.append(case | _timed(size, op, own, ours[op], errors[op], settings))
    return results


def routes(rows: int, ours: str, w: NF4Tensor, dtype: str) -> list[str]:
    """The way that is taken, and the others worth timing beside it."""
    if not _on_gpu():
        return list(dict.fromkeys([ours, "ffi", "xla"]))
    fused = w.layout == "fragments" and dtype != "float32"
    others = [name for name, (low, high) in _ROUTE_ROWS.items() if low <= rows <= high]
    return list(dict.fromkeys([ours, *(name for name in others if fused or name == "dequantize")]))


def route(op: str, rows: int, w: NF4Tensor, dtype: str) -> str:
    """How nf4_matmul multiplies here: on a GPU "skinny", "tile" or "dequantize", else "ffi" or "xla"."""
    if _on_gpu():
        return cuda_route(rows, w.layer(0), dtype, input_gradient=op == "dx")
    return chosen_kernels()


def _peers(
    peer: BitsAndBytes, size: Size, activations: Mapping[str, list[jax.Array]], weights: Weights
) -> dict[tuple[str, str], Callable[[], Program]]:
    """cuBLAS and bitsandbytes' ways, each to be recorded as a graph."""
    makers: dict[tuple[str, str], Callable[[], Program]] = {}
    for op, xs in activations.items():
        makers[op, "cublas"] = functools.partial(peer.dense_product, op, xs, weights)
        makers[op, "bnb_dequantize"] = functools.partial(peer.dequantized_product, op, xs, weights)
    if size.rows <= _FUSED_PEER_ROWS or _fused_rule(size):
        makers["forward", "bnb_fused"] = functools.partial(peer.fused_product, activations["forward"], weights)
    return makers


def _timed(
    size: Size, op: str, programs: Mapping[str, Program], ours: str, errors: dict[str, str], settings: Settings
) -> dict[str, Any]:
    report: dict[str, Any] = {"errors": errors}
    if ours not in programs:
        return report | {"seconds": {}, "ratio": {}}
    try:
        seconds = interleave(programs, repeats=settings.repeats)
    except Exception as error:
        errors["timing"] = _short(error)
        return report | {"seconds": {}, "ratio": {}}
    if size.rows <= _CHECKED_ROWS:
        report["distance"] = _distances(programs, errors)
    spreads = {name: spread(times) for name, times in seconds.items()}
    features = size.shape
    sheet = hardware.published(jax.devices()[0].device_kind)
    moved, flops = hardware.product_bytes(size.rows, *features), hardware.product_flops(size.rows, *features)
    report |= {
        "seconds": spreads,
        "ratio": ratios(seconds, ours),
        "bitsandbytes": _peer_path(size, op, spreads),
        "floor_seconds": hardware.floor_seconds(size.rows, *features, sheet) if sheet else None,
        "bytes_per_second": moved / spreads[ours]["median"],
        "flops_per_second": {name: flops / own["median"] for name, own in spreads.items()},
    }
    return report


def _distances(programs: Mapping[str, Any], errors: dict[str, str]) -> dict[str, float]:
    """Relative Frobenius distance of each result from the dense product's; what is far is an error."""
    if "dense" not in programs:
        return {}
    expected = programs["dense"].last_result()
    size = np.linalg.norm(expected)
    distances = {}
    for name, program in programs.items():
        if name != "dense":
            distances[name] = float(np.linalg.norm(program.last_result() - expected) / size)
            if not distances[name] <= _ALIKE:
                errors[name] = f"its result is {distances[name]:.3g} away from the dense product's"
    return distances


def _peer_path(size: Size, op: str, spreads: Mapping[str, Any]) -> str | None:
    """The column that is bitsandbytes' own way for this product; where its rule is not known, its quicker one."""
    columns = [name for name in ("bnb_fused", "bnb_dequantize") if name in spreads]
    rule = _fused_rule(size) if op == "forward" else False
    if rule is not None:
        columns = [name for name in columns if (name == "bnb_fused") == rule]
    return min(columns, key=lambda name: spreads[name]["median"], default=None)


def _fused_rule(size: Size) -> bool | None:
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    multiprocessors = int(getattr(device, "core_count", 1))
    return uses_fused(size.rows, *size.shape, capability=capability, multiprocessors=multiprocessors)


def _measure_memory(settings: Settings, sweep: Sweep) -> Iterator[None]:
    """The copy, and then each shape's dequantization beside it."""
    numbers = settings.copy_bytes // 2
    ways = {"kernel": True, "driver": False}
    copies: dict[str, Program] = {name: copied(numbers, 2, negate=negate).compile() for name, negate in ways.items()}
    seconds = {name: spread(own) for name, own in interleave(copies, repeats=settings.repeats).items()}
    moved = 2 * 2 * numbers
    rate = moved / min(own["median"] for own in seconds.values())
    sweep.copy = {"bytes": moved, "seconds": seconds, "bytes_per_second": rate}
    yield
    for shape in settings.shapes:
        case: dict[str, Any] = {"in": shape[0], "out": shape[1], "models": Size(*shape, 1).models}
        try:
            sweep.dequantize.append(case | _time_dequantize(shape, settings, rate))
        except Exception as error:
            sweep.dequantize.append(case | {"errors": {"ours": _short(error)}})
        yield


def _time_dequantize(shape: tuple[int, int], settings: Settings, copy_rate: float) -> dict[str, Any]:
    moved = (hardware.PACKED_BYTES_PER_WEIGHT + 2) * shape[0] * shape[1]
    sheet = hardware.published(jax.devices()[0].device_kind)
    copies = hardware.rotated_copies(moved, None, on_gpu=_on_gpu(), sheet=sheet)
    program = dequantized(make_weights(shape, "bfloat16", copies), "auto").compile()
    seconds = spread(interleave({"ours": program}, repeats=settings.repeats)["ours"])
    rate = moved / seconds["median"]
    report = {"copies": copies, "seconds": {"ours": seconds}, "bytes_per_second": rate, "errors": {}}
    return report | {"of_copy": rate / copy_rate}


def _attempt(
    programs: dict[tuple[str, str], Any],
    errors: dict[str, dict[str, str]],
    op: str,
    name: str,
    make: Callable[[], Any],
) -> None:
    try:
        programs[op, name] = make()
    except Exception as error:
        errors[op][name] = _short(error)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
