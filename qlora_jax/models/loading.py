"""load_model: from a checkpoint's files to a model with frozen 4-bit weights, one tensor at a time."""

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
from qlora_jax.checkpoints.t5 import is_t5
from qlora_jax.checkpoints.tensorfile import not_finite
from qlora_jax.models.checks import check_stored, check_targets, check_tensors
from qlora_jax.models.config import DecoderTensors, LlamaConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from qlora_jax.models.llama import Llama
from qlora_jax.models.t5 import T5
from qlora_jax.models.t5_config import STACKS, T5Config, bias_name
from qlora_jax.nf4 import NF4Tensor, device_layout, quantize
from qlora_jax.nf4.blockwise import compiled_on_cpu
from qlora_jax.nf4.placement import platform_of
from qlora_jax.nf4.streaming import QuantizedStack, aligned_empty, on_device
from qlora_jax.nn import add_lora


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
) -> Decoder | T5:
    """Loads a pretrained model for finetuning: the linears of its blocks in 4 bits, all frozen but the adapters.

    A LLaMA, or a model of a family like it (checkpoints/families.py), becomes a `Llama`, a GPT-NeoX (Pythia) a
    `GPTNeoX`, an encoder-decoder of the T5 family (1.0, 1.1, Flan) a `T5`.

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
      targets: names of the linears that get adapters, such as ["q_proj", "v_proj"], in a T5 ["q", "v"]; None: all of
        every block.
      dtype: dtype of the activations: bfloat16, float16 or float32. Weights keep their own.
      seed: decides the adapters' initial A (B is zero).
      progress: called as `progress(tensors read, tensors in all)` after each one.

    Raises:
      UserError: nothing usable at `path`; a tensor missing, unexpected, of another shape than config.json says, or
        with values that are not finite; an unknown target; settings that contradict a quantized folder.
    """
    checkpoint = open_checkpoint(path) if isinstance(path, str | Path) else path
    config = read_shape(checkpoint)
    check_targets(targets or (), block_linears(config))
    check_tensors(checkpoint, config)
    check_stored(checkpoint, quant_type, block_size, double_quant)
    reader = _Reader(checkpoint, progress)
    settings = None if quant_type is None or isinstance(checkpoint, BitsandbytesCheckpoint) else quant_type
    linear = functools.partial(reader.linear, quant_type=settings, block_size=block_size, double_quant=double_quant)
    if isinstance(config, T5Config):
        model: Decoder | T5 = T5(config, _t5_weights(config, reader, linear), dtype)
    elif isinstance(config, GPTNeoXConfig):
        model = GPTNeoX(config, _decoder_weights(config, reader, linear), dtype)
    else:
        model = Llama(config, _decoder_weights(config, reader, linear), dtype)
    if rank:
        linears = [name for _, name in block_linears(config)]
        adapters: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "dora": dora}
        add_lora(model, **adapters, targets=targets or linears, rngs=nnx.Rngs(seed))
    return model


def read_shape(checkpoint: Checkpoint) -> LlamaConfig | GPTNeoXConfig | T5Config:
    """The configuration of the model that a checkpoint holds.

    Raises:
      UserError: it is not supported.
    """
    if is_t5(checkpoint.config):
        return T5Config.from_dict(checkpoint.config)
    kind = GPTNeoXConfig if checkpoint.config.get("model_type") == "gpt_neox" else LlamaConfig
    return kind.from_dict(checkpoint.config)


def block_linears(config: DecoderTensors | T5Config) -> list[tuple[str, str]]:
    """The stacks of blocks and, for each, the dotted names of the linears inside a block."""
    if isinstance(config, T5Config):
        return [(f"{stack}.block", linear) for stack in STACKS for linear in config.block_linears(stack)]
    return [(config.layers_name.removeprefix("model."), linear) for linear in config.block_linears()]


def _decoder_weights(
    config: DecoderTensors, reader: "_Reader", linear: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for name in config.outer_shapes():
        _put(weights, name.removeprefix("model."), reader.one(name, _as_is))
    stack = config.layers_name.removeprefix("model.")
    for name in config.block_vectors():
        _put(weights, f"{stack}.{name}", reader.stack(config.layer_tensors(name), _as_is))
    for name in config.block_linears():
        biases = config.layer_tensors(f"{name}.bias") if config.has_bias(name) else None
        _put(weights, f"{stack}.{name}", linear(config.layer_tensors(f"{name}.weight"), biases))
    return weights


def _t5_weights(config: T5Config, reader: "_Reader", linear: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    weights: dict[str, Any] = {"shared": {"weight": reader.one("shared.weight", _as_is)}}
    if not config.tie_word_embeddings:
        weights["lm_head"] = {"weight": reader.one("lm_head.weight", _as_is)}
    for stack in STACKS:
        blocks = [f"{stack}.block.{index}" for index in range(config.depth(stack))]
        block: dict[str, Any] = {}
        for name in config.block_norms(stack):
            _put(block, name, {"weight": reader.stack([f"{prefix}.{name}.weight" for prefix in blocks], _as_is)})
        for name in config.block_linears(stack):
            _put(block, name, linear([f"{prefix}.{name}.weight" for prefix in blocks], None))
        weights[stack] = {
            "block": block,
            "relative_attention_bias": {"weight": reader.one(bias_name(stack), _as_is)},
            "final_layer_norm": {"weight": reader.one(f"{stack}.final_layer_norm.weight", _as_is)},
        }
    return weights


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Puts a value at a dotted name in nested dicts."""
    *above, last = name.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = value


# What becomes of a tensor, and whether all its values are finite.
_Encode = Callable[[Array], tuple[Any, Array]]


def check_model(
    checkpoint: Checkpoint, *, quant_type: str | None = "nf4", block_size: int = 64, double_quant: bool = True
) -> None:
    """Whether the doors will take a checkpoint, as far as that can be told without reading a tensor.

    Args:
      checkpoint: what `open_checkpoint` returned.
      quant_type, block_size, double_quant: what `load_model` will be given.

    Raises:
      UserError: a configuration that is not supported; tensors missing, unexpected or of another shape than it says;
        settings that contradict a quantized folder.
    """
    check_stored(checkpoint, quant_type, block_size, double_quant)
    check_tensors(checkpoint, read_shape(checkpoint))


class _Reader:
    """Reads tensors in turn, each turned into what the model keeps before the next one is read."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> None:
        self.checkpoint = checkpoint
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

    def linear(
        self,
        weights: list[str],
        biases: list[str] | None,
        *,
        quant_type: str | None,
        block_size: int,
        double_quant: bool,
    ) -> dict[str, Any]:
        """Kernel and bias of a linear in every layer; quant_type None: dense, or with the bytes that are stored."""
        if quant_type is not None:
            kernel = self.quantized_stack(weights, quant_type, block_size, double_quant)
        else:
            kernel = self.stack(weights, _to_kernel, packed=_is_packed(self.checkpoint, weights))
        return {"kernel": kernel} | ({} if biases is None else {"bias": self.stack(biases, _as_is)})

    def stack(self, names: list[str], encode: _Encode, *, packed: bool = False) -> Any:
        """One tensor of every layer, with `[L]` in front; `packed`: with the bytes that are stored."""
        stacks: Any = None
        for layer, name in enumerate(names):
            value = self.one(name, encode, packed=packed)
            if stacks is None:
                stacks = jax.tree.map(lambda leaf: aligned_empty((len(names), *leaf.shape), leaf.dtype), value)
            for stack, leaf in zip(jax.tree.leaves(stacks), jax.tree.leaves(value), strict=True):
                stack[layer] = leaf
        return jax.tree.map(on_device, stacks)

    def quantized_stack(self, names: list[str], quant_type: str, block_size: int, double_quant: bool) -> NF4Tensor:
        """One tensor of every layer, quantized."""
        settings: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
        if not compiled_on_cpu():
            return self.stack(names, functools.partial(_to_nf4, **settings, platform=platform_of()))
        out_features, in_features = self.checkpoint.shape(names[0])
        shape = (in_features, out_features)
        layout = device_layout(shape, block_size, platform_of(), quant_type)
        stack = QuantizedStack(len(names), shape, str(self.checkpoint.dtype(names[0])), **settings, layout=layout)
        for layer, name in enumerate(names):
            self._check(name, stack.fill(layer, self.checkpoint.read(name)))
        return stack.tensor()

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


def _is_packed(checkpoint: Checkpoint, names: list[str]) -> bool:
    """Whether a linear is stored in 4 bits, and alike in all layers, so that the bytes can be stacked as they are."""
    if not isinstance(checkpoint, BitsandbytesCheckpoint):
        return False
    forms = {checkpoint.form(name) for name in names}
    return len(forms) == 1 and None not in forms


def _in_16_bits(weight: Array) -> Array:
    return weight.astype(jnp.bfloat16) if weight.dtype == jnp.float32 else weight
