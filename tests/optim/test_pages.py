"""The cut into pages: every leaf once, in order, no page larger than it may be; any cut gives the same update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.optim import paged
from qlora_jax.optim.pages import Layout
from qlora_jax.optim.placement import nbytes

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, page_bytes=st.integers(1, 400))
def test_pages_cover_the_leaves_within_their_size(shapes: list[tuple[int, ...]], page_bytes: int) -> None:
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    layout = Layout(optax.adam(1e-3), params, page_bytes)
    assert [i for page in layout.pages for i in page.leaves] == list(range(len(params)))
    for page in layout.pages:
        first = params[page.leaves[0]]
        if page.rows is not None:
            assert len(page.leaves) == 1
            assert 1 <= page.rows < first.shape[0]
            row = nbytes(first) // first.shape[0]
            pages = 4 if first.shape[0] % page.rows == 0 else 6  # of AdamW, on the device at one time
            assert pages * page.rows * row <= 4 * max(page_bytes, 2 * row if page.rows == 1 else 0)
        elif sum(nbytes(params[i]) for i in page.leaves) > page_bytes:
            assert len(page.leaves) == 1
            assert first.shape[:1] in ((), (1,))
            assert list(layout.oversize) != []
        owned = {path.split("'")[0] for path in page.owned}
        assert len(page.owned) == 2 * len(page.leaves), owned


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(2, 13), width=st.integers(1, 5), other=st.integers(1, 3000), page_bytes=st.integers(1, 40_000))
def test_any_cut_gives_the_same_update(rows: int, width: int, other: int, page_bytes: int) -> None:
    params: Any = {"walked": jnp.sin(jnp.arange(rows * width * 512.0)).reshape(rows, width, 512), "z": jnp.ones(other)}
    unpaged = optax.sgd(0.1, momentum=0.9)
    tx = paged(unpaged, page_bytes)
    state, want_state, update = tx.init(params), unpaged.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        want, want_state = unpaged.update(params, want_state, params)
    for a, b in zip(jax.tree.leaves((updates, state)), jax.tree.leaves((want, want_state)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)
