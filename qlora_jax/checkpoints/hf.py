"""HF folders: config.json, safetensors (one file, or shards under an index), tokenizer files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes  # registers bfloat16 with NumPy, by which safetensors finds it
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.checkpoints.source import sha256_of
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_NOT_FETCHED = ["original/*", "consolidated*", "onnx/*"]


class _Tensor(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class HFCheckpoint:
    """A LLaMA in an HF folder; see `Checkpoint`. Headers are read and checked here, tensors on demand."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_config(folder)
        self._files = _weight_files(folder)
        self._tensors: dict[str, _Tensor] = {}
        for file, expected in self._files.items():
            found = read_header(file)
            if expected is not None and (missing := sorted(expected - found.keys())):
                raise UserError(
                    f"tensor {missing[0]!r} is missing in {file}",
                    why=f"{folder / 'model.safetensors.index.json'} says it is there ({len(missing)} such tensors)",
                    fix="fetch the folder again",
                )
            self._tensors |= found
        tied = self.config["tie_word_embeddings"]
        self._names = [
            name
            for name in self._tensors
            # inv_freq: a buffer that old files carry and the config implies. A tied head may be stored all the same.
            if not name.endswith(".rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        ]

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensor(name).dtype

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        # Opened for each tensor: closing drops the mapping, so that pages read once do not pile up.
        try:
            with safe_open(tensor.file, framework="numpy") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(tensor.file, error) from error

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if not any((self.path / name).is_file() for name in _TOKENIZER_FILES):
            raise UserError(
                f"no tokenizer in {self.path}",
                why=f"none of {', '.join(_TOKENIZER_FILES)} is there",
                fix="copy the tokenizer's files of the original model into the folder",
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the tokenizer in {self.path} cannot be read", why=_first_line(error)) from error

    def fingerprint(self) -> str:
        return sha256_of(sorted(self._files))

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(
                f"tensor {name!r} is missing in {self.path}",
                why=f"the folder's weights ({', '.join(file.name for file in self._files)}) do not have it",
            )
        return self._tensors[name]


def fetch(name: str) -> Path:
    """Brings a model's configuration, safetensors and tokenizer from the Hugging Face hub; returns their folder.

    Raises:
      UserError: the name is unknown or closed to this user, or the hub cannot be reached and the cache has nothing.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # the hub's clients raise errors of several HTTP libraries
        raise UserError(
            f"no such folder or file: {name}; and it could not be had from the Hugging Face hub",
            why=_first_line(error),
            fix=f"check the name and the network, or `hf auth login` for a gated model, or fetch it once with "
            f"`hf download {name}`, or give a folder: model.path=FOLDER",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a LLaMA with the keys that `Checkpoint.config` promises.

    Raises:
      UserError: no config.json, not JSON, not a LLaMA with a language-model head, quantized, or a key missing.
    """
    file = folder / "config.json"
    if not file.is_file():
        others = sorted(folder.glob("*.gguf"))
        raise UserError(
            f"no config.json in {folder}",
            why="an HF folder has config.json, safetensors and a tokenizer",
            fix=f"model.path={others[0]}" if others else "model.path=FOLDER that holds config.json",
        )
    raw = read_json(file)
    kind, heads = raw.get("model_type", "llama"), raw.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "llamaforcausallm" not in [str(head).lower() for head in heads]:
        raise UserError(
            f"unsupported architecture in {file}: {kind} ({', '.join(map(str, heads))})",
            why="llama (LlamaForCausalLM) is the one supported here",
            fix="model.path=FOLDER of a LLaMA",
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "bitsandbytes")
        raise UserError(
            f"{folder} is quantized already ({method})",
            why="prequantized folders are not supported yet: weights are quantized as they are loaded",
            fix="model.path=FOLDER of the 16-bit model",
        )
    if bad := [key for key in _REQUIRED if not isinstance(raw.get(key), int) or raw[key] < 1]:
        raise UserError(
            f"{file} has no usable {', '.join(f'{key} ({raw.get(key)!r})' for key in bad)}",
            why="the model's shape follows from it: a whole number above 0",
        )
    return _normalised(raw)


def _normalised(raw: dict[str, Any]) -> dict[str, Any]:
    config = dict(raw)
    # transformers 5 writes rope_parameters = {rope_type, rope_theta, ...} and dtype; older versions wrote rope_theta,
    # rope_scaling = {type or rope_type, ...} and torch_dtype.
    rope = dict(config.pop("rope_parameters", None) or config.get("rope_scaling") or {})
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None)
    config["rope_theta"] = float(theta if theta is not None else config.get("rope_theta") or 10000.0)
    config["rope_scaling"] = None if rope_type == "default" else {"rope_type": rope_type, **rope}
    dtype = config.pop("dtype", None) or config.get("torch_dtype") or "float32"
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["rms_norm_eps"] = config.get("rms_norm_eps", 1e-6)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        config[key] = bool(config.get(key, False))
    return config


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights, each with the tensors that the index says it holds (None: there is no index)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map", why="it says which shard holds which tensor")
        shards: dict[Path, set[str] | None] = {}
        for shard in sorted(set(weight_map.values())):
            file = folder / shard
            held = {name for name, place in weight_map.items() if place == shard}
            if not file.is_file():
                raise UserError(
                    f"missing shard: {file}",
                    why=f"{index} lists it for {len(held)} tensors, the first {min(held)!r}",
                    fix="fetch the folder again",
                )
            shards[file] = held
        return shards
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise UserError(
            f"{folder} has weights only as pickles ({pickles[0].name})",
            why="reading a pickle runs the code inside it, and needs torch",
            fix="convert it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers",
        )
    raise UserError(f"no weights in {folder}", why="it has neither model.safetensors nor an index of shards")


def read_header(file: Path) -> dict[str, _Tensor]:
    """Place, shape and dtype of each tensor of a safetensors file.

    Raises:
      UserError: the file is damaged or cut short, or a tensor is no float32, float16 or bfloat16.
    """
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = opened.get_slice(name)
                tensors[name] = (tuple(view.get_shape()), str(view.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error
    for name, (_, dtype) in tensors.items():
        if dtype not in _DTYPES:
            raise UserError(
                f"tensor {name!r} of {file} is stored as {dtype}",
                why="weights are read as F32, F16 or BF16; quantized files are not supported yet",
                fix="model.path=FOLDER of the 16-bit model",
            )
    return {name: _Tensor(file, shape, _DTYPES[dtype]) for name, (shape, dtype) in tensors.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. UserError: it cannot be read, or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON", why=_first_line(error), fix="fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", why=f"it holds a {type(content).__name__}")
    return content


def _unreadable(file: Path, error: Exception) -> UserError:
    """The error for a safetensors file that the library cannot read: names the first tensor that is cut off."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                return UserError(
                    f"{file} is a pointer of git-lfs, not the weights",
                    why="the clone was made without git-lfs",
                    fix="git lfs pull",
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                return UserError(
                    f"{file} is truncated or no safetensors file",
                    why=f"its header should end at byte {8 + length}, the file has {size} bytes",
                    fix="fetch the file again",
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = sorted((8 + length + entry["data_offsets"][1], name) for name, entry in header.items())
        end, name = next((end, name) for end, name in ends if end > size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return UserError(f"{file} cannot be read as safetensors", why=_first_line(error), fix="fetch the file again")
    return UserError(
        f"{file} is truncated: tensor {name!r} should end at byte {end}, the file has {size} bytes",
        why="a download or copy was cut short",
        fix="fetch the file again",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
