"""Small checkpoints that the tests of this room write for themselves.

GGUF files are written the way llama.cpp's converter does it. The values they stand for are computed here from the
blocks' bytes by the format's own definition (ggml-quants.c), not by the package that is under the reader.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

HIDDEN, MIDDLE, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 300


def to_llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of convert_hf_to_gguf.py: HF's two halves of a head become neighbouring rows."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def decode(blocks: np.ndarray, kind: Q, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of quantized bytes: blocks of 32 along the rows."""
    if kind in (Q.F32, Q.F16, Q.BF16):
        plain = {Q.F32: np.float32, Q.F16: np.float16, Q.BF16: ml_dtypes.bfloat16}[kind]
        return np.ascontiguousarray(blocks).view(plain).reshape(shape).astype(np.float32)
    header = {Q.Q8_0: 2, Q.Q4_0: 2, Q.Q4_1: 4}[kind]
    blocks = np.ascontiguousarray(blocks).reshape(-1, header + (32 if kind == Q.Q8_0 else 16))
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, header:]
    if kind == Q.Q8_0:
        return (scale * codes.view(np.int8).astype(np.float32)).reshape(shape)
    nibbles = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)
    if kind == Q.Q4_0:
        return (scale * (nibbles - np.float32(8))).reshape(shape)
    return (scale * nibbles + blocks[:, 2:4].copy().view(np.float16).astype(np.float32)).reshape(shape)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, by integer arithmetic on the bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


@dataclasses.dataclass
class TinyGGUF:
    """What to write; `write` returns the expected tensors under HF names (bfloat16)."""

    types: dict[str, Q] = dataclasses.field(default_factory=dict)  # by the part of the name: "attn_q", "token_embd"
    architecture: str = "llama"
    tied: bool = True
    norms: float | None = None  # one value for all norms, instead of random ones
    bias: bool = False
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokenizer: object = None  # a function of the writer

    def tensors(self):
        """(GGUF name, HF name, shape, heads whose rows are permuted)."""
        head_dim = HIDDEN // HEADS
        yield "token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN), None
        yield "output_norm.weight", "model.norm.weight", (HIDDEN,), None
        if not self.tied:
            yield "output.weight", "lm_head.weight", (VOCAB, HIDDEN), None
        linears = [
            ("attn_q", "self_attn.q_proj", (HIDDEN, HIDDEN), HEADS),
            ("attn_k", "self_attn.k_proj", (KV_HEADS * head_dim, HIDDEN), KV_HEADS),
            ("attn_v", "self_attn.v_proj", (KV_HEADS * head_dim, HIDDEN), None),
            ("attn_output", "self_attn.o_proj", (HIDDEN, HIDDEN), None),
            ("ffn_gate", "mlp.gate_proj", (MIDDLE, HIDDEN), None),
            ("ffn_up", "mlp.up_proj", (MIDDLE, HIDDEN), None),
            ("ffn_down", "mlp.down_proj", (HIDDEN, MIDDLE), None),
        ]
        for i in range(LAYERS):
            here = f"model.layers.{i}."
            yield f"blk.{i}.attn_norm.weight", here + "input_layernorm.weight", (HIDDEN,), None
            yield f"blk.{i}.ffn_norm.weight", here + "post_attention_layernorm.weight", (HIDDEN,), None
            for short, long, shape, heads in linears:
                yield f"blk.{i}.{short}.weight", f"{here}{long}.weight", shape, heads
                if self.bias and short.startswith("attn"):
                    yield f"blk.{i}.{short}.bias", f"{here}{long}.bias", shape[:1], heads

    def write(self, file: Path) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        writer = gguf.GGUFWriter(file, self.architecture)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(MIDDLE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_rope_freq_base(50000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(VOCAB)
        for key, value in self.metadata.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
            add[type(value)](key, value)
        if self.tokenizer:
            self.tokenizer(writer)
        expected = {}
        for name, hf_name, shape, heads in self.tensors():
            kind = Q.F32 if len(shape) == 1 else self.types.get(name.split(".")[-2], self.types.get("*", Q.F32))
            values = (0.1 * rng.normal(size=shape)).astype(np.float32)
            if self.norms is not None and "norm" in name:
                values[:] = self.norms
            stored = quantize(to_llama_cpp_rows(values, heads) if heads else values, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
            in_hf_rows = quantize(values, kind)  # blocks lie along a row, so rows can be permuted after quantizing
            expected[hf_name] = to_bfloat16(decode(in_hf_rows, kind, shape))
        for name, values in self.extra.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return expected


@pytest.fixture
def tiny_gguf() -> type[TinyGGUF]:
    """Writer of tiny GGUF files: `tiny_gguf(types).write(file)` gives the expected tensors."""
    return TinyGGUF


@pytest.fixture
def tiny_folder(golden_dir: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny bf16 LLaMA (transformers wrote it)."""
    return Path(shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "model"))


@pytest.fixture
def edit_config(tiny_folder: Path):
    """Changes keys of the tiny LLaMA's config.json; None removes a key."""

    def edit(**changes):
        file = tiny_folder / "config.json"
        config = json.loads(file.read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value
        file.write_text(json.dumps(config))
        return tiny_folder

    return edit
