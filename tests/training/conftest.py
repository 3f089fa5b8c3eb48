"""A whole run in seconds: a random two-layer LLaMA with a tokenizer of single characters, and a few rows."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from qlora_jax.training.config import TrainConfig
from qlora_jax.training.progress import Progress
from qlora_jax.training.run_folder import RunFolder

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = ["ape", "bear", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, golden_dir) -> Path:
    """An HF folder: the golden tiny LLaMA (256 embeddings) and a tokenizer of printable characters with ChatML."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", folder)
    characters = ["<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = _CHATML
    fast.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"instruction": a, "output": b}) + "\n" for a, b in rows))
    return path


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> tuple[Path, Path]:
    """24 rows to train on and 5 held out: a word, and the word as often as the row says."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [(f"{word} x{count}", " ".join([word] * count)) for count in (1, 2) for word in _WORDS]
    held_out = [(f"{word} x3", " ".join([word] * 3)) for word in _WORDS[::3]] + [("owl x1", "owl")]
    return write_rows(folder / "train.jsonl", rows), write_rows(folder / "eval.jsonl", held_out)


@pytest.fixture
def tiny_settings(tiny_model, tiny_rows, tmp_path) -> dict:
    """Settings of a short run, by dotted key."""
    return {
        "output_dir": str(tmp_path / "run"),
        "model.path": str(tiny_model),
        "model.dtype": "float32",
        "lora.rank": 4,
        "lora.alpha": 8,
        "data.path": str(tiny_rows[0]),
        "data.eval_path": str(tiny_rows[1]),
        "optim.learning_rate": 5e-3,
        "optim.warmup_steps": 2,
        "train.steps": 6,
        "train.batch_size": 2,
        "train.seq_len": 96,
        "eval.every": 4,
        "eval.batch_size": 2,
        "checkpoint.every": 3,
        "log.tensorboard": False,
    }


class Recording(Progress):
    """Keeps what is printed; `on_step` may do something after a step."""

    def __init__(self, on_step=None):
        self.output = io.StringIO()
        super().__init__(console=Console(file=self.output, width=200))
        self._on_step = on_step

    def step(self, step, **values):
        super().step(step, **values)
        if self._on_step is not None:
            self._on_step(step)


def build(settings: dict) -> TrainConfig:
    nested: dict = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return TrainConfig.model_validate(nested)


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory) -> Path:
    """JAX's cache of compiled programs: most of a tiny run's time is compiling what another run has compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def _reuse_compiled_programs(compiled_programs, monkeypatch):
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(compiled_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        monkeypatch.setenv(name.upper(), str(value))  # for subprocesses
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def train(tiny_settings):
    """`train(**{"train.steps": 4}) -> (result, folder, printed)`; `on_step` is called after each step."""
    from qlora_jax.training.loop import run_training

    def run(on_step=None, **changes):
        config = build(tiny_settings | changes)
        folder = RunFolder(config.output_dir)
        folder.create(config)
        progress = Recording(on_step)
        result = run_training(config, folder, progress=progress)
        return result, folder, progress.output.getvalue()

    return run
