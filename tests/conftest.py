"""What every test runs under: four CPU devices, warnings as errors (pyproject), no silent rank promotion."""

import json
import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Child processes import the installed package, not the clone that they are started in.
os.environ["PYTHONSAFEPATH"] = "1"
_FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FOUR_DEVICES}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Reference arrays and checkpoints made by torch, bitsandbytes and PEFT (tests/golden/README.md)."""
    return GOLDEN


@pytest.fixture
def tiny_llama(tmp_path: Path, golden_dir: Path) -> tuple[Path, Path]:
    """A two-layer model with a tokenizer of single characters, and a file of rows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    model = tmp_path / "model"
    shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", model)
    characters = ["<unk>", "</s>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(model / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"{n}+1", "output": f"{n + 1}"}) + "\n" for n in range(40)))
    return model, rows


T5_1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_T5_SIZES = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2}
_T5_SIZES |= {"num_heads": 4}


@pytest.fixture(scope="session")
def make_tiny_t5() -> Callable[..., Path]:
    """`make_tiny_t5(folder, seed, **config)`: a random T5 1.1 of two layers, in single characters that end in </s>."""
    import numpy as np
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    from qlora_jax.models.t5_config import T5Config

    def make(folder: Path, seed: int = 0, **changes) -> Path:
        rng = np.random.default_rng(seed)
        config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "torch_dtype": "bfloat16"}
        config |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        config |= _T5_SIZES | T5_1_1 | changes
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {}
        for name, shape in T5Config.from_dict(config).tensor_shapes().items():
            values = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                values = 1 + 0.3 * values
            elif "relative" not in name:
                # With a larger embedding a tied head would only ever repeat the last token.
                values *= 0.3 if name == "shared.weight" else shape[1] ** -0.5
            tensors[name] = values.astype(bfloat16)
        save_file(tensors, folder / "model.safetensors")
        characters = ["<pad>", "</s>", "<unk>", *string.printable]
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": "<pad>"}))
        return folder

    return make
