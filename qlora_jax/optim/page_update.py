"""`tx.update` on the leaves of one page, whole or walked along axis 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.optim.pages import Layout, Page, by_path, only, rebuilt
from qlora_jax.optim.placement import lives_on_host, to_device, to_host


def cut_out(tree: Any, page: Page) -> Any:
    """The tree with the page's leaves and None for every other leaf; None stays None."""
    if tree is None:
        return None
    leaves, treedef = jax.tree.flatten(tree)
    return only(treedef, {i: leaves[i] for i in page.leaves})


def written_back(arrays: Mapping[str, Any], page: Page) -> dict[str, Any]:
    """A page's state by path, its large arrays moved to host memory."""
    return {
        path: to_host(array) if path in page.owned and lives_on_host(array) else array for path, array in arrays.items()
    }


# While a leaf is walked: its updates so far, its state so far, the shared arrays that the last turn returned.
Carry = tuple[Any, list[Any], list[Any]]


@dataclass(frozen=True)
class PageUpdate:
    """One page's share of an update. `updates` and `params` are whole trees, `arrays` the whole state by key path.

    `whole` and `walk` return the page's updates, leaf by leaf, and its new state by path, back in host memory.
    """

    tx: optax.GradientTransformationExtraArgs
    layout: Layout
    page: Page
    updates: Any
    params: Any
    extra: Mapping[str, Any]

    def _call(
        self, updates: Any, arrays: Mapping[str, Any], cut: Callable[[Any], Any]
    ) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """`tx.update` for what `cut` leaves of each array; `updates` holds the page's leaves only.

        Returns the updates, the new state by path, and the old state as it was fetched.
        """
        page = self.page
        fetched = {
            path: to_device(cut(arrays[path])) if path in page.owned else arrays[path] for path in by_path(page.state)
        }
        extra = {
            name: jax.tree.map(cut, cut_out(value, page)) if self.layout.matches(value) else value
            for name, value in self.extra.items()
        }
        params = jax.tree.map(cut, cut_out(self.params, page))
        changes, state = self.tx.update(jax.tree.map(cut, updates), rebuilt(page.state, fetched), params, **extra)
        return jax.tree.leaves(changes), by_path(state), fetched

    def whole(self, arrays: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        changes, new, _ = self._call(cut_out(self.updates, self.page), arrays, lambda array: array)
        return changes, written_back(new, self.page)

    def walk(self, arrays: Mapping[str, Any], rows: int) -> tuple[list[Any], dict[str, Any]]:
        """The page's one leaf, `rows` entries of axis 0 at a time, in place in the carry of a loop.

        The last slice begins early enough to be whole; the entries in it that are already updated keep their value.
        (A shorter slice after the loop would cost copies of the whole leaf: XLA then no longer works in place.)
        Shared arrays go in as they were at every turn, so step counts advance once.
        """
        (leaf,) = self.page.leaves
        leaves, treedef = jax.tree.flatten(self.updates)
        gradient, length = leaves[leaf], leaves[leaf].shape[0]
        owned = sorted(self.page.owned)
        shared = sorted(set(by_path(self.page.state)) - self.page.owned)

        def cut(k: Any, array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, jnp.minimum(k * rows, length - rows), rows, axis=0)

        def slice_update(k: Any, gradient: Any, held: list[Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
            state = {**arrays, **dict(zip(owned, held, strict=True))}
            (change,), new, old = self._call(only(treedef, {leaf: gradient}), state, partial(cut, k))
            return change, new, old

        # The update takes the gradient's place, slice by slice, unless the transformation changes its dtype.
        held = [written_back({path: arrays[path]}, self.page)[path] for path in owned]
        change_dtype = jax.eval_shape(lambda: slice_update(0, gradient, held)[0]).dtype
        in_place = change_dtype == gradient.dtype
        out = gradient if in_place else jnp.zeros(gradient.shape, change_dtype)

        def turn(k: Any, carry: Carry) -> Carry:
            out, held, _ = carry
            change, new, old = slice_update(k, out if in_place else gradient, held)
            values = [change, *(new[path] for path in owned)]
            start = jnp.minimum(k * rows, length - rows)
            if length % rows:
                fresh = start + jnp.arange(rows) >= k * rows
                values = [
                    jnp.where(fresh.reshape(rows, *[1] * (value.ndim - 1)), value, before)
                    for value, before in zip(values, [cut(k, out), *(old[path] for path in owned)], strict=True)
                ]
            values[1:] = [
                to_host(value) if lives_on_host(array) else value for value, array in zip(values[1:], held, strict=True)
            ]
            out, *held = (
                jax.lax.dynamic_update_slice_in_dim(target, value, start, axis=0)
                for target, value in zip([out, *held], values, strict=True)
            )
            return out, held, [new[path] for path in shared]

        carry = (out, held, [arrays[path] for path in shared])
        out, held, advanced = jax.lax.fori_loop(0, -(-length // rows), turn, carry)
        return [out], dict(zip(owned + shared, held + advanced, strict=True))
