"""What a model's makers say about generation: the tokens that end an answer, and how to sample."""

from typing import Any, NamedTuple

from qlora_jax.checkpoints.source import Checkpoint
from qlora_jax.checkpoints.tensorfile import read_json
from qlora_jax.errors import UserError

_FILE = "generation_config.json"
_RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What transformers takes where a file says do_sample and no more.
_SAMPLED = {"temperature": 1.0, "top_k": 50}


class GenerationConfig(NamedTuple):
    """Attributes:
    eos_ids: tokens that end an answer, in the order of the file.
    sampling: by the names of `Sampling`; nothing where the model is asked greedily.
    """

    eos_ids: tuple[int, ...]
    sampling: dict[str, float]


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """Of generation_config.json, or where there is none of the model's configuration (also a GGUF file's).

    Raises:
      UserError: the file is damaged, or has values of the wrong kind.
    """
    file = checkpoint.path / _FILE
    found = read_json(file) if file.is_file() else {}
    place = file if file.is_file() else checkpoint.path
    eos = found.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(_is_number(token) and token == int(token) for token in ids):
        raise UserError(f"{place}: eos_token_id is {eos!r}", why="it is a token, or a list of tokens")
    rules: dict[str, Any] = {name: found[name] for name in _RULES if found.get(name) is not None}
    if bad := [name for name, value in rules.items() if not _is_number(value)]:
        raise UserError(f"{file}: {bad[0]} is {rules[bad[0]]!r}", why="it is a number")
    if found.get("do_sample"):
        rules = _SAMPLED | rules
    else:
        rules = {name: value for name, value in rules.items() if name == "repetition_penalty"}
    return GenerationConfig(tuple(int(token) for token in ids), rules)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
