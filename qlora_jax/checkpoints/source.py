"""One view of a pretrained model, whatever file it lies in."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Checkpoint(Protocol):
    """A pretrained LLaMA: its configuration, its tensors under HF names, its tokenizer.

    Attributes:
      path: the folder or file that is read.
      config: HF's LLaMA keys. `rope_theta`, `rope_scaling` (None, or a dict with `rope_type`) and `torch_dtype` are
        plain top-level keys whichever spelling the file had; `num_key_value_heads`, `head_dim`,
        `tie_word_embeddings`, `attention_bias` and `mlp_bias` are always there.
    """

    path: Path
    config: dict[str, Any]

    def names(self) -> list[str]:
        """HF names of the model's tensors; no `lm_head.weight` where the head is tied to the embedding."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, `(out, in)` for the weight of a linear layer. UserError: no such tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """dtype that `read` returns: bfloat16, float16 or float32. UserError: no such tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, `[out, in]` for the weight of a linear layer, perhaps read-only and mapped from its file. Nothing
        else of it is kept.
        """
        ...

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with its chat template where there is one. UserError: the checkpoint has none."""
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) of the weights' files, concatenated in the order of their names."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a pretrained model for reading; no tensor is read yet.

    Args:
      path: an HF folder (config.json and safetensors, plain or in bitsandbytes' 4 bits), a .gguf file, or a name on the
        Hugging Face hub ("org/name"), which is fetched into the hub's cache. A folder or file of that name goes before
        the hub.

    Raises:
      UserError: nothing there, a file missing, damaged or cut short, or a model that cannot be read; each names the
        file, and the tensor where there is one.
    """
    from qlora_jax.checkpoints.bitsandbytes import open_folder
    from qlora_jax.checkpoints.gguf import GGUFCheckpoint
    from qlora_jax.checkpoints.hf import fetch

    local = Path(path).expanduser()
    if local.is_dir():
        return open_folder(local)
    if local.is_file():
        if local.suffix == ".safetensors" or local.name == "config.json":
            raise UserError(
                f"{local} is one file of an HF folder",
                why="the other files are needed too",
                fix=f"model.path={local.parent}",
            )
        return GGUFCheckpoint(local)
    if _HUB_NAME.fullmatch(str(path)):
        return open_folder(fetch(str(path)))
    raise UserError(
        f"no such folder or file: {path}",
        why="a model is an HF folder, a .gguf file, or a hub name of the form org/name",
        fix="model.path=PATH",
    )
