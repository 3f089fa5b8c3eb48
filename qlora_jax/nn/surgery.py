"""quantize_model: swaps the `nnx.Linear` layers of any NNX model for 4-bit ones, in place."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.nf4.blockwise import FLOATS
from qlora_jax.nn.dense import freeze, nf4_dense, not_plain
from qlora_jax.nn.lora import check_adapter, lora_a_init
from qlora_jax.nn.report import QuantizeReport, Swap
from qlora_jax.nn.traversal import Path, children, dotted, matching, replace_at, require_matches, walk

M = TypeVar("M")

# Output layers: one quantized layer there costs more in the loss than any other, and is rarely worth its bytes.
DEFAULT_SKIP = ("lm_head", "head", "output")


@dataclasses.dataclass
class _Layer:
    """A module that holds a matrix, with every path that leads to it."""

    module: Any
    paths: list[Path]


def quantize_model(
    model: M,
    *,
    rank: int = 0,
    alpha: float = 16.0,
    dropout: float = 0.0,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    a_init: Any = lora_a_init,
    rngs: nnx.Rngs | PRNGKeyArray | None = None,
    dry_run: bool = False,
) -> tuple[M, QuantizeReport]:
    """Swaps every `nnx.Linear` of a model for an nf4_dense with the same weights, in place.

    Only modules of the very type `nnx.Linear` are swapped, wherever they hang: attributes, nnx.List, nnx.Dict,
    nnx.Sequential, Python lists, tuples and dicts. A module reachable by several paths becomes one new module on all of
    them. Kernels `[L, in, out]` stay stacked. Everything is checked before anything is changed.

    Args:
      model: an NNX module (or a container of modules).
      rank: rank of the adapters; 0: none.
      alpha, dropout, quant_type, block_size, double_quant, a_init: see nf4_dense.
      include: whole dotted components ("q_proj", "mlp.up") of the paths to swap; None: all of them.
      skip: whole dotted components of the paths to leave dense.
      rngs: keys for the adapters (stream `params`), or one key; None: `nnx.Rngs(0)`.
      dry_run: only report.

    Returns:
      The model (a new module only where `model` itself is an `nnx.Linear`) and the report of what was swapped and what
      was left dense, with the reasons.

    Raises:
      UserError: nothing to swap, a pattern of `include` that matches nothing, or layers that cannot be swapped as
        asked: quantized already, a custom dot_general, an abstract, traced or non-finite kernel.
    """
    check_adapter(rank, alpha, dropout)
    include = (include,) if isinstance(include, str) else include
    skip = (skip,) if isinstance(skip, str) else skip
    layers, owners = _survey(model)
    require_matches(include or (), [path for layer in layers for path in layer.paths], "include")
    report = QuantizeReport({}, {})
    chosen: list[_Layer] = []
    refusals: list[UserError] = []
    for layer in layers:
        if reason := _why_not(layer, include, skip, owners):
            report.kept.update((dotted(path), reason) for path in layer.paths)
        elif problem := _refusal(layer.module):
            refusals.append(UserError(f"{dotted(layer.paths[0])}: {problem}", fix=f"skip={dotted(layer.paths[0])!r}"))
        else:
            chosen.append(layer)
    if refusals:
        raise refusals[0] if len(refusals) == 1 else UserErrors(refusals)
    if not chosen:
        raise UserError(
            f"no nnx.Linear to quantize in this {type(model).__name__}",
            why="; ".join(f"{path}: {reason}" for path, reason in list(report.kept.items())[:8]) or "it has none",
            fix="nf4_dense.from_kernel(kernel) quantizes one weight of any module",
        )
    del layers  # With the last reference to a swapped layer goes its dense kernel.
    stream = nnx.Rngs(0) if rngs is None else rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    while chosen:
        layer = chosen.pop(0)
        kernel = layer.module.kernel.get_value()
        frozen = jax.eval_shape(lambda kernel: freeze(kernel, **options), kernel)
        stored = frozen.nbytes if isinstance(frozen, NF4Tensor) else kernel.nbytes
        swap = Swap(tuple(kernel.shape), kernel.nbytes, stored)
        report.swapped.update((dotted(path), swap) for path in layer.paths)
        if dry_run:
            continue
        dense = nf4_dense.from_linear(
            layer.module, rank=rank, alpha=alpha, dropout=dropout, a_init=a_init, rngs=stream, **options
        )
        for path in layer.paths:
            model = replace_at(model, path, dense)
    return model, report


def _survey(model: Any) -> tuple[list[_Layer], dict[int, list[Path]]]:
    """The modules that hold a matrix, and for each variable the paths of its holders (one path per holder)."""
    layers: dict[int, _Layer] = {}
    holders: dict[int, dict[int, Path]] = {}
    for path, node in walk(model):
        if isinstance(node, nnx.Variable):
            continue
        if isinstance(node, nnx.Module) and _has_matrix(node):
            layers.setdefault(id(node), _Layer(node, [])).paths.append(path)
        for name, child in children(node):
            if isinstance(child, nnx.Variable):
                holders.setdefault(id(child), {}).setdefault(id(node), (*path, name))
    return list(layers.values()), {variable: list(paths.values()) for variable, paths in holders.items()}


def _has_matrix(module: nnx.Module) -> bool:
    matrices = (getattr(module, "kernel", None), getattr(module, "embedding", None))
    return any(isinstance(matrix, nnx.Variable) for matrix in matrices)


def _why_not(
    layer: _Layer, include: Sequence[str] | None, skip: Sequence[str], owners: dict[int, list[Path]]
) -> str | None:
    """Why a layer stays dense without being an error."""
    for path in layer.paths:
        if pattern := matching(path, skip):
            return f"skipped ({pattern!r})"
    if include is not None and not any(matching(path, include) for path in layer.paths):
        return "not in include"
    module = layer.module
    if isinstance(module, nf4_dense):
        return None if isinstance(module.kernel.get_value(), NF4Tensor) else "an nf4_dense with a dense kernel"
    if type(module) is not nnx.Linear:
        kind = "a subclass of nnx.Linear" if isinstance(module, nnx.Linear) else "not an nnx.Linear"
        return f"{type(module).__name__} is {kind}"
    if others := [path for path in owners[id(module.kernel)] if path[:-1] not in layer.paths]:
        return f"its kernel is tied to {dotted(others[0])}"
    return None


def _refusal(module: Any) -> str | None:
    """Why a layer that was asked for cannot be swapped."""
    if isinstance(module, nf4_dense):
        return "quantized already"
    if problem := not_plain(module):
        return problem
    kernel = module.kernel.get_value()
    if isinstance(kernel, jax.core.Tracer):
        return "its kernel is a tracer: call quantize_model outside jit, grad and vmap"
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return "its kernel is abstract (nnx.eval_shape): load the weights first"
    if str(kernel.dtype) not in FLOATS or kernel.ndim not in (2, 3) or kernel.size == 0:
        return f"its kernel is {kernel.dtype}{list(kernel.shape)}, not a floating [in, out] or [L, in, out]"
    if not jnp.isfinite(kernel).all():
        return "its kernel has NaN or infinite values"
    return None
