"""LoRA adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   float32 [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   float32 [out, r]

These are the transposes of `lora_a` and `lora_b` here, one pair for each layer of a stack. What PEFT calls
`model.layers.0.self_attn.q_proj` is entry 0 of the stack at `layers.self_attn.q_proj`.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import save_file

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.peft_readme import readme
from qlora_jax.checkpoints.tensorfile import read_header, read_json, read_tensor
from qlora_jax.errors import UserError
from qlora_jax.nn import nf4_dense
from qlora_jax.nn.traversal import walk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=nnx.Module)

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's default where target_modules is null, for LLaMA.
_DEFAULT_TARGETS = ("q_proj", "v_proj")
# Ways of initializing that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change its weights.
_INITIALIZERS = (None, True, False, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "use_dora": "DoRA rescales the base's columns",
    "modules_to_save": "whole layers were trained beside the adapter",
    "lora_bias": "B has a bias",
    "rank_pattern": "layers differ in rank",
    "alpha_pattern": "layers differ in alpha",
    "layers_to_transform": "only some layers are adapted",
    "layer_replication": "layers of the base are repeated",
    "exclude_modules": "modules are excluded by pattern",
    "target_parameters": "single parameters are adapted, not linear layers",
    "trainable_token_indices": "embeddings of some tokens were trained",
    "fan_in_fan_out": "it is made for Conv1D layers",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "the factors are block-diagonal",
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "arrow_config": "several adapters are mixed",
    "monteclora_config": "the factors are random",
}


class _Layer(NamedTuple):
    """One nf4_dense and the names PEFT has for it: one, or one for each layer of a stack."""

    dense: nf4_dense
    names: tuple[str, ...]

    @property
    def leaf(self) -> str:
        return self.names[0].rpartition(".")[2]


def save_adapter(
    model: nnx.Module,
    folder: str | Path,
    *,
    base_model: str,
    base_sha256: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes the adapters of a model as PEFT reads them, with a README and, where given, tokenizer and chat template.

    The folder appears whole or not at all; an adapter that is there already is replaced.

    Args:
      model: a model whose nf4_dense layers have adapters, all of one rank, alpha and dropout.
      folder: where to write.
      base_model: folder, file or hub name of the base.
      base_sha256: its `Checkpoint.fingerprint()`.
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
    settings = {(layer.dense.rank, layer.dense.alpha, layer.dense.dropout) for layer in adapted}
    if len(settings) > 1:
        raise UserError(
            f"adapters differ in (rank, alpha, dropout): {sorted(settings)}",
            why="adapter_config.json has one of each",
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CONFIG).is_file():
        raise UserError(
            f"{folder} is not empty and holds no adapter",
            why="saving replaces the whole folder",
            fix="give a new folder, or empty this one",
        )
    tensors = {f"{_PREFIX}{name}.{key}": factor for layer in adapted for name, key, factor in _factors(layer)}
    config = _config(layers, base_model)
    with whole_folder(folder) as new:
        save_file(tensors, new / _WEIGHTS, metadata={"format": "pt", "base_sha256": base_sha256})
        (new / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = readme(config, base_model, base_sha256, _precision(adapted[0].dense), folder)
        (new / "README.md").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def load_adapter(model: M, folder: str | Path) -> M:
    """Puts a PEFT adapter on a model, in place. Nothing is changed unless everything fits.

    Layers without an adapter get one; adapters of the same rank that are there already take its values.

    Args:
      model: a model with nf4_dense layers, such as `load_model` returns.
      folder: an adapter folder, written by `save_adapter` or by PEFT (LoRA or rsLoRA on linear layers).

    Returns:
      `model`.

    Raises:
      UserError: a file missing or damaged, a kind of adapter that is not LoRA on linear layers, targets that the model
        does not have, factors left over, missing, of wrong shape or not finite, or other adapters on the model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    file = folder / _WEIGHTS
    if not file.is_file():
        pickle = folder / "adapter_model.bin"
        raise UserError(
            f"no {_WEIGHTS} in {folder}",
            why=f"{pickle.name} is a pickle: reading it runs the code inside it" if pickle.is_file() else "",
            fix="PeftModel.from_pretrained(...).save_pretrained(FOLDER) in PEFT writes one",
        )
    rank, alpha = config["r"], float(config.get("lora_alpha", 8))
    # nf4_dense scales by alpha / rank, rsLoRA by alpha / sqrt(rank).
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    dropout = float(config.get("lora_dropout", 0.0))
    targeted = _targeted(list(_layers(model)), config, folder, rank)
    factors = _read_factors(file, targeted, rank)
    for layer in targeted:
        dense = layer.dense
        if dense.rank == 0:
            zeros = nnx.initializers.zeros
            dense.attach_adapter(rank=rank, alpha=alpha, dropout=dropout, rngs=nnx.Rngs(0), a_init=zeros)
        dense.alpha, dense.dropout = alpha, dropout
        for variable, key in _variables(dense):
            value = [factors[f"{_PREFIX}{name}.{key}"].T for name in layer.names]
            stacked = np.stack(value) if dense.num_layers is not None else value[0]
            before = variable.get_value()
            # An array not bound to its device stays so: it may meet arrays on others.
            variable.set_value(jax.device_put(stacked, before.sharding if before.committed else None))
    return model


def module_names(path: tuple[str, ...], num_layers: int | None) -> tuple[str, ...]:
    """HF's names of the module at an NNX path, one for each layer of a stack.

    The part after `layers` is numbered: ("layers", "mlp", "up_proj") is model.layers.{i}.mlp.up_proj.
    """
    outer = path if path[0] == "lm_head" else ("model", *path)
    if num_layers is None:
        return (".".join(outer),)
    if "layers" not in outer:
        raise UserError(
            f"the stack of layers at {'.'.join(path)} has no name in PEFT",
            why="a stack's layers are numbered after a component called `layers`",
        )
    cut = outer.index("layers") + 1
    return tuple(".".join((*outer[:cut], str(i), *outer[cut:])) for i in range(num_layers))


def _layers(model: nnx.Module) -> Iterator[_Layer]:
    seen = set()
    for path, node in walk(model):
        if isinstance(node, nf4_dense) and id(node) not in seen:
            seen.add(id(node))
            yield _Layer(node, module_names(path or ("dense",), node.num_layers))


def _variables(dense: nf4_dense) -> tuple[tuple[nnx.LoRAParam, str], tuple[nnx.LoRAParam, str]]:
    assert dense.lora_a is not None
    assert dense.lora_b is not None
    return (dense.lora_a, "lora_A.weight"), (dense.lora_b, "lora_B.weight")


def _factors(layer: _Layer) -> Iterator[tuple[str, str, Float[np.ndarray, "rows columns"]]]:
    for variable, key in _variables(layer.dense):
        values = np.asarray(variable.get_value(), np.float32)
        for name, factor in zip(layer.names, values if values.ndim == 3 else values[None], strict=True):
            yield name, key, np.ascontiguousarray(factor.T)


def _config(layers: list[_Layer], base_model: str) -> dict[str, Any]:
    adapted = [layer for layer in layers if layer.dense.rank > 0]
    names = {layer.leaf for layer in adapted}
    if any(layer.leaf in names and layer.dense.rank == 0 for layer in layers):
        # A leaf name would reach layers that have no adapter.
        names = {name for layer in adapted for name in layer.names}
    dense = adapted[0].dense
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": dense.rank,
        "lora_alpha": int(dense.alpha) if dense.alpha.is_integer() else dense.alpha,
        "lora_dropout": dense.dropout,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _precision(dense: nf4_dense) -> str:
    kernel = dense.kernel.get_value()
    quant_type = getattr(kernel, "quant_type", None)
    return f"{kernel.dtype}" if quant_type is None else f"{quant_type}, blocks of {kernel.block_size}"


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        raise UserError(
            f"no {_CONFIG} in {folder}" if folder.is_dir() else f"no such adapter folder: {folder}",
            why=f"an adapter is a folder with {_CONFIG} and {_WEIGHTS}",
        )
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}", why="LORA is the one supported")
    problems = [f"{key} ({why})" for key, why in _REFUSED.items() if _given(config.get(key))]
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']} (biases of the base were trained)")
    if config.get("init_lora_weights", True) not in _INITIALIZERS:
        problems.append(f"init_lora_weights={config['init_lora_weights']} (it changes the base's weights)")
    if problems:
        raise UserError(
            f"{folder} is an adapter of a kind that is not supported: {'; '.join(problems)}",
            why="LoRA and rsLoRA on linear layers are read; anything else would give other outputs than in PEFT",
        )
    rank = config.setdefault("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{file}: r={rank!r}", why="the rank of an adapter is a whole number above 0")
    return config


def _given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _targeted(layers: list[_Layer], config: dict[str, Any], folder: Path, rank: int) -> list[_Layer]:
    """The layers that the adapter is for, by PEFT's rules."""
    targets = config.get("target_modules")
    try:
        chosen = [(layer, [_matches(name, targets) for name in layer.names]) for layer in layers]
    except re.error as error:
        raise UserError(
            f"{folder / _CONFIG}: target_modules={targets!r} is no regular expression", why=str(error)
        ) from error
    for layer, hits in chosen:
        if any(hits) and not all(hits):
            raise UserError(
                f"{folder} adapts {sum(hits)} of {len(hits)} layers, but not {layer.names[hits.index(False)]}",
                why="the layers of a stack are adapted together",
            )
        if layer.dense.rank > 0 and not any(hits):
            raise UserError(
                f"the model has an adapter at {layer.names[0]} that {folder} does not have",
                fix="load the model with rank=0",
            )
        if any(hits) and layer.dense.rank not in (0, rank):
            raise UserError(
                f"the model has an adapter of rank {layer.dense.rank} at {layer.names[0]}, {folder} one of rank {rank}",
                fix="load the model with rank=0",
            )
    targeted = [layer for layer, hits in chosen if all(hits)]
    if not targeted:
        raise UserError(
            f"no layer of the model is a target of {folder}: target_modules={targets!r}",
            why=f"its layers are {', '.join(sorted({layer.leaf for layer in layers})) or 'none'}",
        )
    return targeted


def _matches(name: str, targets: Any) -> bool:
    """PEFT's rules: a string is a pattern for the whole name, a list holds names or their last components."""
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or _DEFAULT_TARGETS)


def _read_factors(file: Path, targeted: list[_Layer], rank: int) -> dict[str, Float[np.ndarray, "rows columns"]]:
    """All factors by key, float32 in PEFT's orientation; refuses a file that holds more, less or other things."""
    expected = {}
    for layer in targeted:
        for name in layer.names:
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, layer.dense.in_features)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (layer.dense.out_features, rank)
    held = read_header(file)
    if embeddings := [key for key in held if "lora_embedding_" in key]:
        raise UserError(
            f"{file} adapts an embedding: {_listed(embeddings)}",
            why="LoRA and rsLoRA on linear layers are read",
        )
    if left_over := sorted(held.keys() - expected.keys()):
        raise UserError(
            f"{file} has tensors that belong to no layer of the model: {_listed(left_over)}",
            why="the adapter was made for another model, or for layers that are not linear",
        )
    if missing := sorted(expected.keys() - held.keys()):
        raise UserError(f"{file} lacks {_listed(missing)}", why=f"{_CONFIG} says that these layers are adapted")
    wrong = [
        f"{key} {held[key].shape}, expected {shape}{' (it is transposed)' if held[key].shape == shape[::-1] else ''}"
        for key, shape in expected.items()
        if held[key].shape != shape
    ]
    if wrong:
        raise UserError(
            f"{file} does not fit the model: {_listed(wrong)}", why="A is [r, in] and B is [out, r] in PEFT"
        )
    factors = {key: read_tensor(held[key]).astype(np.float32) for key in expected}
    if broken := [key for key, factor in factors.items() if not np.isfinite(factor).all()]:
        raise UserError(
            f"{file} has NaN or infinity in {_listed(broken)}", why="the training run that wrote it diverged"
        )
    return factors


def _listed(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
