"""`paged_jit`: `jax.jit` with the sharding and memory kind of every argument and result written out.

jit pairs donated buffers with results by shape and dtype alone unless it knows the memory kinds of all arguments and
all results when it lowers; a `pinned_host` buffer paired with a result in device memory then aborts the process.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.tree_util import PyTreeDef

from qlora_jax.optim.placement import HOST_KIND


def paged_jit(fun: Callable[..., Any], *example_args: Any, donate_argnums: int | Sequence[int] = ()) -> Any:
    """`jax.jit(fun)` that may donate arguments in host memory, in any order of arguments and results.

    Args:
      fun: a function of positional arguments.
      example_args: one call's arguments: arrays, or shapes with shardings. Only shapes, dtypes and shardings are read.
      donate_argnums: as in `jax.jit`.

    Returns:
      The jitted function, for arguments of the examples' shapes and shardings.

    An argument leaf keeps its sharding and memory kind. NumPy arrays, Python numbers, and arrays that are not committed
    to a device go to all devices of the others: replicated where some argument has a NamedSharding over several.
    A result leaf's memory kind is the memory space that tracing gives it (`jax.typeof(x).memory_space`): `pinned_host`
    after a transfer to `jax.memory.Space.Host`, the device's default memory otherwise. Its sharding is that of the
    largest subtree of the arguments with the same structure, shapes, dtypes and memory spaces (donated arguments are
    looked up first, then in order); where there is none, it is replicated over the same devices.
    """
    donated = [donate_argnums] if isinstance(donate_argnums, int) else list(donate_argnums)
    default = _default_sharding(jax.tree.leaves(example_args))
    in_shardings = jax.tree.map(lambda leaf: _sharding(leaf) or default, example_args)
    traced = jax.jit(fun, in_shardings=in_shardings).trace(*example_args)

    known: dict[Any, list[Sharding]] = {}
    for i in sorted(range(len(example_args)), key=lambda i: (i not in donated, i)):
        shardings, treedef = jax.tree.flatten(in_shardings[i])
        examples = zip(jax.tree.leaves(example_args[i]), shardings, strict=True)
        leaves = [(np.shape(leaf), _dtype(leaf), sharding.memory_kind) for leaf, sharding in examples]
        for subtree, a, b in _subtrees(treedef):
            known.setdefault((subtree, tuple(leaves[a:b])), shardings[a:b])

    results, treedef = jax.tree.flatten(traced.out_info)
    on_host = [aval.memory_space == jax.memory.Space.Host for aval in traced.jaxpr.out_avals]
    kinds = [HOST_KIND if host else _default_kind(default) for host in on_host]
    leaves = [(leaf.shape, leaf.dtype, kind) for leaf, kind in zip(results, kinds, strict=True)]
    out: list[Sharding | None] = [None] * len(leaves)
    for subtree, a, b in _subtrees(treedef):
        if out[a:b].count(None) == b - a:
            out[a:b] = known.get((subtree, tuple(leaves[a:b])), [None] * (b - a))
    out = [sharding or default.with_memory_kind(kind) for sharding, kind in zip(out, kinds, strict=True)]
    return jax.jit(
        fun, in_shardings=in_shardings, out_shardings=jax.tree.unflatten(treedef, out), donate_argnums=donate_argnums
    )


def _sharding(leaf: Any) -> Sharding | None:
    """The sharding a leaf asks for; None for one that may go anywhere."""
    if isinstance(leaf, jax.Array) and not leaf.committed and leaf.sharding.memory_kind != HOST_KIND:
        return None
    return getattr(leaf, "sharding", None)


def _default_sharding(leaves: Sequence[Any]) -> Sharding:
    """Replicated over the devices of the leaves, in the devices' default memory."""
    shardings = [sharding for sharding in map(_sharding, leaves) if sharding is not None]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=_default_kind(sharding))
    device = next(iter(shardings[0].device_set)) if shardings else jax.devices()[0]
    return SingleDeviceSharding(device, memory_kind=_default_kind(SingleDeviceSharding(device)))


def _default_kind(sharding: Sharding) -> str:
    device: Any = next(iter(sharding.device_set))
    return device.default_memory().kind


def _dtype(leaf: Any) -> Any:
    return jax.typeof(leaf).dtype if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf.dtype


def _subtrees(treedef: PyTreeDef, start: int = 0) -> Iterator[tuple[PyTreeDef, int, int]]:
    """Every subtree, larger ones before their parts, with the range of its leaves."""
    yield treedef, start, start + treedef.num_leaves
    for child in treedef.children():
        yield from _subtrees(child, start)
        start += child.num_leaves
