"""`paged(tx)`: optimizer state that lives in host memory and visits the device page by page.

The state is `tx.init(params)` itself, the same tree with its large arrays in `pinned_host` memory:

    before   ScaleByAdamState(count=i32[], mu={"lora_a": f32[80, 8192, 64]}, nu=...)         on the device
    after    ScaleByAdamState(count=i32[], mu={"lora_a": f32<host>[80, 8192, 64]}, nu=...)   count still on the device

so checkpoints move between paged and unpaged runs and `optax.tree.get(state, "count")` works as before.

One update goes through the pages in order: fetch the state of a page, run `tx.update` on these leaves alone, write the
state back. Left to itself, XLA's scheduler would fetch everything first; an optimization barrier ties each fetch to the
write-back of the page before it, which bounds the device memory whatever the number of leaves.
"""

import logging
from typing import Any

import jax
import optax

from qlora_jax.errors import UserError
from qlora_jax.optim.page_update import PageUpdate, cut_out, written_back
from qlora_jax.optim.pages import Layout, by_path, rebuilt
from qlora_jax.optim.placement import host_kind_available, lives_on_host
from qlora_jax.optim.probe import check_separable

log = logging.getLogger(__name__)


def paged(
    tx: optax.GradientTransformation | optax.MultiSteps, page_bytes: int = 64 * 2**20
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of `tx` in host memory and brings it to the device in pages.

    Args:
      tx: an Optax transformation that treats every leaf apart, and, for leaves larger than a page, every entry of
        axis 0 apart: AdamW, Lion, momentum, schedules, `masked`, `partition`, `inject_hyperparams`, `MultiSteps`. Not
        global-norm clipping nor anything else that sees several leaves; that goes outside:
        `chain(clip_by_global_norm(1.0), paged(adamw(1e-4)))`. Not LAMB, `clip_by_block_rms` or Muon where a leaf is
        larger than a page.
      page_bytes: bytes of parameters per page. Small leaves are joined up to it. A larger leaf is walked along axis 0,
        as many entries at a time as fit (one at least), where each of its state arrays has an axis 0 of that length;
        otherwise (Adafactor) it is one page, which `init` logs.

    Returns:
      A transformation whose state is `tx.init(params)` with the arrays of at least 4 KiB that belong to a leaf in
      `pinned_host` memory; step counts and hyperparameters stay on the device. Extra arguments of `update` go on to
      `tx`; those shaped like the parameters are cut with them. An update needs on the device, for one or two state
      arrays of the parameters' dtype per leaf, at most 4 pages (a page being `page_bytes`, or one axis-0 entry where
      that is larger), however many leaves there are. `init` makes the state page by page, leaves whole. Where the
      platform has no pinned host memory: `tx` itself, unchecked.

      Call `init` outside jit (inside, the arrays forget the parameters' sharding) and `update` inside. **Donation**:
      plain `jax.jit` pairs donated buffers with results by shape, and a host buffer paired with a result in device
      memory aborts the process. `paged_jit` writes out the shardings that prevent it; a `jax.jit` of your own needs
      in_shardings and out_shardings for every argument and result.

    Raises:
      UserError: where `tx` lets one leaf, or one entry of a leaf to be walked, reach another; where it cannot be
        initialised for some leaves alone; where a parameter is not floating point. All at init, where `tx` is tried
        out on small arrays (every axis cut to a few entries, so a mask that depends on sizes may answer differently
        there); if `tx` requires extra arguments it is tried out at the first update that has them.
    """
    if page_bytes < 1:
        raise UserError(f"paged: page_bytes={page_bytes}", why="a page holds something", fix="page_bytes=64 * 2**20")
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        if not jax.tree.leaves(params) or not host_kind_available():
            return inner.init(params)
        layout = Layout(inner, params, page_bytes)
        check_separable(inner, layout, {})
        for name, reason in layout.oversize.items():
            log.info("paged: %s: %s", name, reason)
        arrays: dict[str, Any] = {}
        for page in layout.pages:
            state = inner.init(cut_out(params, page))
            arrays |= written_back(by_path(state), page)
        return rebuilt(layout.state, arrays)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        reference = updates if params is None else params
        if not jax.tree.leaves(reference) or not host_kind_available():
            return inner.update(updates, state, params, **extra)
        _check_alike(updates, reference)
        layout = Layout(inner, reference, page_bytes)
        if extra:
            check_separable(inner, layout, extra)
        arrays = by_path(state)
        done: dict[int, Any] = {}
        new: dict[str, Any] = {}
        previous: list[str] = []
        for page in layout.pages:
            fetched = [path for path in sorted(page.owned) if lives_on_host(arrays[path])]
            if previous and fetched:
                written, waiting = jax.lax.optimization_barrier(
                    ([new[path] for path in previous], [arrays[path] for path in fetched])
                )
                new |= dict(zip(previous, written, strict=True))
                arrays |= dict(zip(fetched, waiting, strict=True))
            turn = PageUpdate(inner, layout, page, updates, params, extra)
            changes, part = turn.whole(arrays) if page.rows is None else turn.walk(arrays, page.rows)
            done |= dict(zip(page.leaves, changes, strict=True))
            new = part | new  # shared arrays: every page computes the same, the first is kept
            previous = fetched or previous
        return jax.tree.unflatten(jax.tree.structure(updates), [done[i] for i in range(len(done))]), rebuilt(
            layout.state, new
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_alike(updates: Any, params: Any) -> None:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (updates, params)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"paged: the updates have leaves {shapes[0]}, the parameters {shapes[1]}",
            why="every parameter has one gradient of its shape",
            fix="take gradients and parameters with the same filter: nnx.DiffState(0, trainable(model))",
        )
