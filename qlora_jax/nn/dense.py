"""nf4_dense: a dense layer with a frozen 4-bit kernel and, optionally, a LoRA adapter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor, device_layout, place, quantize
from qlora_jax.nf4.matmul import check_operands
from qlora_jax.nf4.placement import platform_of
from qlora_jax.nn.adapted import adapted, frozen_base
from qlora_jax.nn.lora import check_adapter, init_adapter, lora_a_init, take_key
from qlora_jax.nn.variables import FrozenParam, NF4Param

default_kernel_init = nnx.initializers.lecun_normal()


class nf4_dense(nnx.Module):
    """`nnx.Linear` with its kernel frozen in 4 bits, plus a trainable low-rank adapter where rank > 0.

    One comes to have frozen bytes by quantizing a layer that has learnt something:

        dense = nf4_dense.from_linear(linear, rank=16, rngs=nnx.Rngs(0))
        y = dense(x)                      # x @ W + (alpha / rank) * (x @ A) @ B
        y = dense(x, rngs=key)            # the same with dropout on the adapter's input

    Nothing random is stored. One key gives one mask: hand each layer a key of its own, or one `nnx.Rngs(key)` from
    which each layer takes the next.

    Attributes:
      kernel: NF4Param holding an NF4Tensor, or FrozenParam `[in, out]` where quant_type is None; a stack of layers
        (see scan_layers) has `[L]` in front. Read with `dense.kernel.get_value()`.
      lora_a, lora_b: nnx.LoRAParam, float32 `[in, rank]` and `[rank, out]` (`[L]` in front in a stack), or None.
      bias: FrozenParam `[out]` or None. It is never trained.
      in_features, out_features, rank, alpha, dropout: as given.
      dtype: dtype of the computation and of the result; None: that of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 0,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_bias: bool = False,
        quant_type: str | None = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        kernel_init: Any = default_kernel_init,
        a_init: Any = lora_a_init,
        rngs: nnx.Rngs,
    ) -> None:
        """A layer with a random frozen kernel, made as `nnx.Linear` makes its own.

        Args:
          in_features: features of x.
          out_features: features of the result.
          rank: rank of the adapter; 0: none.
          alpha: the adapter is scaled by `alpha / rank`.
          dropout: probability of dropout on the adapter's input, for calls that get a key.
          use_bias: adds a frozen bias of zeros.
          quant_type: a 4-bit type (see quantize), or None to keep a dense frozen kernel (16-bit LoRA).
          block_size: weights per scale.
          double_quant: whether to quantize the scales.
          dtype: dtype of the computation; None: that of x.
          kernel_init: initializer of the kernel, float32 `[in, out]`.
          a_init: initializer of A, float32 `[in, rank]`; B starts at zero.
          rngs: streams of random keys; `params` is used.

        Raises:
          UserError: a rank, alpha or dropout that no adapter can have.
          ValueError: an unknown quant_type or block_size.
        """
        check_adapter(rank, alpha, dropout)
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        frozen = freeze(kernel, quant_type, block_size, double_quant)
        self.kernel: NF4Param | FrozenParam = NF4Param(frozen) if isinstance(frozen, NF4Tensor) else FrozenParam(frozen)
        self.bias = nnx.data(FrozenParam(jnp.zeros((out_features,), jnp.float32)) if use_bias else None)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.rank, self.alpha, self.dropout = 0, float(alpha), float(dropout)
        if rank > 0:
            self.attach_adapter(rank=rank, alpha=alpha, dropout=dropout, rngs=rngs, a_init=a_init)

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        rank: int = 0,
        alpha: float = 16.0,
        dropout: float = 0.0,
        quant_type: str | None = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        a_init: Any = lora_a_init,
        rngs: nnx.Rngs | PRNGKeyArray | None = None,
    ) -> "nf4_dense":
        """The 4-bit layer of an `nnx.Linear`, whose kernel and bias it freezes. `linear` itself stays as it is.

        Args:
          linear: a layer, or a stack of layers with kernel `[L, in, out]` (made by nnx.vmap).
          dtype: dtype of the computation; None: that of `linear`.
          rngs: keys for the adapter (stream `params`) or one key; needed where rank > 0.
          rank, alpha, dropout, quant_type, block_size, double_quant, a_init: see nf4_dense.

        Raises:
          UserError: `linear` computes something else than x @ kernel + bias, or rank > 0 without rngs.
        """
        if problem := not_plain(linear):
            raise UserError(
                f"from_linear cannot replace this {type(linear).__name__}: {problem}",
                why="nf4_dense computes x @ kernel + bias and nothing else",
                fix="nf4_dense.from_kernel(kernel, bias=bias) takes the arrays alone",
            )
        return cls.from_kernel(
            linear.kernel.get_value(),
            bias=None if linear.bias is None else linear.bias.get_value(),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            dtype=linear.dtype if dtype is None else dtype,
            a_init=a_init,
            rngs=rngs,
        )

    @classmethod
    def from_kernel(
        cls,
        kernel: NF4Tensor | Float[Array, "*layers in out"],
        *,
        bias: Float[Array, "*layers out"] | None = None,
        rank: int = 0,
        alpha: float = 16.0,
        dropout: float = 0.0,
        quant_type: str | None = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        a_init: Any = lora_a_init,
        rngs: nnx.Rngs | PRNGKeyArray | None = None,
    ) -> "nf4_dense":
        """A layer around a kernel that exists: quantized already, or an array to quantize here.

        Args:
          kernel: NF4Tensor (taken as it is, in the layout for the device that holds it; quant_type, block_size and
            double_quant are then its own), or a floating array `[in, out]`, `[L, in, out]`.
          bias: `[out]`, `[L, out]`, or None.
          rngs: keys for the adapter (stream `params`) or one key; needed where rank > 0.
          rank, alpha, dropout, quant_type, block_size, double_quant, dtype, a_init: see nf4_dense.

        Raises:
          UserError: a bias that does not fit the kernel, or rank > 0 without rngs.
        """
        in_features, out_features = kernel.shape[-2:]
        dense = cls(
            in_features,
            out_features,
            alpha=alpha,
            dropout=dropout,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            kernel_init=lambda *_: kernel,
            rngs=nnx.Rngs(0),
        )
        expected = (out_features,) if dense.num_layers is None else (dense.num_layers, out_features)
        if bias is not None and np.shape(bias) != expected:
            raise UserError(f"bias of shape {np.shape(bias)}", why=f"this kernel needs a bias of shape {expected}")
        dense.bias = None if bias is None else FrozenParam(bias)
        check_adapter(rank, alpha, dropout)
        if rank > 0:
            dense.attach_adapter(rank=rank, alpha=alpha, dropout=dropout, rngs=rngs, a_init=a_init)
        return dense

    @property
    def num_layers(self) -> int | None:
        """Length of the stack; None for a single layer."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, NF4Tensor):
            return kernel.num_layers
        return kernel.shape[0] if kernel.ndim == 3 else None

    @property
    def scaling(self) -> float:
        """The adapter's factor, alpha / rank."""
        return self.alpha / self.rank if self.rank else 0.0

    def __call__(
        self, x: Float[Array, "*batch in"], *, rngs: nnx.Rngs | PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        """`x @ W + bias + (alpha / rank) * (dropout(x) @ A) @ B`.

        Args:
          x: float32, bfloat16 or float16 `[..., in]`.
          rngs: a key, or an nnx.Rngs whose `dropout` stream gives one: turns dropout on for this call.

        Returns:
          `[..., out]` in x's dtype (in `self.dtype` where that is set).

        Raises:
          ValueError: x does not fit the kernel, or the layer is a stack (see scan_layers).
        """
        x = jnp.asarray(x, self.dtype)
        kernel = self.kernel.get_value()
        check_fit(x, kernel)
        return self._plus_bias(self._product(x, kernel, rngs))

    def _product(self, x: Array, kernel: NF4Tensor | Array, rngs: nnx.Rngs | PRNGKeyArray | None) -> Array:
        if self.lora_a is None or self.lora_b is None:
            return frozen_base(x, kernel)
        key = take_key(rngs, "dropout") if rngs is not None and self.dropout > 0 else None
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        return adapted(x, kernel, a, b, scaling=self.scaling, dropout=self.dropout, key=key)

    def _plus_bias(self, y: Array) -> Array:
        if self.bias is None:
            return y
        return y + self.bias.get_value().astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def attach_adapter(
        self,
        *,
        rank: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs | PRNGKeyArray | None,
        a_init: Any = lora_a_init,
    ) -> None:
        """Puts a fresh adapter on a layer that has none, in place.

        Raises:
          UserError: the layer has one, no rngs, or values that no adapter can have.
        """
        check_adapter(rank, alpha, dropout)
        if rank == 0 or self.rank > 0:
            raise UserError(f"a rank-{rank} adapter for a layer of rank {self.rank}", why="one adapter, rank > 0, fits")
        if rngs is None:
            raise UserError(
                f"rank={rank} without rngs",
                why="the adapter's A starts at random",
                fix="rngs=nnx.Rngs(0), or a key of jax.random",
            )
        layers = () if self.num_layers is None else (self.num_layers,)
        shape = (*layers, self.in_features, self.out_features)
        a, b = init_adapter(take_key(rngs, "params"), shape, rank, a_init)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.rank, self.alpha, self.dropout = rank, float(alpha), float(dropout)


def not_plain(linear: nnx.Module) -> str | None:
    """Why a module does not compute `x @ kernel + bias` as a plain `nnx.Linear` does; None where it does."""
    if type(linear) is not nnx.Linear:
        return "a subclass of nnx.Linear" if isinstance(linear, nnx.Linear) else "not an nnx.Linear"
    if linear.dot_general is not jax.lax.dot_general:
        return "it has a custom dot_general"
    if linear.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        return "it has a custom promote_dtype"
    if linear.preferred_element_type is not None:
        return f"it has preferred_element_type={linear.preferred_element_type}"
    return None


def freeze(kernel: NF4Tensor | Array, quant_type: str | None, block_size: int, double_quant: bool) -> NF4Tensor | Array:
    """The frozen form of a kernel: quantized, or as it is where it is quantized already or quant_type is None.

    4-bit weights get the layout that suits the device they are on (see device_layout).
    """
    if isinstance(kernel, NF4Tensor):
        return place(kernel)
    kernel = jnp.asarray(kernel)
    if quant_type is None:
        return kernel
    in_features, out_features = kernel.shape[-2:]
    layout = device_layout((in_features, out_features), block_size, platform_of(kernel), quant_type)
    return quantize(kernel, quant_type, block_size, double_quant, layout=layout)


def check_fit(x: Array, kernel: NF4Tensor | Array) -> None:
    """Whether x can be multiplied by a layer's kernel: said of the kernel before the adapter sees x.

    Raises:
      TypeError, ValueError: as nf4_matmul; for a dense kernel, a stack or another number of features.
    """
    if isinstance(kernel, NF4Tensor):
        check_operands(x, kernel)
    elif kernel.ndim == 3:
        raise ValueError(f"the kernel is a stack of {kernel.shape[0]} layers: use scan_layers")
    elif x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"x of shape {x.shape} does not fit a kernel of shape {kernel.shape}")
