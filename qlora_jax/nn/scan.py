"""Running a stack of equal layers as one lax.scan, without ever slicing their 4-bit weights.

    Block(nf4_dense [64 -> 64])  x L layers        one Block, each leaf [L, ...]

`lax.scan` over the leaves would copy each layer's bytes before using them. Here only the small leaves (adapters,
norms, biases) are scanned; the 4-bit weights stay whole, and each layer sees a view of them: the whole stack and the
layer's index, which the kernels resolve.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.nn.lora import take_key
from qlora_jax.nn.variables import NF4Param

Carry = TypeVar("Carry")


def scan_layers(
    block: nnx.Module,
    h: Carry,
    *args: Any,
    rngs: nnx.Rngs | PRNGKeyArray | None = None,
    remat: bool = True,
) -> Carry:
    """`h = layer(h, *args)` for each layer of a stacked block, in one scan.

    A stacked block is one module whose every array has `[L]` in front: made by nnx.vmap, or from stacked kernels.

    Args:
      block: the stack; layer i is called as `layer(h, *args)`, and as `layer(h, *args, rngs=key_i)` with rngs.
      h: what the layers hand on, e.g. activations `[..., features]`; same shapes and dtypes in and out.
      args: handed to every layer as they are (positions, masks).
      rngs: a key, or an nnx.Rngs whose `dropout` stream gives one; `key_i = fold_in(key, i)`.
      remat: keep only h of each layer for the backward pass and compute the layer again there.

    Returns:
      h after the last layer.

    Raises:
      UserError: leaves that do not share a leading axis, or a layer that changes its own variables.
    """
    key = None if rngs is None else take_key(rngs, "dropout")

    def call(layer: Any, h: Carry, index: jax.Array, _: None) -> tuple[Carry, None]:
        if key is None:
            return layer(h, *args), None
        return layer(h, *args, rngs=jax.random.fold_in(key, index)), None

    return _scan(block, call, h, None, remat)[0]


def scan_layers_with(block: nnx.Module, h: Carry, xs: Any, *args: Any) -> tuple[Carry, Any]:
    """`h, ys[i] = layer(h, *args, xs[i])` for each layer: values that belong to a layer, such as its KV cache.

    Args:
      block: the stack, as in scan_layers.
      h: what the layers hand on.
      xs: a tree of arrays with `[L]` in front; layer i gets its entry as the last argument.
      args: handed to every layer as they are.

    Returns:
      h after the last layer, and the second results of the layers, stacked.

    Raises:
      UserError: as scan_layers.
    """

    def call(layer: Any, h: Carry, index: jax.Array, x: Any) -> Any:
        return layer(h, *args, x)

    return _scan(block, call, h, xs, remat=False)


def _scan(block: nnx.Module, call: Callable[..., Any], h: Any, xs: Any, remat: bool) -> tuple[Any, Any]:
    graphdef, *states = nnx.split(block, NF4Param, ...)
    packed, rest = states
    num_layers = _num_layers(block, packed, rest, xs)

    def body(h: Any, scanned: Any) -> tuple[Any, Any]:
        index, rest_i, xs_i = scanned
        views = jax.tree.map(lambda w: w.layer(index), packed, is_leaf=lambda w: isinstance(w, NF4Tensor))
        layer = nnx.merge(graphdef, views, rest_i)
        before = _values(layer)
        result = call(layer, h, index, xs_i)
        _refuse_changes(before, _values(layer))
        return result

    # Inside a scan nothing can be merged with its recomputation; the barriers against that would only cost copies.
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(body, h, (jnp.arange(num_layers, dtype=jnp.int32), rest, xs))


def _num_layers(block: nnx.Module, packed: nnx.State, rest: nnx.State, xs: Any) -> int:
    lengths = {name: value.num_layers for name, value in _values(packed).items()}
    lengths |= {name: _first_axis(value) for name, value in _values(rest).items()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(xs):
        lengths["xs" + jax.tree_util.keystr(keys)] = _first_axis(leaf)
    num_layers = next(iter(lengths.values()), None)
    if num_layers is None or len(set(lengths.values())) != 1:
        listing = ", ".join(f"{name}: {length or 'none'}" for name, length in lengths.items())
        raise UserError(
            f"the leaves of this {type(block).__name__} do not share a leading axis of layers ({listing})",
            why="scan_layers takes one block whose every array has [L] in front",
            fix="block = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(key, L))",
        )
    return num_layers


def _refuse_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in after.items():
        old, new = jax.tree.leaves(before.get(name)), jax.tree.leaves(value)
        if len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
            raise UserError(
                f"a layer changed its variable {name} inside scan_layers",
                why="the change would be lost: a stored random stream would give every step the same numbers",
                fix="scan_layers(..., rngs=key) for randomness, scan_layers_with for values that belong to a layer",
            )


def _values(node: Any) -> dict[str, Any]:
    """Raw value of each variable (or bare array) of a module or state, by dotted path."""
    state = node if isinstance(node, nnx.State) else nnx.state(node)
    return {
        ".".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def _first_axis(value: Any) -> int | None:
    leaves = jax.tree.leaves(value)
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else None
