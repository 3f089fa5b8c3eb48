"""Adapters in PEFT's format as arrays by module name, whatever they are put on: a model, or a checkpoint's weights.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [out, r]
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector   [out], of DoRA
    base_model.model.lm_head.weight                                  of modules_to_save, the whole weight

Rank and alpha are those of adapter_config.json, or a module's own by `rank_pattern` and `alpha_pattern`; rsLoRA divides
alpha by the root of the rank. Which modules are adapted follows from target_modules, exclude_modules and
layers_to_transform, by the rules of PEFT.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qlora_jax.checkpoints.families import FAMILIES
from qlora_jax.checkpoints.tensorfile import StoredTensor, read_header, read_json, read_metadata, read_tensor
from qlora_jax.errors import UserError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's default where target_modules is null. A model has the linears of one family, so that all may stand together.
_DEFAULT_TARGETS = tuple({target for family in FAMILIES.values() for target in family.targets})
# Ways of initializing that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change its weights.
_INITIALIZERS = (None, True, False, "gaussian", "eva", "orthogonal")
# modules_to_save may name these; norms and the like are not read.
WHOLE_MODULES = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
_REFUSED = {
    "lora_bias": "B has a bias",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "single parameters are adapted, not linear layers",
    "trainable_token_indices": "embeddings of some tokens were trained",
    "fan_in_fan_out": "it is made for Conv1D layers",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "the factors are block-diagonal",
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "arrow_config": "several adapters are mixed",
    "monteclora_config": "the factors are random",
    "velora_config": "VeLoRA compresses activations",
    "kasa_config": "KaSA cuts the base's small singular values",
}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "target_modules": lambda value: isinstance(value, str) or _texts(value),
    "exclude_modules": lambda value: isinstance(value, str) or _texts(value),
    "modules_to_save": _texts,
    "rank_pattern": lambda value: isinstance(value, dict),
    "alpha_pattern": lambda value: isinstance(value, dict),
    "layers_pattern": lambda value: isinstance(value, str) or _texts(value),
    "layers_to_transform": lambda value: all(map(_is_number, value if isinstance(value, list) else [value])),
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
}


@dataclasses.dataclass(frozen=True)
class LinearAdapter:
    """The adapter of one linear layer: `y = (W + scaling * B @ A) @ x`, with rows of length `magnitude` where DoRA's.

    Attributes:
      a: A, float32, as PEFT stores it.
      b: B, float32, as PEFT stores it.
      alpha: such that `scaling = alpha / rank`, also of rsLoRA.
      magnitude: lengths of the rows of the adapted weight, float32; None: LoRA.
    """

    a: Float[np.ndarray, "rank in"]
    b: Float[np.ndarray, "out rank"]
    alpha: float
    magnitude: Float[np.ndarray, "out"] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter folder.

    Attributes:
      folder: where it lies.
      config: adapter_config.json.
      rank: `r`; modules may have their own.
      alpha: of modules without their own, such that `scaling = alpha / rank`.
      dropout: on the adapters' inputs in training.
      linears: by module name ("model.layers.0.self_attn.q_proj").
      whole: weights that replace the base's, by tensor name ("lm_head.weight").
      base_sha256: `Checkpoint.fingerprint()` of the base, where the adapter says it (those written here do).
      base_quantized_from: what the base was quantized from, where it lay in 4 bits and said so; see `quantized_from`.
    """

    folder: Path
    config: dict[str, Any]
    rank: int
    alpha: float
    dropout: float
    linears: dict[str, LinearAdapter]
    whole: dict[str, np.ndarray]
    base_sha256: str | None
    base_quantized_from: str | None


def read_adapter(
    folder: str | Path, linears: Mapping[str, tuple[int, int]], whole: Mapping[str, tuple[int, ...]] | None = None
) -> PeftAdapter:
    """Reads an adapter for a model.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      linears: the model's linear layers by name, `(out, in)`.
      whole: its tensors that may be replaced, by name, a part of `WHOLE_MODULES`.

    Raises:
      UserError: a file missing or damaged, a kind of adapter that is not read, targets that the model
        does not have, factors left over, missing, of wrong shape or not finite.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickle = folder / "adapter_model.bin"
        raise UserError(
            f"no {WEIGHTS} in {folder}",
            why=f"{pickle.name} is a pickle: reading it runs the code inside it" if pickle.is_file() else "",
            fix="PeftModel.from_pretrained(...).save_pretrained(FOLDER) in PEFT writes one",
        )
    ranks = {name: _rank_and_alpha(name, config, folder) for name in _targeted(linears, config, folder)}
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rank, _) in ranks.items():
        out_features, in_features = linears[name]
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (out_features, rank)
        if config.get("use_dora"):
            expected[f"{PREFIX}{name}.lora_magnitude_vector"] = (out_features,)
    replaced = _replaced(config, whole or {}, folder)
    expected |= {PREFIX + name: shape for name, shape in replaced.items()}
    held = read_header(file)
    _check(file, held, expected)
    arrays = {key: read_tensor(held[key]).astype(np.float32) for key in expected}
    if broken := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"{file} has NaN or infinity in {listed(broken)}", why="the training run that wrote it diverged"
        )
    rank, alpha = _rank_and_alpha("", config, folder)
    said = read_metadata(file)
    return PeftAdapter(
        folder=folder,
        config=config,
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        linears={
            name: LinearAdapter(
                arrays[f"{PREFIX}{name}.lora_A.weight"],
                arrays[f"{PREFIX}{name}.lora_B.weight"],
                module_alpha,
                arrays.get(f"{PREFIX}{name}.lora_magnitude_vector"),
            )
            for name, (_, module_alpha) in ranks.items()
        },
        whole={name: arrays[PREFIX + name] for name in replaced},
        base_sha256=said.get("base_sha256"),
        base_quantized_from=said.get("base_quantized_from"),
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that can be read.

    Raises:
      UserError: no adapter there, or one of another kind; every setting that is not supported is named.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"no {CONFIG} in {folder}" if folder.is_dir() else f"no such adapter folder: {folder}",
            why=f"an adapter is a folder with {CONFIG} and {WEIGHTS}",
        )
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}", why="LORA is the one supported")
    wrong = [
        f"{key}={config[key]!r}"
        for key, good in _KINDS.items()
        if config.get(key) is not None and not good(config[key])
    ]
    if wrong:
        raise UserError(f"{file} has values of the wrong kind: {', '.join(wrong)}", why="PEFT writes no such values")
    problems = [f"{key} ({why})" for key, why in _REFUSED.items() if _given(config.get(key))]
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']} (biases of the base were trained)")
    if config.get("init_lora_weights", True) not in _INITIALIZERS:
        problems.append(f"init_lora_weights={config['init_lora_weights']} (it changes the base's weights)")
    if unknown := [name for name in config.get("modules_to_save") or () if name not in WHOLE_MODULES]:
        problems.append(f"modules_to_save={listed(unknown)} (of whole layers {' and '.join(WHOLE_MODULES)} are read)")
    if problems:
        raise UserError(
            f"{folder} is an adapter of a kind that is not supported: {'; '.join(problems)}",
            why="LoRA, rsLoRA and DoRA on linear layers are read; anything else would give other outputs than in PEFT",
        )
    config.setdefault("r", 8)
    _rank_and_alpha("", config, folder)
    return config


def listed(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _rank_and_alpha(name: str, config: dict[str, Any], folder: Path) -> tuple[int, float]:
    """A module's rank, and alpha such that it is scaled by alpha / rank."""
    rank = _by_pattern(name, "rank_pattern", config["r"], config, folder)
    alpha = _by_pattern(name, "alpha_pattern", config.get("lora_alpha", 8), config, folder)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{folder / CONFIG}: r={rank!r}", why="the rank of an adapter is a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{folder / CONFIG}: lora_alpha={alpha!r}", why="the adapter is scaled by it: a number above 0")
    return rank, float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _by_pattern(name: str, key: str, default: Any, config: dict[str, Any], folder: Path) -> Any:
    """The value of the first pattern that matches the end of a name, as PEFT looks it up."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise _no_pattern(folder, f"{key} {pattern!r}", error) from error
    return default


def _targeted(linears: Iterable[str], config: dict[str, Any], folder: Path) -> list[str]:
    """The linears that the adapter is for, by PEFT's rules."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    try:
        found = [
            name
            for name in linears
            if _matches(name, targets or _DEFAULT_TARGETS)
            and not (excluded and _matches(name, excluded))
            and name.rpartition(".")[2] not in (config.get("modules_to_save") or ())
            and (isinstance(targets, str) or _in_layers(name, config))
        ]
    except re.error as error:
        raise _no_pattern(folder, f"target_modules {targets!r} or exclude_modules {excluded!r}", error) from error
    if not found:
        raise UserError(
            f"no layer of the model is a target of {folder}: target_modules={targets!r}",
            why=f"its layers are {', '.join(sorted({name.rpartition('.')[2] for name in linears})) or 'none'}",
        )
    return found


def _no_pattern(folder: Path, what: str, error: re.error) -> UserError:
    return UserError(f"{folder / CONFIG}: {what} is no regular expression", why=str(error))


def _matches(name: str, targets: Any) -> bool:
    """PEFT's rules: a string is a pattern for the whole name, a list holds names or their last components."""
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(name: str, config: dict[str, Any]) -> bool:
    """Whether layers_to_transform (and layers_pattern) let a module be adapted."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(expression, name) for expression in expressions)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _replaced(config: dict[str, Any], whole: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, tuple[int, ...]]:
    names = [WHOLE_MODULES[name] for name in config.get("modules_to_save") or ()]
    if absent := [name for name in names if name not in whole]:
        raise UserError(
            f"{folder} replaces {listed(absent)} (modules_to_save), which this model cannot take",
            why="its head is tied to the embedding, or it has no such layer",
        )
    return {name: whole[name] for name in names}


def _check(file: Path, held: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a file that holds more, less or other things."""
    if embeddings := [key for key in held if "lora_embedding_" in key]:
        raise UserError(
            f"{file} adapts an embedding: {listed(embeddings)}",
            why="LoRA, rsLoRA and DoRA on linear layers are read",
        )
    if left_over := sorted(held.keys() - expected.keys()):
        raise UserError(
            f"{file} has tensors that belong to no layer of the model: {listed(left_over)}",
            why="the adapter was made for another model, or for layers that are not linear",
        )
    if missing := sorted(expected.keys() - held.keys()):
        raise UserError(f"{file} lacks {listed(missing)}", why=f"{CONFIG} says that these layers are adapted")
    wrong = [
        f"{key} {held[key].shape}, expected {shape}{' (it is transposed)' if held[key].shape == shape[::-1] else ''}"
        for key, shape in expected.items()
        if held[key].shape != shape
    ]
    if wrong:
        raise UserError(f"{file} does not fit the model: {listed(wrong)}", why="A is [r, in] and B is [out, r] in PEFT")
