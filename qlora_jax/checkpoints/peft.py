"""LoRA adapters of models in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   float32 [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   float32 [out, r]

These are the transposes of `lora_a` and `lora_b` here, one pair for each layer of a stack. What PEFT calls
`model.layers.0.self_attn.q_proj` is entry 0 of the stack at `layers.self_attn.q_proj`.

A stack has one rank and one alpha. Layers of an adapter that differ in them (rank_pattern, alpha_pattern), or that it
leaves out (layers_to_transform), are filled up with zeros, which get no gradient, and scaled into B; on the way out
trailing zeros are cut off again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.peft_reader import CONFIG, WHOLE_MODULES, LinearAdapter, read_adapter
from qlora_jax.checkpoints.peft_writer import adapter_config, write_adapter
from qlora_jax.errors import UserError
from qlora_jax.nn import ReplacedParam, attach_dora, dora_dense, nf4_dense
from qlora_jax.nn.traversal import walk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=nnx.Module)

# What HF has beside `model` at the top of a model.
_ROOTS = ("lm_head", "encoder", "decoder", "gpt_neox", "embed_out")


class _Layer(NamedTuple):
    """One nf4_dense and the names PEFT has for it: one, or one for each layer of a stack."""

    dense: nf4_dense
    names: tuple[str, ...]


def save_adapter(
    model: nnx.Module,
    folder: str | Path,
    *,
    base_model: str,
    base_sha256: str,
    base_quantized_from: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes the adapters of a model as PEFT reads them, with a README and, where given, tokenizer and chat template.

    The folder appears whole or not at all; an adapter that is there already is replaced.

    Args:
      model: a model whose nf4_dense layers have adapters, all of one dropout.
      folder: where to write.
      base_model: folder, file or hub name of the base.
      base_sha256: its `Checkpoint.fingerprint()`.
      base_quantized_from: `BitsandbytesCheckpoint.quantized_from` of a base in 4 bits.
      tokenizer: saved beside the adapter.

    Raises:
      UserError: no adapters, adapters that one configuration cannot describe, or a folder that cannot be written or
        holds something else than an adapter.
    """
    folder = Path(folder)
    layers = list(_layers(model))
    adapted = [layer for layer in layers if layer.dense.rank > 0]
    if not adapted:
        raise UserError(f"this {type(model).__name__} has no adapters to save", fix="load_model(..., rank=16)")
    if len(dropouts := {layer.dense.dropout for layer in adapted}) > 1:
        raise UserError(f"adapters differ in dropout: {sorted(dropouts)}", why="adapter_config.json has one of it")
    if len({isinstance(layer.dense, dora_dense) for layer in adapted}) > 1:
        raise UserError("some adapters are DoRA's and some LoRA's", why="adapter_config.json has one use_dora")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is not empty and holds no adapter",
            why="saving replaces the whole folder",
            fix="give a new folder, or empty this one",
        )
    linears = {name: linear for layer in adapted for name, linear in _unstacked(layer)}
    whole = {
        name: np.asarray(weight.get_value())
        for name, weight in _whole(model).items()
        if isinstance(weight, ReplacedParam)
    }
    names = [name for layer in layers for name in layer.names]
    dropout = adapted[0].dense.dropout
    config = adapter_config(linears, names, base_model=base_model, dropout=dropout, whole=whole)
    with whole_folder(folder) as new:
        precision = _precision(adapted[0].dense)
        write_adapter(
            new,
            linears,
            config,
            base_sha256,
            precision=precision,
            place=folder,
            whole=whole,
            base_quantized_from=base_quantized_from,
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def load_adapter(model: M, folder: str | Path, *, dropout: float | None = None) -> M:
    """Puts a PEFT adapter on a model, in place. Nothing is changed unless everything fits.

    Layers without an adapter get one; adapters of the same rank that are there already take its values. Whole weights
    that the adapter replaces (modules_to_save) take the place of the model's and stay frozen.

    Args:
      model: a model with nf4_dense layers, such as `load_model` returns.
      folder: an adapter folder, written by `save_adapter` or by PEFT (LoRA, rsLoRA or DoRA on linear layers).
      dropout: on the adapters' inputs, in calls with `rngs`; None: the adapter's own.

    Returns:
      `model`.

    Raises:
      UserError: as `read_adapter`; or other adapters on the model.
    """
    layers, places = list(_layers(model)), _whole(model)
    adapter = read_adapter(
        folder,
        {name: (layer.dense.out_features, layer.dense.in_features) for layer in layers for name in layer.names},
        {name: weight.get_value().shape for name, weight in places.items()},
    )
    stacks = []
    for layer in layers:
        found = [adapter.linears.get(name) for name in layer.names]
        rank = max((linear.rank for linear in found if linear is not None), default=0)
        if rank == 0 and layer.dense.rank > 0:
            raise UserError(
                f"the model has an adapter at {layer.names[0]} that {folder} does not have",
                fix="load the model with rank=0",
            )
        if rank > 0 and layer.dense.rank not in (0, rank):
            raise UserError(
                f"the model has an adapter of rank {layer.dense.rank} at {layer.names[0]}, {folder} one of rank {rank}",
                fix="load the model with rank=0",
            )
        magnitudes = [linear.magnitude for linear in found if linear is not None and linear.magnitude is not None]
        if magnitudes and len(magnitudes) < len(found):
            raise UserError(
                f"{folder} is DoRA on {len(magnitudes)} of {len(found)} layers of {layer.names[0]} and the like",
                why="the layers of a stack get magnitudes together",
            )
        if layer.dense.rank > 0 and rank > 0 and isinstance(layer.dense, dora_dense) != bool(magnitudes):
            raise UserError(
                f"of the adapters at {layer.names[0]}, the model's and that of {folder}, one is DoRA's and one LoRA's",
                fix="load the model with rank=0",
            )
        if rank > 0:
            stacks.append((layer.dense, rank, magnitudes, *_stacked(found, layer.dense, rank)))
    for dense, rank, magnitudes, alpha, a, b in stacks:
        if dense.rank == 0:
            settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "rngs": nnx.Rngs(0)}
            settings["a_init"] = nnx.initializers.zeros
            if magnitudes:
                attach_dora(dense, **settings)
            else:
                dense.attach_adapter(**settings)
        dense.alpha, dense.dropout = alpha, adapter.dropout if dropout is None else dropout
        values = [(variable, value) for variable, value in zip(_variables(dense), (a, b), strict=True)]
        if isinstance(dense, dora_dense):
            together = np.stack(magnitudes) if dense.num_layers is not None else magnitudes[0]
            values.append((dense.lora_magnitude, together))
        for variable, value in values:
            before = variable.get_value()
            # An array not bound to its device stays so: it may meet arrays on others.
            variable.set_value(jax.device_put(value, before.sharding if before.committed else None))
    for name, value in adapter.whole.items():
        module = getattr(model, name.split(".")[-2])
        module.weight = ReplacedParam(jnp.asarray(value))
    return model


def module_names(path: tuple[str, ...], num_layers: int | None) -> tuple[str, ...]:
    """HF's names of the module at an NNX path, one for each layer of a stack.

    The part after `layers` is numbered: ("layers", "mlp", "up_proj") is model.layers.{i}.mlp.up_proj; in a T5 that
    after `block`.
    """
    outer = path if path[0] in _ROOTS else ("model", *path)
    if num_layers is None:
        return (".".join(outer),)
    numbered = next((part for part in outer if part in ("layers", "block")), None)
    if numbered is None:
        raise UserError(
            f"the stack of layers at {'.'.join(path)} has no name in PEFT",
            why="a stack's layers are numbered after a component called `layers`",
        )
    cut = outer.index(numbered) + 1
    return tuple(".".join((*outer[:cut], str(i), *outer[cut:])) for i in range(num_layers))


def _layers(model: nnx.Module) -> Iterator[_Layer]:
    seen = set()
    for path, node in walk(model):
        if isinstance(node, nf4_dense) and id(node) not in seen:
            seen.add(id(node))
            yield _Layer(node, module_names(path or ("dense",), node.num_layers))


def _whole(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The weights that an adapter may replace as a whole; none where head and embedding are one."""
    modules = {tensor: getattr(model, module, None) for module, tensor in WHOLE_MODULES.items()}
    weights = {name: getattr(module, "weight", None) for name, module in modules.items()}
    if not all(isinstance(weight, nnx.Variable) for weight in weights.values()):
        return {}
    return {name: weight for name, weight in weights.items() if isinstance(weight, nnx.Variable)}


def _variables(dense: nf4_dense) -> tuple[nnx.LoRAParam, nnx.LoRAParam]:
    assert dense.lora_a is not None
    assert dense.lora_b is not None
    return dense.lora_a, dense.lora_b


def _stacked(
    found: list[LinearAdapter | None], dense: nf4_dense, rank: int
) -> tuple[float, Float[np.ndarray, "*layers in rank"], Float[np.ndarray, "*layers rank out"]]:
    """alpha, A and B of a stack (or of one layer): of one rank and scaling, whatever its layers have."""
    there = [linear for linear in found if linear is not None]
    scaling = max(linear.scaling for linear in there)
    alike = len({(linear.rank, linear.alpha) for linear in there}) == 1
    alpha = there[0].alpha if alike else scaling * rank
    a = np.zeros((len(found), dense.in_features, rank), np.float32)
    b = np.zeros((len(found), rank, dense.out_features), np.float32)
    for i, linear in enumerate(found):
        if linear is not None:
            a[i, :, : linear.rank] = linear.a.T
            b[i, : linear.rank] = linear.b.T if alike else linear.b.T * (linear.scaling / scaling)
    return (alpha, a, b) if dense.num_layers is not None else (alpha, a[0], b[0])


def _unstacked(layer: _Layer) -> Iterator[tuple[str, LinearAdapter]]:
    """What each layer of a stack has, without the zeros that it was filled up with; nothing where it is all zeros."""
    dense = layer.dense
    a, b = (np.asarray(variable.get_value(), np.float32) for variable in _variables(dense))
    a, b = (factor if factor.ndim == 3 else factor[None] for factor in (a, b))
    used = a.any(1) | b.any(2)
    ranks = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in used]
    if not any(ranks):
        ranks = [dense.rank] * len(ranks)
    magnitudes: list[Any] = [None] * len(ranks)
    if isinstance(dense, dora_dense):
        ranks = [max(rank, 1) for rank in ranks]  # magnitudes may be all that was trained
        magnitudes = list(np.asarray(dense.lora_magnitude.get_value(), np.float32).reshape(len(ranks), -1))
    for i, (name, rank) in enumerate(zip(layer.names, ranks, strict=True)):
        if rank:
            alpha = dense.alpha if rank == dense.rank else dense.scaling * rank
            a_i, b_i = np.ascontiguousarray(a[i, :, :rank].T), np.ascontiguousarray(b[i, :rank].T)
            yield name, LinearAdapter(a_i, b_i, alpha, magnitudes[i])


def _precision(dense: nf4_dense) -> str:
    kernel = dense.kernel.get_value()
    quant_type = getattr(kernel, "quant_type", None)
    return f"{kernel.dtype}" if quant_type is None else f"{quant_type}, blocks of {kernel.block_size}"
