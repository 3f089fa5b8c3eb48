"""GGUF files (llama.cpp's format) in HF names, row order and config keys, over the `gguf` package.

Mapping: llama.cpp's convert_hf_to_gguf.py, read backwards (names: gguf_names.py). Tensors come out with the bits that
transformers' own `from_pretrained(..., gguf_file=...)` gives in bfloat16.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from jaxtyping import Float

from qlora_jax.checkpoints import t5
from qlora_jax.checkpoints.digest import sha256_of
from qlora_jax.checkpoints.families import FAMILIES, normalised
from qlora_jax.checkpoints.gguf_names import ARCHITECTURES, architecture_of, hf_name, in_hf_order
from qlora_jax.checkpoints.gguf_tokenizer import build_tokenizer
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 24  # elements dequantized at a time: 64 MiB of float32 beside the bfloat16 result

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """A model in a GGUF file; see `Checkpoint`. Every tensor is read as bfloat16 (rounded to nearest even)."""

    def __init__(self, file: Path) -> None:
        self.path = file
        self._metadata, tensors = _open(file)
        self._rope_factors = tensors.pop(_ROPE_FACTORS, None)
        self._name = str(self._metadata["general.architecture"])
        self._architecture = architecture_of(self._name, tensors)
        self._tensors = {hf_name(name, self._architecture, file): tensor for name, tensor in tensors.items()}
        _check_types(file, tensors)
        if self._name == t5.MODEL_TYPE:
            self.config = t5.normalised(self._t5_config(), file)
            names = t5.model_tensors(self._tensors, self.config)
            self._tensors = {name: self._tensors[name] for name in names}
        else:
            self.config = self._config()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> np.dtype:
        self._tensor(name)
        return _BFLOAT16

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        shape = self.shape(name)
        values = np.empty(shape, _BFLOAT16)
        rows = max(1, _CHUNK // max(1, values.size // shape[0]))
        added = 1.0 if self._architecture.norms_plus_one and name.endswith("norm.weight") else 0.0
        for start in range(0, shape[0], rows):
            values[start : start + rows] = dequantize(tensor.data[start : start + rows], tensor.tensor_type) - added
        return in_hf_order(values, name, self._architecture, self.config)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return build_tokenizer(self._metadata, self.path)

    def fingerprint(self) -> str:
        return sha256_of([self.path])

    def _tensor(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise UserError(f"tensor {name!r} is missing in {self.path}", why="the GGUF file does not have it")
        return self._tensors[name]

    def _get(self, key: str, default: Any = None) -> Any:
        """A value of the model's own metadata. UserError: it is not there and has no default, or is a list."""
        value = self._metadata.get(f"{self._name}.{key}", default)
        if value is None:
            raise UserError(f"{self.path} has no metadata {self._name}.{key}", why="the model's shape follows from it")
        if isinstance(value, list):
            raise UserError(
                f"{self.path} has a list of values in {self._name}.{key}",
                why="layers of different shapes are not supported",
            )
        return value

    def _has(self, inner: str) -> bool:
        return f"{self._architecture.layers['']}.0.{inner}" in self._tensors

    def _config(self) -> dict[str, Any]:
        """HF's keys from the metadata; `gguf-dump FILE` shows them."""
        get, kind = self._get, self._architecture.model_type
        hidden, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", hidden // heads)
        config: dict[str, Any] = {
            "architectures": [FAMILIES[kind].head],
            "model_type": kind,
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "max_position_embeddings": get("context_length"),
            "vocab_size": self.shape(f"{self._architecture.outer['token_embd']}.weight")[0],
            "tie_word_embeddings": FAMILIES[kind].head_weight not in self._tensors,
            "torch_dtype": "bfloat16",
        }
        if kind == "gpt_neox":
            config |= {
                "layer_norm_eps": _decimal(get("attention.layer_norm_epsilon")),
                "rotary_pct": get("rope.dimension_count", head_dim) / head_dim,
                "rotary_emb_base": float(get("rope.freq_base", 10000.0)),
                "use_parallel_residual": bool(get("use_parallel_residual", True)),
                "attention_bias": self._has("attention.query_key_value.bias"),
            }
        else:
            config |= {
                "num_key_value_heads": get("attention.head_count_kv", heads),
                "head_dim": get("attention.key_length", get("rope.dimension_count", hidden // heads)),
                "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
                "rope_theta": float(get("rope.freq_base", 10000.0)),
                "rope_scaling": self._rope_scaling(),
                "attention_bias": self._has("self_attn.q_proj.bias"),
                "mlp_bias": self._has("mlp.gate_proj.bias"),
            }
        if kind in ("gemma2", "gemma3_text"):
            # As llama.cpp has it: of the largest models (27B) the scores are scaled otherwise than by head_dim.
            largest = get("block_count") == {"gemma2": 46, "gemma3_text": 62}[kind]
            config |= {
                "sliding_window": get("attention.sliding_window"),
                "query_pre_attn_scalar": hidden // heads if largest else config["head_dim"],
                "attn_logit_softcapping": self._metadata.get(f"{self._name}.attn_logit_softcapping"),
                "final_logit_softcapping": self._metadata.get(f"{self._name}.final_logit_softcapping"),
            }
        return normalised(config | self._token_ids())

    def _t5_config(self) -> dict[str, Any]:
        """HF's keys of a T5. `relative_attention_max_distance` is not stored: it is 128, HF's default, in llama.cpp."""
        get = self._get
        hidden, heads = get("embedding_length"), get("attention.head_count")
        gated = any(name.endswith("DenseReluDense.wi_0.weight") for name in self._tensors)
        head, embedding = self._tensors.get("lm_head.weight"), self._tensor("shared.weight")
        copied = head is not None and head.tensor_type == embedding.tensor_type
        tied = head is None or (copied and np.array_equal(head.data, embedding.data))
        ids = {"eos_token_id": 1, "pad_token_id": 0} | self._token_ids()  # llama.cpp's defaults for T5
        return ids | {
            "architectures": [t5.HEAD],
            "model_type": t5.MODEL_TYPE,
            "vocab_size": self.shape("shared.weight")[0],
            "d_model": hidden,
            "d_kv": get("attention.key_length", hidden // heads),
            "d_ff": get("feed_forward_length"),
            "num_layers": get("block_count"),
            "num_decoder_layers": get("decoder_block_count", get("block_count")),
            "num_heads": heads,
            "relative_attention_num_buckets": get("attention.relative_buckets_count"),
            "layer_norm_epsilon": _decimal(get("attention.layer_norm_rms_epsilon")),
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "is_encoder_decoder": True,
            "tie_word_embeddings": tied,
            "decoder_start_token_id": get("decoder_start_token_id", ids["pad_token_id"]),
            "torch_dtype": "bfloat16",
        }

    def _token_ids(self) -> dict[str, int]:
        roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        stored = {key: self._metadata.get(f"tokenizer.ggml.{role}_token_id") for key, role in roles.items()}
        return {f"{key}_token_id": int(token) for key, token in stored.items() if token is not None}

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", "none")
        factor = self._get("rope.scaling.factor", self._get("rope.scale_linear", 1.0))
        head_dim, rotated = (
            self._metadata.get(f"{self._name}.{key}") for key in ("attention.key_length", "rope.dimension_count")
        )
        if head_dim is not None and rotated is not None and head_dim != rotated:
            kind = f"only {rotated} of {head_dim} dimensions of a head are rotated"
        elif kind == "linear" or (kind == "none" and factor != 1.0):
            return {"rope_type": "linear", "factor": float(factor)}
        elif kind == "yarn":
            original = self._get("rope.scaling.original_context_length", self._get("context_length"))
            return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        if kind != "none":
            raise UserError(
                f"unsupported rope scaling in {self.path}: {kind}",
                why="rotary positions of GGUF files are read unscaled, scaled linearly, by YaRN, or as in Llama 3.1",
                fix="model.path=FOLDER: the same model as an HF folder",
            )
        if self._rope_factors is None:
            return None
        factors = dequantize(self._rope_factors.data, self._rope_factors.tensor_type)
        theta = self._get("rope.freq_base", 10000.0)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if np.all(factors == 1.0):
            return None
        if not np.allclose(factors, llama3_factors(scaling, theta, 2 * factors.size), rtol=1e-4, atol=0.0):
            raise UserError(
                f"unsupported rope scaling in {self.path}",
                why=f"the factors in {_ROPE_FACTORS} are not those of Llama 3.1",
                fix="model.path=FOLDER: the same model as an HF folder",
            )
        return scaling


def _decimal(value: float) -> float:
    """Stored as float32; seven digits give back the decimal number that was meant (1e-05)."""
    return float(f"{value:.7g}")


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> Float[np.ndarray, " half"]:
    """What llama.cpp's converter writes as rope_freqs.weight: the number that divides each rotary frequency.

    Wavelengths below original/high_freq_factor keep their frequency, those above original/low_freq_factor are
    slowed by `factor`, with a linear ramp between (Llama 3.1's rule).
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _check_types(file: Path, tensors: dict[str, ReaderTensor]) -> None:
    """Finds out, before anything is read, whether the package can dequantize every type in the file."""
    first = {tensor.tensor_type: name for name, tensor in reversed(tensors.items())}
    for kind, name in first.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"unsupported quantization in {file}: tensor {name!r} is {kind.name}",
                why="the gguf package cannot dequantize it",
                fix="model.path=FILE.gguf of the same model as Q8_0, Q4_K_M or F16",
            ) from error


def _open(file: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """Metadata and tensors (memory-mapped) of a GGUF file of a known architecture."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"{file} is not a GGUF file",
            why=f"it starts with {magic!r}, not with b'GGUF' ({size} bytes)",
            fix="model.path=FOLDER for an HF model, or FILE.gguf",
        )
    try:
        reader = _Reader(file)
    except _CutShort as error:
        raise UserError(
            f"{file} is truncated: tensor {error.tensor!r} should end at byte {error.end}, the file has {size} bytes",
            why="a download or copy was cut short",
            fix="fetch the file again",
        ) from error
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise UserError(
            f"{file} is truncated or damaged: its header cannot be read ({size} bytes)",
            why=f"{type(error).__name__}: {error}",
            fix="fetch the file again",
        ) from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"unsupported architecture in {file}: {architecture}",
            why=f"supported are {', '.join(ARCHITECTURES)}",
            fix="model.path=FILE.gguf of a model of one of these families",
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


class _CutShort(Exception):
    def __init__(self, tensor: str, end: int) -> None:
        super().__init__(tensor, end)
        self.tensor, self.end = tensor, end


class _Reader(GGUFReader):
    """The package's reader, which names the first tensor that the file does not hold whole."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        ends = []
        for field in fields:
            *_, dims, kind, offset = field.parts
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(int(kind[0]))]
            size = int(np.prod(dims, dtype=np.int64)) // block * block_bytes
            ends.append((int(start_offs) + int(offset[0]) + size, field.name))
        for end, name in sorted(ends):
            if end > self.data.size:
                raise _CutShort(name, end)
        super()._build_tensors(start_offs, fields)
