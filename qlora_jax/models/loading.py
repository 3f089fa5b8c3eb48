"""load_model: from a checkpoint's files to a model with frozen 4-bit weights, one tensor at a time."""

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.checkpoints.bitsandbytes import BitsandbytesCheckpoint
from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint
from qlora_jax.checkpoints.tensorfile import not_finite
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.models.config import BLOCK_LINEARS, BLOCK_NORMS, LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import NF4Tensor, device_layout, quantize
from qlora_jax.nf4.blockwise import compiled_on_cpu
from qlora_jax.nf4.placement import platform_of
from qlora_jax.nf4.streaming import QuantizedStack, aligned_empty, on_device
from qlora_jax.nn import add_lora
from qlora_jax.nn.traversal import matching

_NAMED_AT_MOST = 5


def load_model(
    path: str | Path | Checkpoint,
    *,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rank: int = 0,
    alpha: float = 16.0,
    dropout: float = 0.0,
    dora: bool = False,
    targets: Sequence[str] | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """Loads a pretrained LLaMA for finetuning: the linears of its blocks in 4 bits, all frozen but the adapters.

    Tensors are read one after the other and quantized as they arrive, by the CPU's kernels straight from the file where
    they are loaded: host memory holds one tensor and what the model keeps, never the model in 16 bits. Linears keep the
    checkpoint's dtype (`kernel.dtype`) where that is bfloat16 or float16; a float32 checkpoint's linears are rounded to
    bfloat16 first. Embeddings, norms, biases and the head stay dense, with the checkpoint's values and dtype. On a GPU
    with CUDA kernels 4-bit weights have their layout ("fragments"), each tensor repacked before the next one is read.

    Of a folder that bitsandbytes has quantized (`*-bnb-4bit`) the stored bytes are taken, with their own type, block
    size and kind of scales; other values of `quant_type`, `block_size` and `double_quant` than the defaults must agree.
    Modules that were skipped stay dense. Layers are stacked, so a linear that is stored in 4 bits in some layers and
    dense in others (or in two kinds of 4 bits) is dense in all of them, with exactly the values that the bytes stand
    for.

    Args:
      path: an HF folder, a .gguf file, a hub name, or what `open_checkpoint` returned for one.
      quant_type: a 4-bit type (see quantize), or None to keep the linears in 16 bits (LoRA without the Q).
      block_size: weights per scale.
      double_quant: whether to quantize the scales.
      rank: rank of the LoRA adapters; 0: none (`load_adapter` can add them later).
      alpha: adapters are scaled by `alpha / rank`.
      dropout: probability of dropout on the adapters' inputs, in calls with `rngs`.
      dora: adapters are DoRA's: the lengths of the adapted weights' columns are trained too (nn/dora.py).
      targets: names of the linears that get adapters, such as ["q_proj", "v_proj"]; None: all seven of every block.
      dtype: dtype of the activations: bfloat16, float16 or float32. Weights keep their own.
      seed: decides the adapters' initial A (B is zero).
      progress: called as `progress(tensors read, tensors in all)` after each one.

    Raises:
      UserError: nothing usable at `path`; a tensor missing, unexpected, of another shape than config.json says, or
        with values that are not finite; an unknown target; settings that contradict a quantized folder.
    """
    checkpoint = open_checkpoint(path) if isinstance(path, str | Path) else path
    config = LlamaConfig.from_dict(checkpoint.config)
    _check_targets(targets or ())
    _check_tensors(checkpoint, config)
    _check_stored(checkpoint, quant_type, block_size, double_quant)
    stored = isinstance(checkpoint, BitsandbytesCheckpoint)
    reader = _Reader(checkpoint, config.num_hidden_layers, progress)
    layers: dict[str, Any] = {norm: {"weight": reader.stack(f"{norm}.weight", _as_is)} for norm in BLOCK_NORMS}
    for linear in BLOCK_LINEARS:
        group, name = linear.split(".")
        weight = f"{linear}.weight"
        if quant_type is not None and not stored:
            parts = {"kernel": reader.quantized_stack(weight, quant_type, block_size, double_quant)}
        else:
            parts = {"kernel": reader.stack(weight, _to_kernel, packed=_is_packed(checkpoint, linear, config))}
        if config.has_bias(linear):
            parts["bias"] = reader.stack(f"{linear}.bias", _as_is)
        layers.setdefault(group, {})[name] = parts
    weights = {
        "embed_tokens": {"weight": reader.one("model.embed_tokens.weight", _as_is)},
        "layers": layers,
        "norm": {"weight": reader.one("model.norm.weight", _as_is)},
    }
    if not config.tie_word_embeddings:
        weights["lm_head"] = {"weight": reader.one("lm_head.weight", _as_is)}
    model = Llama(config, weights, dtype)
    if rank:
        adapters: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "dora": dora}
        add_lora(model, **adapters, targets=targets or BLOCK_LINEARS, rngs=nnx.Rngs(seed))
    return model


# What becomes of a tensor, and whether all its values are finite.
_Encode = Callable[[Array], tuple[Any, Array]]


def check_model(
    checkpoint: Checkpoint, *, quant_type: str | None = "nf4", block_size: int = 64, double_quant: bool = True
) -> None:
    """Whether `load_model` will take a checkpoint, as far as that can be told without reading a tensor.

    Args:
      checkpoint: what `open_checkpoint` returned.
      quant_type, block_size, double_quant: what `load_model` will be given.

    Raises:
      UserError: a configuration that is not supported; tensors missing, unexpected or of another shape than it says;
        settings that contradict a quantized folder.
    """
    _check_stored(checkpoint, quant_type, block_size, double_quant)
    _check_tensors(checkpoint, LlamaConfig.from_dict(checkpoint.config))


class _Reader:
    """Reads tensors in turn, each turned into what the model keeps before the next one is read."""

    def __init__(self, checkpoint: Checkpoint, num_layers: int, progress: Callable[[int, int], None] | None) -> None:
        self.checkpoint = checkpoint
        self.num_layers = num_layers
        self.progress = progress
        self.done, self.total = 0, len(checkpoint.names())

    def one(self, name: str, encode: _Encode, *, packed: bool = False) -> Any:
        if packed:
            assert isinstance(self.checkpoint, BitsandbytesCheckpoint)
            stored = jax.tree.map(jnp.asarray, self.checkpoint.read_packed(name))
            value, finite = _as_stored(stored, platform=platform_of())
        else:
            value, finite = encode(self._read(name))
        self._check(name, bool(finite))
        return value

    def stack(self, name: str, encode: _Encode, *, packed: bool = False) -> Any:
        """The tensors of that name in every layer, with `[L]` in front; `packed`: with the bytes that are stored."""
        stacks: Any = None
        for layer, tensor in enumerate(self._layers(name)):
            value = self.one(tensor, encode, packed=packed)
            if stacks is None:
                stacks = jax.tree.map(lambda leaf: aligned_empty((self.num_layers, *leaf.shape), leaf.dtype), value)
            for stack, leaf in zip(jax.tree.leaves(stacks), jax.tree.leaves(value), strict=True):
                stack[layer] = leaf
        return jax.tree.map(on_device, stacks)

    def quantized_stack(self, name: str, quant_type: str, block_size: int, double_quant: bool) -> NF4Tensor:
        """The tensors of that name in every layer, quantized."""
        settings: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
        if not compiled_on_cpu():
            return self.stack(name, functools.partial(_to_nf4, **settings, platform=platform_of()))
        first = self._layers(name)[0]
        out_features, in_features = self.checkpoint.shape(first)
        shape = (in_features, out_features)
        layout = device_layout(shape, block_size, platform_of(), quant_type)
        stack = QuantizedStack(self.num_layers, shape, str(self.checkpoint.dtype(first)), **settings, layout=layout)
        for layer, tensor in enumerate(self._layers(name)):
            self._check(tensor, stack.fill(layer, self.checkpoint.read(tensor)))
        return stack.tensor()

    def _layers(self, name: str) -> list[str]:
        return [f"model.layers.{layer}.{name}" for layer in range(self.num_layers)]

    def _read(self, name: str) -> Array:
        """A copy of what lies in the file."""
        stored = self.checkpoint.read(name)
        copy = aligned_empty(stored.shape, stored.dtype)
        np.copyto(copy, stored)
        return on_device(copy)

    def _check(self, name: str, finite: bool) -> None:
        """Counts a tensor as read.

        Raises:
          UserError: it has values that are not finite.
        """
        if not finite:
            raise not_finite(name, self.checkpoint.path)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _as_is(tensor: Array) -> tuple[Array, Array]:
    return tensor, _all_finite(tensor)


@jax.jit
def _all_finite(tensor: Array) -> Array:
    return jnp.isfinite(tensor).all()


@jax.jit
def _to_kernel(weight: Float[Array, "out in"]) -> tuple[Float[Array, "in out"], Array]:
    weight = _in_16_bits(weight)
    return weight.T, jnp.isfinite(weight).all()


@functools.partial(jax.jit, static_argnames=("quant_type", "block_size", "double_quant", "platform"))
def _to_nf4(
    weight: Float[Array, "out in"], *, quant_type: str, block_size: int, double_quant: bool, platform: str
) -> tuple[NF4Tensor, Array]:
    weight = _in_16_bits(weight)
    out_features, in_features = weight.shape
    layout = device_layout((in_features, out_features), block_size, platform, quant_type)
    return quantize(weight.T, quant_type, block_size, double_quant, layout=layout), jnp.isfinite(weight).all()


@functools.partial(jax.jit, static_argnames="platform")
def _as_stored(w: NF4Tensor, *, platform: str) -> tuple[NF4Tensor, Array]:
    floats = [leaf for leaf in jax.tree.leaves(w) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
    return w.to_layout(device_layout(w.shape, w.block_size, platform, w.quant_type)), finite


def _is_packed(checkpoint: Checkpoint, linear: str, config: LlamaConfig) -> bool:
    """Whether a linear is stored in 4 bits, and alike in all layers, so that the bytes can be stacked as they are."""
    if not isinstance(checkpoint, BitsandbytesCheckpoint):
        return False
    forms = {checkpoint.form(f"model.layers.{layer}.{linear}.weight") for layer in range(config.num_hidden_layers)}
    return len(forms) == 1 and None not in forms


def _check_stored(checkpoint: Checkpoint, quant_type: str | None, block_size: int, double_quant: bool) -> None:
    """Whether what was asked for is what a quantized checkpoint holds. Defaults ask for nothing.

    Raises:
      UserError: everything that contradicts it, at once.
    """
    if not isinstance(checkpoint, BitsandbytesCheckpoint):
        return
    forms = [form for name in checkpoint.names() if (form := checkpoint.form(name)) is not None]
    kinds, sizes = {form.quant_type for form in forms}, {form.block_size for form in forms}
    wrong = []
    if quant_type not in (*kinds, "nf4"):
        wrong.append((f"quant.type={quant_type or 'none'}", f"quant.type={min(kinds)}"))
    if block_size not in (*sizes, 64):
        wrong.append((f"quant.block_size={block_size}", f"quant.block_size={min(sizes)}"))
    if not double_quant and all(form.double_quant for form in forms):
        wrong.append(("quant.double_quant=false", "quant.double_quant=true"))
    errors = [
        UserError(
            f"{asked} for {checkpoint.path}, which bitsandbytes has quantized otherwise",
            why="its bytes are taken as they are: to quantize again would add error to error",
            fix=f"{fix}, or model.path=FOLDER of the 16-bit model",
        )
        for asked, fix in wrong
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def _in_16_bits(weight: Array) -> Array:
    return weight.astype(jnp.bfloat16) if weight.dtype == jnp.float32 else weight


def _check_targets(targets: Sequence[str]) -> None:
    paths = [("layers", *linear.split(".")) for linear in BLOCK_LINEARS]
    names = [path[-1] for path in paths]
    for target in targets:
        if not any(matching(path, (target,)) for path in paths):
            close = difflib.get_close_matches(target, names, n=1)
            raise UserError(
                f"unknown LoRA target {target!r}",
                why=f"the linears of a block are {', '.join(names)}",
                fix=f"did you mean {close[0]}?" if close else "",
            )


def _check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """Compares names, shapes and dtypes with what the configuration asks for; reads no tensor.

    Raises:
      UserError: everything that does not fit, at once.
    """
    expected = config.tensor_shapes()
    names = checkpoint.names()
    errors = []
    if missing := [name for name in expected if name not in set(names)]:
        errors.append(
            UserError(
                f"{len(missing)} tensors are missing in {checkpoint.path}: {_some(missing)}",
                why="the model's configuration asks for them",
                fix="fetch the checkpoint again; config.json and the weights must belong together",
            )
        )
    if unexpected := [name for name in names if name not in expected]:
        errors.append(
            UserError(
                f"{len(unexpected)} tensors of {checkpoint.path} have no place in the model: {_some(unexpected)}",
                why="leaving them out would compute something else than the model they belong to",
                fix="config.json and the weights must belong together, and be a plain LLaMA",
            )
        )
    there = [name for name in names if name in expected]
    wrong = [name for name in there if tuple(checkpoint.shape(name)) != expected[name]]
    errors += [
        UserError(
            f"tensor {name!r} of {checkpoint.path} has shape {checkpoint.shape(name)}, expected {expected[name]}",
            why=f"that is what the model's configuration says ({_sizes(config)})",
            fix="config.json and the weights must belong together",
        )
        for name in wrong[:_NAMED_AT_MOST]
    ]
    if len(wrong) > _NAMED_AT_MOST:
        errors.append(UserError(f"... and {len(wrong) - _NAMED_AT_MOST} more tensors of another shape"))
    errors += _mixed_dtypes(checkpoint, there)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def _mixed_dtypes(checkpoint: Checkpoint, names: list[str]) -> list[UserError]:
    """Layers are stacked, so the same tensor has to have one dtype in all of them."""
    first: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        if parts[1] != "layers":
            continue
        other = first.setdefault(".".join(parts[3:]), name)
        if checkpoint.dtype(name) != checkpoint.dtype(other):
            found, wanted = checkpoint.dtype(name), checkpoint.dtype(other)
            return [
                UserError(
                    f"tensor {name!r} of {checkpoint.path} is stored as {found}, {other!r} as {wanted}",
                    why="one tensor must have the same dtype in all layers",
                )
            ]
    return []


def _sizes(config: LlamaConfig) -> str:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return ", ".join(f"{key}={getattr(config, key)}" for key in keys)


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
