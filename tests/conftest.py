"""What every test runs under: four CPU devices, warnings as errors (pyproject), no silent rank promotion."""

import json
import os
import shutil
import string
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
