"""DoRA (arXiv 2402.09353) as PEFT computes it: the adapted weight's columns keep a length that is trained by itself.

    V = W + s * A @ B,    y = x @ (V * m / |V|)

with m `[out]` trained, and |V| the length of each column of V `[in, out]`, through which no gradient runs (section 4.3
of the paper). m starts as |W|, so that the layer starts as the base layer. With dropout, PEFT lets x @ W itself pass
and drops only in what is added to it: with d = dropout(x),

    y = x @ W + (m/|V| - 1) * (d @ W) + m/|V| * s * (d @ A) @ B

|V| would need the dense W in every call. Here it is summed from parts:

    |V|^2 = |W|^2 + 2 s * sum_r (A.T @ W) * B + s^2 * sum_r (A.T @ A @ B) * B

so that W meets only rank rows, in the same product as activations do, and |W|^2 is kept from when the adapter was made.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.nf4 import NF4Tensor, dequantize
from qlora_jax.nn.adapted import frozen_base
from qlora_jax.nn.dense import check_fit, nf4_dense
from qlora_jax.nn.lora import dropped, lora_a_init, lora_branch, take_key
from qlora_jax.nn.variables import FrozenParam

_SMALLEST = 1e-30
_HIGHEST = jax.lax.Precision.HIGHEST


class dora_dense(nf4_dense):
    """An nf4_dense whose adapter is DoRA's. `attach_dora` makes one of an nf4_dense.

    Attributes:
      lora_magnitude: m, nnx.LoRAParam, float32 `[out]` (`[L]` in front in a stack).
      squares: |W|^2, FrozenParam, float32 `[out]`.
    """

    lora_magnitude: nnx.LoRAParam
    squares: FrozenParam

    def __call__(
        self, x: Float[Array, "*batch in"], *, rngs: nnx.Rngs | PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        """See the top of this file. Arguments, result and errors as nf4_dense's."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        x = jnp.asarray(x, self.dtype)
        kernel = self.kernel.get_value()
        check_fit(x, kernel)
        key = take_key(rngs, "dropout") if rngs is not None and self.dropout > 0 else None
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        d = dropped(x, self.dropout, key)
        branch = lora_branch(d, a, b, scaling=self.scaling)
        magnitude, squares = self.lora_magnitude.get_value(), self.squares.get_value()
        scale = magnitude_scale(kernel, squares, magnitude, a, b, scaling=self.scaling, dtype=x.dtype)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        y = frozen_base(x, kernel)
        y = (y + branch) * scale if key is None else y + (scale - 1) * frozen_base(d, kernel) + scale * branch
        return self._plus_bias(y.astype(x.dtype))


def attach_dora(
    dense: nf4_dense,
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rngs: nnx.Rngs | PRNGKeyArray | None,
    a_init: Any = lora_a_init,
) -> None:
    """Makes a dora_dense of a layer that has no adapter, in place, so that every alias of it is one.

    Args and errors as nf4_dense.attach_adapter's.
    """
    dense.attach_adapter(rank=rank, alpha=alpha, dropout=dropout, rngs=rngs, a_init=a_init)
    squares = squared_lengths(dense.kernel.get_value())
    dense.__class__ = dora_dense
    assert isinstance(dense, dora_dense)
    dense.squares, dense.lora_magnitude = FrozenParam(squares), nnx.LoRAParam(jnp.sqrt(squares))


def magnitude_scale(
    kernel: NF4Tensor | Float[Array, "in out"],
    squares: Float[Array, "out"],
    magnitude: Float[Array, "out"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    *,
    scaling: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "out"]:
    """m / |V|, float32, differentiable in m alone.

    Args:
      kernel: W.
      squares: |W|^2, from `squared_lengths`.
      magnitude: m, float32.
      a, b: the factors, float32.
      scaling: s.
      dtype: of the product A.T @ W, that of the activations.
    """
    a, b = jax.lax.stop_gradient(a), jax.lax.stop_gradient(b)
    rows = a.T.astype(dtype)
    crossed = frozen_base(rows, kernel)
    own = jnp.matmul(jnp.matmul(a.T, a, precision=_HIGHEST), b, precision=_HIGHEST)
    total = squares + jnp.sum((2 * scaling * crossed.astype(jnp.float32) + scaling**2 * own) * b, axis=0)
    # A column of zeros has m = 0, and stays one.
    return magnitude / jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(total), _SMALLEST))


@jax.jit
def squared_lengths(kernel: NF4Tensor | Float[Array, "*layers in out"]) -> Float[Array, "*layers out"]:
    """|W|^2 of each column, float32; a stack's layers are decoded one after the other."""

    def of(weight: Array) -> Array:
        return jnp.sum(weight.astype(jnp.float32) ** 2, axis=-2)

    if not isinstance(kernel, NF4Tensor):
        return of(kernel)
    if kernel.num_layers is None:
        return of(dequantize(kernel))
    return jax.lax.map(lambda i: of(dequantize(kernel.layer(i))), jnp.arange(kernel.num_layers))
