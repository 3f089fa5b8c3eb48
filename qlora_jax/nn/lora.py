"""Low-rank adaptation (LoRA, arXiv 2106.09685) as PEFT computes it.

A frozen layer `y = x @ W` gains two small trained matrices, A `[in, r]` and B `[r, out]`:

    y = x @ W + (alpha / r) * (dropout(x) @ A) @ B

B starts at zero, so the adapted layer starts as the base layer. A and B are kept in float32; in the product they meet
x in x's dtype and are summed in float32, and their gradients reach them in float32 without having been rounded to x's
dtype. alpha / r is multiplied into x @ A, the smallest of the operands, in both directions. Dropout acts on this
branch's input alone, and only where a key is handed in: a random stream stored in the module would be an input of the
scan over layers and of the rematerialized backward pass, and would repeat itself.

What a small product costs is the memory it moves, `[M, out]` three times where its result is added on its own. So on a
CPU the kernel of the frozen product takes `(x @ A) @ B` as a few more elements of what it sums over (nf4/adapter.py).
On a GPU a layer computes this branch before its frozen product and adds them as `frozen + branch`: where the frozen
product is XLA's (route "dequantize"), XLA then lets it start from the branch's result (cuBLAS with beta = 1, or a fused
epilogue), and of the gradients' sum likewise, since the backward pass runs in the opposite order. Relied on, and seen
in HLO compiled for an H100: both terms have x's dtype, and nothing but a reshape lies between product and sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.nn.products import mixed_product


def lora_a_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "in rank"]:
    """PEFT's initial A, `kaiming_uniform(a=sqrt(5))`: U(-1/sqrt(in), 1/sqrt(in)).

    Args:
      key: random key.
      shape: `[in, rank]`.
      dtype: floating dtype of the result.
    """
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def init_adapter(
    key: PRNGKeyArray, kernel_shape: tuple[int, ...], rank: int, a_init: Any
) -> tuple[Float[Array, "*layers in rank"], Float[Array, "*layers rank out"]]:
    """Initial (A, B) in float32: A from `a_init`, layer by layer for a stack, and B zero.

    Args:
      key: random key.
      kernel_shape: `[in, out]` or `[L, in, out]`.
      rank: columns of A, rows of B.
      a_init: initializer `(key, [in, rank], dtype) -> A`.
    """
    *layers, in_features, out_features = kernel_shape
    b = jnp.zeros((*layers, rank, out_features), jnp.float32)
    if not layers:
        return a_init(key, (in_features, rank), jnp.float32), b
    keys = jax.random.split(key, layers[0])
    return jax.vmap(lambda layer_key: a_init(layer_key, (in_features, rank), jnp.float32))(keys), b


def lora_branch(
    x: Float[Array, "*batch in"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    *,
    scaling: float,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch out"]:
    """`(scaling * dropout(x) @ A) @ B` in x's dtype.

    Args:
      x: activations.
      a: A, float32.
      b: B, float32.
      scaling: alpha / rank.
      dropout: probability of zeroing an entry of x; the others grow by `1 / (1 - dropout)`.
      key: random key of this call, which turns dropout on; None: no dropout.
    """
    return mixed_product(scaling * mixed_product(dropped(x, dropout, key), a), b)


def dropped(x: Float[Array, "*batch in"], dropout: float, key: PRNGKeyArray | None) -> Float[Array, "*batch in"]:
    """x with entries zeroed at random and the others grown by `1 / (1 - dropout)`; as it is where there is no key."""
    if key is None or dropout == 0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
    return jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))


def check_adapter(rank: int, alpha: float, dropout: float) -> None:
    """Refuses a rank, alpha or dropout that no adapter can have.

    Raises:
      UserError: rank is not an integer >= 0, alpha not a number > 0, or dropout outside [0, 1).
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise UserError(f"rank={rank!r}", why="the rank of an adapter is an integer >= 0 (0: no adapter)")
    if not alpha > 0:
        raise UserError(f"alpha={alpha!r}", why="the adapter is scaled by alpha / rank, which has to be positive")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout!r}", why="dropout is the probability of zeroing an input: 0 <= dropout < 1")


def take_key(rngs: nnx.Rngs | PRNGKeyArray, stream: str) -> PRNGKeyArray:
    """The key of one call: a key as it is, or the next key of one stream of an `nnx.Rngs`.

    Raises:
      TypeError: rngs is something else.
    """
    if isinstance(rngs, nnx.Rngs):
        return getattr(rngs, stream)()
    if isinstance(rngs, jax.Array) and (jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) or rngs.dtype == jnp.uint32):
        return rngs
    raise TypeError(f"rngs must be a random key or an nnx.Rngs, got {type(rngs).__name__}")
