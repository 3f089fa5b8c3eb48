"""HF folders: config.json, safetensors (one file, or shards with or without an index), tokenizer files."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.checkpoints import t5
from qlora_jax.checkpoints.digest import sha256_of
from qlora_jax.checkpoints.families import FAMILIES, normalised
from qlora_jax.checkpoints.tensorfile import StoredTensor, first_line, read_header, read_json, read_tensor
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tokenizer_config.json")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model"]
# Buffers that old files carry and the configuration implies; masks among them are stored as BOOL or U8.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_NOT_FETCHED = ["original/*", "consolidated*", "onnx/*"]


class HFCheckpoint:
    """A model in an HF folder; see `Checkpoint`. Headers are read and checked here, tensors on demand."""

    # By the names of safetensors, beside F32, F16 and BF16.
    stored_dtypes: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_config(folder)
        self._files = _weight_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        for file, expected in self._files.items():
            found = read_header(file, self.stored_dtypes, _BUFFERS)
            expected = expected and {name for name in expected if not _BUFFERS.fullmatch(name)}
            if expected is not None and (missing := sorted(expected - found.keys())):
                raise UserError(
                    f"tensor {missing[0]!r} is missing in {file}",
                    why=f"{folder / 'model.safetensors.index.json'} says it is there ({len(missing)} such tensors)",
                    fix="fetch the folder again",
                )
            self._tensors |= found
        self._names = self._model_tensors()

    def _model_tensors(self) -> list[str]:
        if t5.is_t5(self.config):
            return t5.model_tensors(self._tensors, self.config)
        head = FAMILIES[self.config.get("model_type", "llama")].head_weight
        if "lm_head.weight" in self._tensors:  # transformers 5 has this name for every family's head
            self._tensors[head] = self._tensors.pop("lm_head.weight")
        # A tied head may be stored all the same.
        return [name for name in self._tensors if not (self.config["tie_word_embeddings"] and name == head)]

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensor(name).dtype

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self._tensor(name))

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
        except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
            raise UserError(f"the tokenizer in {self.path} cannot be read", why=first_line(error)) from error

    def fingerprint(self) -> str:
        return sha256_of(sorted(self._files))

    def _tensor(self, name: str) -> StoredTensor:
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
    from huggingface_hub import errors, snapshot_download

    folder = f"or give a folder: model.path=FOLDER, which `hf download {name}` prints where there is a network"
    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the Hugging Face hub",
            why="its makers want to be asked first, and the hub does not know that you may have it",
            fix=f"ask on https://huggingface.co/{name}, then `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no such folder or file: {name}; and the Hugging Face hub has no model of that name",
            why="it is misspelt, or private and you are not logged in",
            fix="check the name, or `hf auth login`",
        ) from error
    except Exception as error:  # the hub's clients raise errors of several HTTP libraries
        raise UserError(
            f"no such folder or file: {name}; and it could not be had from the Hugging Face hub",
            why=first_line(error),
            fix=f"check the network, {folder}",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model with the keys that `Checkpoint.config` promises.

    Raises:
      UserError: no config.json, not JSON, no language model of a known family, quantized otherwise than by
        bitsandbytes in 4 bits, or a key missing.
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
    if t5.is_t5(raw):
        if quantization := raw.get("quantization_config"):
            _check_method(folder, quantization)
        return t5.normalised(raw, file)
    kind = raw.get("model_type", "llama")
    known = {name: family.head for name, family in FAMILIES.items()} | {t5.MODEL_TYPE: t5.HEAD}
    heads = [str(head) for head in raw.get("architectures") or [known.get(kind)]]
    if kind not in known or known[kind].lower() not in [head.lower() for head in heads]:
        raise UserError(
            f"unsupported architecture in {file}: {kind} ({', '.join(heads)})",
            why=f"supported are {', '.join(f'{name} ({head})' for name, head in known.items())}",
            fix="model.path=FOLDER of a model of one of these families",
        )
    if quantization := raw.get("quantization_config"):
        _check_method(folder, quantization)
    if bad := [key for key in _REQUIRED if not isinstance(raw.get(key), int) or raw[key] < 1]:
        raise UserError(
            f"{file} has no usable {', '.join(f'{key} ({raw.get(key)!r})' for key in bad)}",
            why="the model's shape follows from it: a whole number above 0",
        )
    try:
        return normalised(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} has a value of the wrong kind",
            why=first_line(error),
            fix="see rope_theta, rope_scaling or rope_parameters, and the numbers of heads in it",
        ) from error


def _check_method(folder: Path, quantization: Any) -> None:
    """Whether a quantization_config is one that is read: bitsandbytes in 4 bits.

    Raises:
      UserError: it is another, which is named.
    """
    quantization = quantization if isinstance(quantization, dict) else {"quant_method": repr(quantization)}
    four_bits = bool(quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"))
    eight_bits = bool(quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"))
    # Old files do not say quant_method.
    method = str(quantization.get("quant_method") or ("bitsandbytes" if four_bits or eight_bits else "unknown")).lower()
    if method.startswith("bitsandbytes") and four_bits and not eight_bits:
        return
    named = "bitsandbytes, 8 bits" if method.startswith("bitsandbytes") else method
    raise UserError(
        f"{folder} is quantized by a method that is not read: {named}",
        why="of quantized folders those of bitsandbytes in 4 bits (load_in_4bit) are read",
        fix="model.path=FOLDER of the 16-bit model",
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights, each with the tensors that the index says it holds (None: there is no index)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
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
    if numbered := _numbered(folder):
        return dict.fromkeys(numbered)
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise UserError(
            f"{folder} has weights only as pickles ({pickles[0].name})",
            why="reading a pickle runs the code inside it, and needs torch",
            fix="convert it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers",
        )
    raise UserError(f"no weights in {folder}", why="it has neither model.safetensors nor shards")


def _numbered(folder: Path) -> list[Path]:
    """The shards of a folder that has no index, by the numbers in their names.

    Raises:
      UserError: a number is missing, or there are shards of several sets.
    """
    found = {file.name: match for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))}
    if not found:
        return []
    first, *others = sorted({(match[1], match[3]) for match in found.values()})
    if others:
        raise UserError(
            f"{folder} has shards of several sets: {first[0]}-*-of-{first[1]} and {others[0][0]}-*-of-{others[0][1]}",
            why="there is no index that says which of them are the model",
            fix="leave one set, or fetch model.safetensors.index.json",
        )
    start, count = first
    names = [f"{start}-{number:0{len(count)}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"missing shard: {folder / missing[0]}" + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""),
            why=f"{sorted(found)[0]} says that there are {int(count)}",
            fix="fetch the folder again",
        )
    return [folder / name for name in names]
