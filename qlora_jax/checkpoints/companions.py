"""What goes with a model's weights from one folder to another: configuration, tokenizer, chat template, generation."""

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.checkpoints.tensorfile import read_json
from qlora_jax.errors import UserError

# Of an HF folder, as they are: a tokenizer that is loaded and saved again may come out in other words.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
)


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a checkpoint's weights in 16 bits: the file's own keys where there is one."""
    file = checkpoint.path / "config.json"
    config = read_json(file) if file.is_file() else checkpoint.config
    return {key: value for key, value in config.items() if value is not None and key != "quantization_config"}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Brings a checkpoint's tokenizer, chat template, generation settings and licence into a folder.

    Returns:
      What is missing, in words; nothing where there is nothing to miss.
    """
    if checkpoint.path.is_dir():
        copy_files(checkpoint.path, folder)
        missing = [] if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file() else ["tokenizer"]
        return missing if (folder / "generation_config.json").is_file() else [*missing, "generation_config.json"]
    try:
        checkpoint.tokenizer().save_pretrained(folder)
    except UserError:
        return ["tokenizer"]
    ids = {
        key: checkpoint.config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        if key in checkpoint.config
    }
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return []


def copy_files(source: Path, folder: Path) -> None:
    """Copies what goes with weights or an adapter, from a folder into another; what is there already is replaced."""
    for pattern in _FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
