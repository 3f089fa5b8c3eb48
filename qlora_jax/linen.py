"""The 4-bit dense layer for Flax Linen ports: same bytes, same arithmetic as the NNX layer.

    variables = {"params": {"dense": {"lora_a": ..., "lora_b": ...}},      # adapters, trained
                 "nf4":    {"dense": {"kernel": NF4Tensor, "bias": ...}}}  # the frozen base

A port puts `nf4_dense` where `nn.Dense` was, and turns its checkpoint's parameters with `from_params`:

    variables = from_params(params, rank=16, rngs=jax.random.key(0))
    adapters, frozen = split_adapters(variables)
    loss = lambda adapters: f(model.apply(merge_adapters(adapters, frozen), x))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.nn.adapted import adapted, frozen_base
from qlora_jax.nn.dense import check_fit, freeze
from qlora_jax.nn.lora import check_adapter, init_adapter, lora_a_init, take_key
from qlora_jax.nn.surgery import DEFAULT_SKIP
from qlora_jax.nn.traversal import Path, dotted, matching, require_matches

Tree = dict[str, Any]

_ADAPTER = ("lora_a", "lora_b")


class nf4_dense(nn.Module):
    """`nn.Dense` with its kernel frozen in 4 bits, plus a trainable low-rank adapter where rank > 0.

    Collection `params` holds the adapter alone (`lora_a` `[in, rank]`, `lora_b` `[rank, out]`, float32); collection
    `nf4` holds `kernel` (an NF4Tensor, or a dense `[in, out]` where quant_type is None) and `bias` `[out]`. Dropout on
    the adapter's input is on in calls that get a `dropout` random stream (`apply(..., rngs={"dropout": key})`).

    Attributes:
      features: features of the result.
      rank: rank of the adapter; 0: none.
      alpha: the adapter is scaled by `alpha / rank`.
      dropout: probability of dropout on the adapter's input.
      use_bias: adds a frozen bias. `nn.Dense` has one unless told otherwise; this layer has none.
      quant_type, block_size, double_quant: see quantize; quant_type None keeps a dense frozen kernel.
      dtype: dtype of the computation and of the result; None: that of x.
      kernel_init: initializer of the kernel, float32 `[in, out]`.
      a_init: initializer of A, float32 `[in, rank]`; B starts at zero.
    """

    features: int
    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    use_bias: bool = False
    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dtype: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    a_init: Any = lora_a_init

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch features"]:
        """`x @ W + bias + (alpha / rank) * (dropout(x) @ A) @ B`, in x's dtype (in `dtype` where that is set)."""
        check_adapter(self.rank, self.alpha, self.dropout)
        x = jnp.asarray(x, self.dtype)
        in_features = x.shape[-1]
        kernel = self.variable("nf4", "kernel", self._init_kernel, in_features).value
        check_fit(x, kernel)
        if self.rank > 0:
            a = self.param("lora_a", self.a_init, (in_features, self.rank), jnp.float32)
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features), jnp.float32)
            key = self.make_rng("dropout") if self.dropout > 0 and self.has_rng("dropout") else None
            y = adapted(x, kernel, a, b, scaling=float(self.alpha) / self.rank, dropout=self.dropout, key=key)
        else:
            y = frozen_base(x, kernel)
        if self.use_bias:
            bias = self.variable("nf4", "bias", jnp.zeros, (self.features,), jnp.float32).value
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _init_kernel(self, in_features: int) -> NF4Tensor | Array:
        kernel = self.kernel_init(self.make_rng("params"), (in_features, self.features), jnp.float32)
        return freeze(kernel, self.quant_type, self.block_size, self.double_quant)


def from_params(
    params: Mapping[str, Any],
    *,
    rank: int = 0,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    a_init: Any = lora_a_init,
    rngs: nnx.Rngs | PRNGKeyArray | None = None,
) -> Tree:
    """Variables for a port whose `nn.Dense` layers have become `nf4_dense`, from the parameters it had.

    Each entry that is a Dense's (`kernel` `[in, out]`, perhaps `bias`, and nothing else) becomes an NF4Tensor, a frozen
    bias and a fresh adapter. Kernels with three axes are left alone unless `include` names them, and are then stacks
    `[L, in, out]` made by `nn.scan`: parameters do not tell a stack from a DenseGeneral. All else stays in `params`.

    Args:
      params: the collection `params` of the model, or of one Dense (boxed values are unboxed).
      rank: rank of the adapters; 0: none.
      include: whole dotted components of the paths to turn; None: all of them.
      skip: whole dotted components of the paths to leave dense; the model has `nn.Dense` there still.
      quant_type, block_size, double_quant, a_init: see nf4_dense.
      rngs: a key for the adapters, or an nnx.Rngs (stream `params`); None: `jax.random.key(0)`.

    Returns:
      `{"params": ..., "nf4": ...}`.

    Raises:
      UserError: nothing to turn, a pattern of `include` that matches nothing, or a non-finite kernel.
    """
    check_adapter(rank, 1.0, 0.0)
    include = (include,) if isinstance(include, str) else include
    skip = (skip,) if isinstance(skip, str) else skip
    base_key = take_key(jax.random.key(0) if rngs is None else rngs, "params")
    rest = flatten_dict(meta.unbox(dict(params)))
    kernels = {path[:-1]: jnp.asarray(leaf) for path, leaf in rest.items() if path[-1] == "kernel"}
    require_matches(include or (), list(kernels), "include")
    trained: dict[Path, Any] = {}
    frozen: dict[Path, Any] = {}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        chosen = not matching(path, skip) and (include is None or matching(path, include))
        others = {leaf[-1] for leaf in rest if leaf[:-1] == path} - {"kernel", "bias"}
        if not chosen or others or kernel.ndim not in ((2,) if include is None else (2, 3)):
            continue
        if not jnp.isfinite(kernel).all():
            raise UserError(f"{dotted((*path, 'kernel'))} has NaN or infinite values")
        del rest[(*path, "kernel")]
        frozen[(*path, "kernel")] = freeze(kernel, quant_type, block_size, double_quant)
        if (*path, "bias") in rest:
            frozen[(*path, "bias")] = rest.pop((*path, "bias"))
        if rank > 0:
            key = jax.random.fold_in(base_key, index)
            a, b = init_adapter(key, kernel.shape, rank, a_init)
            trained |= {(*path, "lora_a"): a, (*path, "lora_b"): b}
    if not frozen:
        seen = ", ".join(f"{dotted(path)} {list(kernel.shape)}" for path, kernel in list(kernels.items())[:8])
        raise UserError("no Dense kernel to quantize", why=f"kernels seen: {seen or 'none'}; skip={skip!r}")
    return {"params": unflatten_dict(rest | trained), "nf4": unflatten_dict(frozen)}


def split_adapters(variables: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """The adapters of a Linen model's variables, and everything else: what to differentiate, and what is frozen.

    Returns:
      (adapters, frozen): the tree of `lora_a` and `lora_b` below `params`, and all variables without them.

    Raises:
      UserError: there are no adapters.
    """
    flat = flatten_dict(dict(variables))
    adapters = {path[1:]: leaf for path, leaf in flat.items() if path[0] == "params" and path[-1] in _ADAPTER}
    if not adapters:
        raise UserError(
            "these variables hold no adapters",
            why="an optimizer built for them would train nothing",
            fix="from_params(params, rank=16)",
        )
    frozen = {path: leaf for path, leaf in flat.items() if path[0] != "params" or path[1:] not in adapters}
    return unflatten_dict(adapters), unflatten_dict(frozen)


def merge_adapters(adapters: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """Variables for `model.apply` from the two halves of split_adapters."""
    flat = {("params", *path): leaf for path, leaf in flatten_dict(dict(adapters)).items()}
    return unflatten_dict(flatten_dict(dict(frozen)) | flat)
