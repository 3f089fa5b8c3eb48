"""Adapters by module name as a folder that PEFT reads."""

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qlora_jax.checkpoints.peft_reader import CONFIG, PREFIX, WEIGHTS, WHOLE_MODULES, LinearAdapter
from qlora_jax.checkpoints.peft_readme import readme


def write_adapter(
    folder: Path,
    linears: Mapping[str, LinearAdapter],
    config: dict[str, Any],
    base_sha256: str,
    *,
    precision: str,
    place: Path,
    whole: Mapping[str, np.ndarray] | None = None,
    base_quantized_from: str | None = None,
) -> None:
    """Writes weights, configuration and README.

    Args:
      folder: an empty one.
      linears: by module name.
      config: from `adapter_config`.
      base_sha256: `Checkpoint.fingerprint()` of the base.
      precision: how the base's weights are stored in training, for the README.
      place: where the folder will lie.
      whole: weights that replace the base's, by tensor name.
      base_quantized_from: what the base was quantized from, where it lies in 4 bits and says so.
    """
    tensors = {PREFIX + name: value for name, value in (whole or {}).items()}
    for name, linear in linears.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = linear.a, linear.b
        if linear.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = linear.magnitude
    save_file(tensors, folder / WEIGHTS, metadata=metadata(base_sha256, base_quantized_from))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = readme(config, config["base_model_name_or_path"], base_sha256, precision, place)
    (folder / "README.md").write_text(text, encoding="utf-8")


def metadata(base_sha256: str, base_quantized_from: str | None) -> dict[str, str]:
    """What the header of an adapter's weights says."""
    said = {"format": "pt", "base_sha256": base_sha256}
    return said if base_quantized_from is None else said | {"base_quantized_from": base_quantized_from}


def adapter_config(
    linears: Mapping[str, LinearAdapter],
    all_names: Iterable[str],
    *,
    base_model: str,
    dropout: float = 0.0,
    whole: Iterable[str] = (),
) -> dict[str, Any]:
    """adapter_config.json.

    Args:
      linears: the adapter, by module name.
      all_names: of the model's linears, adapted or not.
      base_model: folder, file or hub name of the base.
      dropout: on the adapters' inputs in training.
      whole: names of the tensors that replace the base's.
    """
    leaves = {_leaf(name) for name in linears}
    if any(_leaf(name) in leaves and name not in linears for name in all_names):
        leaves = set(linears)  # a leaf name would reach layers that have no adapter
    rank, alpha = collections.Counter((linear.rank, linear.alpha) for linear in linears.values()).most_common(1)[0][0]
    ranks = {name: linear.rank for name, linear in linears.items()}
    alphas = {name: _plain(linear.alpha) for name, linear in linears.items()}
    modules = {tensor: module for module, tensor in WHOLE_MODULES.items()}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if any(name.startswith("encoder.") for name in linears) else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": _patterns(ranks, rank),
        "lora_alpha": _plain(alpha),
        "alpha_pattern": _patterns(alphas, _plain(alpha)),
        "lora_dropout": dropout,
        "target_modules": sorted(leaves),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(linear.magnitude is not None for linear in linears.values()),
        "modules_to_save": [modules[name] for name in whole] or None,
    }


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Those that differ from the default, by leaf name where all of that name have the same."""
    by_leaf: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(_leaf(name), set()).add(value)
    return {
        _leaf(name) if len(by_leaf[_leaf(name)]) == 1 else name: value
        for name, value in values.items()
        if value != default
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
