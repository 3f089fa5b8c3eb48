"""One traced program for several platforms: each gets its own code when it is compiled, not when it is traced."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from qlora_jax.nf4.kernels import cuda_kernels_loaded


def per_platform(
    *args: Any, cuda: Callable[..., Any], default: Callable[..., Any], cpu: Callable[..., Any] | None = None
) -> Any:
    """`cuda(*args)` in programs compiled for CUDA, `cpu(*args)` and `default(*args)` in others.

    Every branch is traced, and only that of the platform is compiled. Where no CUDA kernels are loaded, `default`
    alone is traced, or `cpu` where that is JAX's default backend.

    Args:
      args: trees of arrays.
      cuda, default, cpu: functions of the same results; cpu None: default.
    """
    if not cuda_kernels_loaded():
        return (cpu if cpu is not None and jax.default_backend() == "cpu" else default)(*args)
    branches = {"cuda": cuda} if cpu is None else {"cuda": cuda, "cpu": cpu}
    return jax.lax.platform_dependent(*args, **branches, default=default)


def refuse(message: str, result: jax.ShapeDtypeStruct) -> Array:
    """Stands for a result that cannot be had: an error when the branch it is in is compiled, and only then.

    Raises:
      RuntimeError: `message`, on compiling.
    """
    return _refuse_p.bind(message=message, shape=result.shape, dtype=result.dtype)


_refuse_p = Primitive("qlora_jax_refuse")


@_refuse_p.def_abstract_eval
def _refuse_abstract(*, message: str, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.core.ShapedArray(shape, dtype)


def _refuse_lowering(ctx: Any, *, message: str, shape: tuple[int, ...], dtype: Any) -> Any:
    raise RuntimeError(message)


mlir.register_lowering(_refuse_p, _refuse_lowering)


def vary_like(x: Array, others: Any) -> Array:
    """Casts x to vary over every mesh axis of shard_map over which one of `others` varies; itself elsewhere."""

    def axes(array: Array) -> set[str]:
        return set(jax.typeof(array).manual_axis_type.varying)

    missing = set().union(*(axes(leaf) for leaf in jax.tree.leaves(others))) - axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
