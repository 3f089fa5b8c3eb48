"""How a tree of parameters is cut into pages, and which arrays of the optimizer state belong to which page.

The state of some leaves is found without knowing the transformation: `tx.init` on the tree with every other leaf set
to None gives the same key paths as `tx.init` on the whole tree, only fewer. What is left when every leaf is None (step
counts, hyperparameters, keys) is shared by all pages.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef, keystr, tree_flatten_with_path

from qlora_jax.errors import UserError
from qlora_jax.optim.placement import nbytes


def only(treedef: PyTreeDef, leaves: Mapping[int, Any]) -> Any:
    """The tree `treedef` with `leaves[i]` at leaf i and None at every leaf that is not given."""
    return jax.tree.unflatten(treedef, [leaves.get(i) for i in range(treedef.num_leaves)])


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under the text of their key paths."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def rebuilt(like: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree `like` with its leaves taken from `arrays` by key path."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in by_path(like)])


@dataclass(frozen=True)
class Page:
    """Leaves whose state visits the device together.

    `rows`: None where leaves are updated whole; else the page is one leaf, updated `rows` entries of axis 0 at a time.
    `state`: tx.init's result for these leaves alone, as shapes and dtypes.
    `owned`: key paths of the arrays in `state` that belong to these leaves and not to all pages.
    """

    leaves: tuple[int, ...]
    rows: int | None
    state: Any
    owned: frozenset[str]


class Layout:
    """The pages of one tree of parameters under one transformation."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, page_bytes: int) -> None:
        self.treedef: PyTreeDef
        flat, self.treedef = tree_flatten_with_path(params)
        self.names = [keystr(path) for path, _ in flat]
        self.params = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in flat]
        for name, leaf in zip(self.names, self.params, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise UserError(
                    f"paged: the parameter {name} has dtype {leaf.dtype}",
                    why="only floating-point leaves are trained; frozen bytes must not be given to the optimizer",
                    fix="paged(tx).init(nnx.state(model, trainable(model)))",
                )
        self.state = jax.eval_shape(tx.init, only(self.treedef, dict(enumerate(self.params))))
        self.oversize: dict[str, str] = {}  # leaves larger than a page that cannot be walked, and why
        self._tx = tx
        self.shared = frozenset(by_path(self._init_of(())))
        self.pages = tuple(self._page(group, page_bytes) for group in _groups(self.params, page_bytes))
        self._check_cover()

    def matches(self, tree: Any) -> bool:
        """Whether a tree has the parameters' structure and shapes, leaf for leaf."""
        return jax.tree.structure(tree) == self.treedef and all(
            jnp.shape(leaf) == like.shape for leaf, like in zip(jax.tree.leaves(tree), self.params, strict=True)
        )

    def _init_of(self, leaves: Iterable[int]) -> Any:
        tree = only(self.treedef, {i: self.params[i] for i in leaves})
        try:
            return jax.eval_shape(self._tx.init, tree)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"paged: the transformation cannot be initialised for some of the parameters alone: {error}",
                why="pages are updated apart, each as the tree of parameters with the other leaves set to None",
                fix="optax.chain(that_transformation, paged(the_rest))",
            ) from error

    def _page(self, group: tuple[int, ...], page_bytes: int) -> Page:
        state = self._init_of(group)
        arrays = by_path(state)
        owned = frozenset(arrays) - self.shared
        first = self.params[group[0]]
        rows = None
        if nbytes(first) > page_bytes:
            reason = _why_whole(first, {path: arrays[path] for path in sorted(owned)})
            if reason:
                self.oversize[self.names[group[0]]] = f"{nbytes(first)} bytes in one page: {reason}"
            else:
                rows = _rows(first.shape[0], page_bytes // (nbytes(first) // first.shape[0]))
        return Page(group, rows, state, owned)

    def _check_cover(self) -> None:
        whole = by_path(self.state)
        parts: dict[str, list[Any]] = {path: [] for path in whole}
        for page in self.pages:
            for path, array in by_path(page.state).items():
                parts.setdefault(path, []).append(array)
        odd = [p for p in parts if not parts[p] or not all(p in whole and _alike(whole[p], a) for a in parts[p])]
        if odd:
            raise UserError(
                f"paged: the state {odd[0]} is not made leaf by leaf",
                why="its place, shape or dtype for some of the parameters differs from that for all of them "
                "(optax.flatten joins leaves; inject_hyperparams without hyperparam_dtype takes the widest dtype)",
                fix="optax.chain(that_transformation, paged(the_rest)), or "
                "optax.inject_hyperparams(adamw, hyperparam_dtype=jnp.float32)(...)",
            )


def _rows(length: int, most: int) -> int:
    """Entries of axis 0 per turn, at most `most` (but one at least): a divisor of `length` where a fair one exists.

    Otherwise the last slice overlaps the one before it, which costs 6 pages for AdamW instead of 4 (both measured with
    XLA's GPU compiler: masked and unmasked values are both kept), hence two thirds of the entries.
    """
    fewer = max(1, 2 * most // 3)
    return next((rows for rows in range(most, fewer, -1) if length % rows == 0), fewer)


def _why_whole(leaf: Any, state: Mapping[str, Any]) -> str:
    """Why a leaf cannot be walked along axis 0; empty where it can."""
    if leaf.ndim == 0 or leaf.shape[0] == 1:
        return f"its shape {leaf.shape} has no axis 0 to walk along"
    for path, array in state.items():
        if array.shape[:1] != leaf.shape[:1]:
            return f"its state {path} has shape {array.shape}, without the axis 0 of the leaf's {leaf.shape}"
    return ""


def _alike(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _groups(params: Sequence[Any], page_bytes: int) -> list[tuple[int, ...]]:
    """Neighbouring leaves joined while their bytes fit in a page; a leaf larger than a page stands alone."""
    groups: list[list[int]] = []
    used = page_bytes + 1
    for i, leaf in enumerate(params):
        if used + nbytes(leaf) > page_bytes:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += nbytes(leaf)
    return [tuple(group) for group in groups]
