"""Tries a transformation out on a small tree: does one leaf, or one entry of a leaf to be walked, reach another?

`paged` updates pages apart. That is the same update only if the transformation keeps leaves apart, and, where a leaf
is walked along axis 0, the entries of axis 0. Global-norm clipping would silently clip each page by its own norm. So
NaN is planted in some leaves (entries) and must change nothing in the others. Every pair of leaves is told apart by
some bit of their positions: leaves with that bit set get NaN in one run, the others in another, 2 log2(n) runs for n
leaves, all in one vmapped call. A last check compares pages updated apart with the whole, for what shows without NaN
(noise from one key).
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.errors import UserError
from qlora_jax.optim.pages import Layout, by_path, only

log = logging.getLogger(__name__)

_ROWS = 4  # entries of axis 0 of a leaf to be walked
_AXIS = 3  # at most this many entries of every other axis
_STEPS = 2  # the second step sees what the first left in the state
_RTOL = 1e-4  # far above the rounding of another fusion, far below any coupling


def check_separable(tx: optax.GradientTransformationExtraArgs, layout: Layout, extra: Mapping[str, Any]) -> None:
    """Raises UserError where `tx` lets leaves, or entries of leaves to be walked, reach each other.

    `extra`: the extra arguments of `tx.update`; only their structure, shapes and dtypes matter. Where `tx` requires
    extra arguments and none are known yet, nothing is checked (the update that has them checks).
    """
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        try:
            _check(tx, layout, extra)
        except TypeError as error:
            if extra or "required keyword-only argument" not in str(error):
                raise
            log.info("paged: tried out at the first update, since %s", error)


def _check(tx: optax.GradientTransformationExtraArgs, layout: Layout, extra: Mapping[str, Any]) -> None:
    walked = {page.leaves[0] for page in layout.pages if page.rows is not None}
    shapes = [_small_shape(leaf.shape, i in walked) for i, leaf in enumerate(layout.params)]
    params = [_values(shape, leaf.dtype, 0.7) for shape, leaf in zip(shapes, layout.params, strict=True)]
    updates = [_values(shape, leaf.dtype, 0.3) for shape, leaf in zip(shapes, layout.params, strict=True)]
    extra = {name: _small_extra(value, layout, params) for name, value in extra.items()}
    whole = lambda leaves: only(layout.treedef, dict(enumerate(leaves)))  # noqa: E731

    plants = _plants(len(params), walked)
    state = tx.init(whole(params))

    def run(updates: list[jax.Array], params: list[jax.Array]) -> tuple[list[list[jax.Array]], dict[str, jax.Array]]:
        changes, s = [], state
        for _ in range(_STEPS):
            u, s = tx.update(whole(updates), s, whole(params), **extra)
            changes.append(jax.tree.leaves(u))
        return changes, {path: array for path, array in by_path(s).items() if path in layout.shared}

    planted = [[_with_nan(leaf, plants, i) for i, leaf in enumerate(leaves)] for leaves in (updates, params)]
    changes, shared = jax.vmap(run)(*planted)
    _compare(layout, walked, plants, changes, shared)
    _compare_apart(tx, layout, updates, params, extra, [leaf[0] for leaf in changes[0]])


# A plant: for each leaf the entries of axis 0 that become NaN, or True for the whole leaf. The first plants nothing.
Plant = Mapping[int, int | bool]


def _plants(n: int, walked: set[int]) -> list[Plant]:
    plants: list[Plant] = [{}]
    for bit in range((n - 1).bit_length()):
        plants += [{i: True for i in range(n) if (i >> bit & 1) == side} for side in (0, 1)]
    if walked:
        plants += [dict.fromkeys(walked, row) for row in (0, _ROWS - 1)]
    return plants


def _with_nan(leaf: np.ndarray, plants: list[Plant], i: int) -> jax.Array:
    """The leaf once for each plant, in front: [plants, *leaf.shape]."""
    out = np.repeat(leaf[None], len(plants), axis=0)
    for k, plant in enumerate(plants):
        if i in plant:
            out[(k, ...) if plant[i] is True else (k, plant[i])] = np.nan
    return jnp.asarray(out)


def _compare(layout: Layout, walked: set[int], plants: list[Plant], changes: Any, shared: Mapping[str, Any]) -> None:
    for k, plant in enumerate(plants):
        for path, array in shared.items():
            if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and not _close(array[0], array[k]):
                raise UserError(
                    f"paged: the state {path} depends on the values of the parameters or gradients",
                    why="it is shared by all leaves, and pages are updated apart: each would compute another value",
                    fix="optax.chain(that_transformation, paged(the_rest)), or no paging",
                )
        for step in changes:
            for i, change in enumerate(step):
                if plant.get(i) is True:
                    continue
                rows = np.arange(_ROWS) != plant[i] if i in plant else ...
                if not _close(change[0][rows], change[k][rows]):
                    raise _coupled_rows(layout.names[i]) if i in plant else _coupled_leaves(layout.names[i])


def _compare_apart(
    tx: optax.GradientTransformationExtraArgs,
    layout: Layout,
    updates: list[np.ndarray],
    params: list[np.ndarray],
    extra: Mapping[str, Any],
    want: list[jax.Array],
) -> None:
    for page in layout.pages:
        slices = (slice(None),) if page.rows is None else (slice(0, _ROWS // 2), slice(_ROWS // 2, None))
        for rows in slices:
            cut = lambda leaves, page=page, rows=rows: only(  # noqa: E731
                layout.treedef, {i: jnp.asarray(leaves[i])[rows if leaves[i].ndim else ...] for i in page.leaves}
            )
            own = {
                name: cut(jax.tree.leaves(value)) if jax.tree.structure(value) == layout.treedef else value
                for name, value in extra.items()
            }
            change, _ = tx.update(cut(updates), tx.init(cut(params)), cut(params), **own)
            for i, got in zip(page.leaves, jax.tree.leaves(change), strict=True):
                if not _close(want[i][rows if want[i].ndim else ...], got):
                    name = layout.names[i]
                    raise _coupled_leaves(name) if page.rows is None else _coupled_rows(name)


def _coupled_leaves(name: str) -> UserError:
    return UserError(
        f"paged: the update of {name or 'the parameter'} depends on other leaves",
        why="pages are updated apart: clipping by global norm, or one noise key for all leaves, would silently do "
        "something else",
        fix="optax.chain(optax.clip_by_global_norm(1.0), paged(optax.adamw(1e-4)))",
    )


def _coupled_rows(name: str) -> UserError:
    return UserError(
        f"paged: in {name or 'the parameter'}, which is larger than a page, one entry of axis 0 depends on others",
        why="the leaf is updated a few entries at a time: the norm of a whole leaf (LAMB, clip_by_block_rms) or its "
        "matrix (Muon) is not seen",
        fix="a page_bytes that holds the whole leaf, or an optimizer that works entry by entry (adamw, lion, sgd)",
    )


def _small_shape(shape: tuple[int, ...], walked: bool) -> tuple[int, ...]:
    small = [min(length, _AXIS) for length in shape]
    return (_ROWS, *small[1:]) if walked else tuple(small)


def _values(shape: tuple[int, ...], dtype: Any, phase: float) -> np.ndarray:
    return np.sin(np.arange(1, int(np.prod(shape)) + 1) + phase).reshape(shape).astype(dtype)


def _small_extra(value: Any, layout: Layout, params: list[np.ndarray]) -> Any:
    if layout.matches(value):
        return only(layout.treedef, {i: jnp.asarray(leaf) for i, leaf in enumerate(params)})
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype) if isinstance(x, jax.Array) else x, value)


def _close(a: Any, b: Any) -> bool:
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return np.allclose(a, b, rtol=_RTOL, atol=1e-12, equal_nan=True)
