"""HF's T5 folders: what their config.json says in several spellings, and which of their tensors are copies."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

MODEL_TYPE = "t5"
HEAD = "T5ForConditionalGeneration"
_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# The embedding under other names, and a table that the first releases carry and no version of the model reads.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def is_t5(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == MODEL_TYPE


def normalised(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json of a T5 with the keys that `T5Config` reads.

    Raises:
      UserError: no language-model head, or a key missing.
    """
    heads = [str(head) for head in raw.get("architectures") or [HEAD]]
    # T5WithLMHeadModel: what HF called the same class until version 3.
    if not {HEAD, "T5WithLMHeadModel"} & set(heads):
        raise UserError(
            f"unsupported architecture in {file}: t5 ({', '.join(heads)})",
            why=f"of T5, {HEAD} is supported: encoder, decoder and head",
            fix="model.path=FOLDER of a whole T5",
        )
    if bad := [key for key in _REQUIRED if not isinstance(raw.get(key), int) or raw[key] < 1]:
        raise UserError(
            f"{file} has no usable {', '.join(f'{key} ({raw.get(key)!r})' for key in bad)}",
            why="the model's shape follows from it: a whole number above 0",
        )
    config = dict(raw)
    dtype = config.pop("dtype", None) or config.get("torch_dtype") or "float32"
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["num_decoder_layers"] = config.get("num_decoder_layers") or config["num_layers"]
    if config.get("decoder_start_token_id") is None:
        config["decoder_start_token_id"] = config.get("pad_token_id") or 0
    tied = config.get("tie_word_embeddings") is not False
    # transformers 5 writes tie_word_embeddings=true for every T5, and this key beside it; what is stored then tells.
    config["tie_word_embeddings"] = None if "scale_decoder_outputs" in config else tied
    config["scale_decoder_outputs"] = bool(config.get("scale_decoder_outputs", tied))
    return config


def is_kept_wide(name: str) -> bool:
    """Whether transformers leaves this linear out of bitsandbytes' 4 bits, whatever a folder says: T5's `wo`."""
    return name.endswith(".wo.weight")


def model_tensors(names: Collection[str], config: dict[str, Any]) -> list[str]:
    """The tensors of `names` that are the model, without copies; settles `config["tie_word_embeddings"]`."""
    left_out = {_UNREAD}
    if "shared.weight" in names:
        left_out.update(_COPIES)
    if config["tie_word_embeddings"] is None:
        config["tie_word_embeddings"] = "lm_head.weight" not in names
    elif config["tie_word_embeddings"]:
        left_out.add("lm_head.weight")
    return [name for name in names if name not in left_out]
