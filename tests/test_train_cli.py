"""The training door: exit codes, messages, and folders left clean, on a two-layer model made here."""

import errno
import json
import os
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qlora_jax import train
from qlora_jax.training import demo, loop
from qlora_jax.training.commands import command_line

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder: Path, extra: int = 0) -> None:
    """One token per printable character: 103 in all, plus `extra`."""
    tokens = [*SPECIAL, *string.printable, *(f"<extra{index}>" for index in range(extra))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "unk_token": "<unk>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def pristine_model(tmp_path_factory, golden_dir) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden_dir / "interop" / "tiny_llama_bf16" / name, folder / name)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch, pristine_model):
    """An empty directory to stand in, with `model/` and `rows.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine_model, tmp_path / "model")
    rows = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


RUN = [
    "model.path=model",
    "data.path=rows.jsonl",
    "output_dir=out",
    "train.steps=4",
    "train.seq_len=120",
    "train.batch_size=2",
    "lora.rank=2",
    "eval.every=2",
    "checkpoint.every=2",
]


def door(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qlora_jax.train", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.path=model", "data.path=rows.jsonl", "lora.rnk=3"], ["unknown key lora.rnk", "lora.rank"]),
        (["model.path=model"], ["data.path is not given", "fix: data.path="]),
        (["--config", "smollm2/135m_qlora"], ["data.path is not given"]),
        (["model.path=nowhere", "data.path=nothing.jsonl"], ["model.path=nowhere", "data.path=nothing.jsonl"]),
        (["--config", "llama2/8b"], ["--config llama2/8b", "llama2/7b_qlora"]),
        ([*RUN, "output_dir=rows.jsonl"], ["output_dir=rows.jsonl is a file"]),
        ([*RUN, "output_dir=rows.jsonl/run"], ["lies under rows.jsonl, which is a file"]),
        ([*RUN, "output_dir=model"], ["holds files, but no run"]),
        (["output_dir=rows.jsonl/demo", "lora.rank=x"], ["lies under rows.jsonl", "lora.rank=x"]),
    ],
)
def test_a_mistake_ends_with_code_2_names_the_thing_and_writes_nothing(work, arguments, named):
    before = tree(work)
    done = door(*arguments)
    assert done.returncode == 2, done.stderr
    for text in named:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert tree(work) == before


def test_debug_adds_the_traceback(work):
    done = door("model.path=model", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: data.path is not given" in done.stderr


def test_help_and_version_are_clean_and_load_nothing_heavy():
    help_, version = door("--help"), door("--version")
    heavy = "import sys; from qlora_jax.train import main; main(['--help']); print({'jax', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert (help_.returncode, version.returncode) == (0, 0)
    assert "lora.rank=16" in help_.stdout
    assert version.stdout.startswith("qlora_jax 0.")
    assert help_.stderr == version.stderr == ""


def break_line_7(work: Path) -> list[str]:
    lines = Path("rows.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-3]
    Path("rows.jsonl").write_text("\n".join(lines))
    return ["rows.jsonl:7"]


def drop_a_response(work: Path) -> list[str]:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"instruction": "Say something."}\n')
    return ["rows.jsonl:41", "instruction"]


def add_tokens(work: Path) -> list[str]:
    write_tokenizer(work / "model", extra=200)
    return ["vocabulary", "256", "<extra153>"]


def truncate_weights(work: Path) -> list[str]:
    weights = work / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["model.safetensors"]


def put_nan(work: Path) -> list[str]:
    weights = load_file(work / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 5] = ml_dtypes.bfloat16(np.nan)
    save_file(weights, work / "model" / "model.safetensors", metadata={"format": "pt"})
    return [name]


def name_a_missing_shard(work: Path) -> list[str]:
    weights = work / "model" / "model.safetensors"
    names = dict.fromkeys(load_file(weights), "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    weights.rename(work / "model" / "model-00001-of-00002.safetensors")
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return ["model-00002-of-00002.safetensors"]


def ask_for_another_layer(work: Path) -> list[str]:
    config = json.loads((work / "model" / "config.json").read_text())
    (work / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return ["9 tensors are missing", "model.layers.2"]


def write_half_a_gguf(work: Path) -> list[str]:
    shutil.rmtree(work / "model")
    (work / "model").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    return ["model"]


@pytest.mark.parametrize(
    "damage",
    [
        break_line_7,
        drop_a_response,
        add_tokens,
        truncate_weights,
        put_nan,
        name_a_missing_shard,
        ask_for_another_layer,
        write_half_a_gguf,
    ],
)
def test_damaged_input_is_named_and_leaves_no_run_folder(work, capsys, damage):
    named = damage(work)
    before = tree(work)
    assert train.main(RUN) == 2
    errors = capsys.readouterr().err
    for text in named:
        assert text in errors
    assert "Traceback" not in errors
    assert tree(work) == before
    if damage is not put_nan:  # the values of the weights are what a dry run does not read
        assert train.main([*RUN, "--dry-run"]) == 2
        assert capsys.readouterr().err == errors


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("train.seq_len=20", ["train.seq_len=20 leaves none of the 38 rows", "fix: train.seq_len="]),
        ("lora.targets=q_porj", ["q_porj", "did you mean q_proj?"]),
        ("data.eval_split=40", ["data.eval_split=40 holds out 40 of the 40 rows"]),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_rows(work, capsys, argument, named):
    before = tree(work)
    assert train.main([*RUN, argument]) == 2
    errors = capsys.readouterr().err
    for text in named:
        assert text in errors
    assert tree(work) == before


def test_dry_run_shows_the_plan_and_one_masked_example_and_writes_nothing(work, capsys):
    before = tree(work)
    assert train.main([*RUN, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "38 of 38 rows kept, 0 dropped" in shown
    assert "2 rows evaluated" in shown
    assert "4 steps of 2 rows" in shown
    assert "adapters" in shown
    example = shown.partition("is trained:")[2]
    trained = [part.partition("]]")[0] for part in example.split("[[")[1:]]
    assert len(trained) == 1
    assert trained[0].endswith("<|im_end|>")
    assert trained[0].removesuffix("<|im_end|>").isdigit()
    assert "<|im_start|>user\nAdd " in example.partition("[[")[0]
    assert tree(work) == before


def test_libraries_print_nothing(work):
    """transformers' "PyTorch was not found", where it was not, and the like."""
    done = door(*RUN, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_of_ascii_shows_any_text(work):
    Path("rows.jsonl").write_text(json.dumps({"instruction": "Ä", "output": "ö"}) + "\n")
    Path("model").rename("modèle")
    wanted = ["data.path=rows.jsonl", "data.eval_split=0", "output_dir=out", "model.path=modèle", "--dry-run"]
    done = door(*wanted, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model    mod\\xe8le: " in done.stdout


@pytest.fixture
def trained(monkeypatch) -> list:
    """Configurations that were handed to training, which is not done."""
    configs = []

    def run_training(config, folder, *, progress, prepared):
        configs.append(config)
        return loop.Result(steps=prepared.steps)

    monkeypatch.setattr(loop, "run_training", run_training)
    return configs


def test_a_run_leaves_everything_it_promises(work, capsys):
    assert train.main(RUN) == 0
    out = Path("out")
    promised = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "adapter", "report.json", "loss.png"}
    assert promised <= {path.name for path in out.iterdir()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[0]) == {"step", "eval_loss"}
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    assert {"step", "loss", "lr", "grad_norm"} <= set(lines[1])
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert yaml.safe_load((out / "config.yaml").read_text())["lora"]["rank"] == 2
    shown = capsys.readouterr().out
    assert "step 4/4  loss" in shown
    assert "held-out loss" in shown
    assert f"{command_line('generate', '--run', 'out')}\n" in shown
    assert str(out / "loss.png") in shown

    assert train.main(RUN) == 2
    assert "resume=true" in capsys.readouterr().err
    assert train.main(["output_dir=out", "resume=true", "lora.rank=4"]) == 2
    assert "lora.rank=2" in capsys.readouterr().err
    assert train.main(["output_dir=out", "resume=true"]) == 0
    assert "finished" in capsys.readouterr().out
    before = tree(work)
    assert train.main(["output_dir=out", "resume=true", "train.steps=3"]) == 0
    assert tree(work) == before
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("Add", "Take"))
    before = tree(work)
    assert train.main(["output_dir=out", "resume=true", "train.steps=9"]) == 2
    assert "changed since its checkpoint" in capsys.readouterr().err
    assert tree(work) == before


def test_resuming_where_there_is_nothing_starts_and_says_so(work, capsys, trained):
    assert train.main([*RUN, "resume=true"]) == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert not trained[0].resume
    assert Path("out/config.yaml").exists()


def test_a_mistyped_folder_does_not_start_the_demo(work, small_demo, capsys, trained):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text("{}")
    assert train.main(["output_dir=runs/mime", "resume=true"]) == 2
    assert "did you mean output_dir=runs/mine?" in capsys.readouterr().err
    assert train.main(["output_dir=elsewhere", "resume=true", "train.steps=3"]) == 2
    assert "elsewhere/config.yaml does not exist" in capsys.readouterr().err
    assert not trained
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "out/report.json"), ValueError("OCDBT: No space left on device")],
)
def test_a_full_disk_is_said_in_three_lines(work, monkeypatch, capsys, error):
    def run_training(config, folder, *, progress, prepared):
        folder.append_metrics({"step": 0, "eval_loss": 1.0})
        raise error

    monkeypatch.setattr(loop, "run_training", run_training)
    assert train.main(RUN) == 2
    errors = capsys.readouterr().err
    assert "error: the disk of output_dir=out is full" in errors
    assert command_line("train", "output_dir=out", "resume=true") in errors
    assert "Traceback" not in errors
    assert Path("out/metrics.jsonl").exists()


def test_a_ctrl_c_says_what_is_kept(work, monkeypatch, capsys):
    began = []

    def run_training(config, folder, *, progress, prepared):
        if began:
            folder.append_metrics({"step": 0, "eval_loss": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_training", run_training)
    assert train.main(RUN) == train.INTERRUPTED
    assert "nothing is kept" in capsys.readouterr().err
    assert not Path("out").exists()
    began.append(True)
    assert train.main(RUN) == train.INTERRUPTED
    assert command_line("train", "output_dir=out", "resume=true") in capsys.readouterr().err
    assert Path("out/metrics.jsonl").exists()


@pytest.fixture
def small_demo(work, monkeypatch):
    """The demo with the model and the rows of this file."""

    def write_short_rows(folder: Path) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.jsonl", "eval.jsonl"):
            shutil.copyfile(work / "rows.jsonl", folder / name)
        return folder / "train.jsonl", folder / "eval.jsonl"

    monkeypatch.setattr(demo, "fetch_demo_model", lambda say=print: work / "model")
    monkeypatch.setattr(demo, "write_demo_rows", write_short_rows)


def test_the_demo_answers_before_and_after(small_demo, capsys):
    assert train.main(["train.steps=1", "train.batch_size=2", "lora.rank=2", "eval.rows=3", "eval.batch_size=4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  before ") == shown.count("  after ") == 3
    report = json.loads(Path("runs/smollm2-demo/report.json").read_text())
    assert [set(sample) for sample in report["samples"]] == [{"prompt", "reference", "before", "after"}] * 3


def test_the_demo_numbers_its_folders_and_needs_no_arguments(work, small_demo, trained, capsys):
    assert train.main(["--dry-run"]) == 0
    assert not Path("runs").exists()
    assert train.main([]) == train.main([]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["smollm2-demo", "smollm2-demo-2"]
    config = yaml.safe_load(Path("runs/smollm2-demo/config.yaml").read_text())
    assert config["data"]["path"] == str(work / "runs" / "smollm2-demo" / "data" / "train.jsonl")
    assert [config.optim.learning_rate for config in trained] == [1e-3, 1e-3]


def test_rows_of_ones_own_train_the_demos_model_with_general_settings(work, small_demo, trained):
    assert train.main(RUN[1:]) == 0
    assert trained[0].model.path == str(work / "model")
    assert trained[0].data.path == str(work / "rows.jsonl")
    assert trained[0].optim.learning_rate == 2e-4


def test_a_model_that_cannot_be_fetched_leaves_nothing(work, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_JAX_CACHE", str(work / "cache"))
    monkeypatch.setattr(demo.sys, "executable", shutil.which("false"))
    assert train.main([]) == 2
    assert "model.path=" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_ends_well(work):
    arguments = [*RUN, "train.steps=2000", "eval.every=1000", "checkpoint.every=1000"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "qlora_jax.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert f"{command_line('train', 'output_dir=out', 'resume=true')}\n" in rest
    reached = int(json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])["step"])
    assert 3 <= reached < 2000
    assert train.main(["output_dir=out", "resume=true", f"train.steps={reached + 1}"]) == 0
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(reached + 2))
