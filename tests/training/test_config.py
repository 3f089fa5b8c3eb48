"""Settings: what is accepted, what is refused, and how the refusal reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.help import help_text
from qlora_jax.training.settings import (
    FIELDS,
    Setting,
    build_config,
    flatten,
    parse_arguments,
    read_yaml,
    resume_settings,
    with_absolute_paths,
)


def config_of(*arguments: str) -> TrainConfig:
    invocation = parse_arguments(list(arguments))
    return build_config(invocation.settings, invocation.mistakes)


def mistakes_of(*arguments: str) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        config_of(*arguments)
    return [str(error) for error in caught.value.errors]


def test_defaults_are_those_that_the_documentation_promises():
    flat = flatten(TrainConfig())
    expected = {
        "train.packing": True,
        "optim.schedule": "constant",
        "optim.warmup_steps": 10,
        "optim.weight_decay": 0.0,
        "optim.betas": [0.9, 0.999],
        "optim.clip": 0.3,
        "optim.paged": True,
        "lora.dropout": 0.0,
        "lora.targets": None,
        "model.dtype": "bfloat16",
        "quant.type": "nf4",
        "data.template": "auto",
        "train.epochs": 1.0,
        "train.steps": None,
        "data.eval_split": 0.05,
    }
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["lora.rank=8"],
        ["--lora.rank", "8"],
        ["--lora.rank=8"],
        ["lora.rank=4", "--lora.rank=8"],
    ],
)
def test_keys_are_given_in_any_spelling_and_the_last_one_wins(arguments):
    assert config_of(*arguments).lora.rank == 8


def test_values_are_read_as_their_keys_need_them():
    config = config_of(
        "optim.learning_rate=1e-4",
        "lora.targets=q_proj,v_proj",
        "optim.betas=[0.9, 0.95]",
        "optim.clip=null",
        "output_dir=0012",
        "quant.type=none",
        "--resume",
        "--train.batch-size",
        "2",
        "log.tensorboard=false",
        "data.eval_split=7",
    )
    assert config.optim.learning_rate == 1e-4
    assert config.lora.targets == ["q_proj", "v_proj"]
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.clip is None
    assert config.output_dir == "0012"
    assert config.quant.type == "none"
    assert config.resume
    assert config.train.batch_size == 2
    assert config.log.tensorboard is False
    assert config.data.eval_split == 7


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("lora.rnk", "lora.rank"),
        ("learning_rate", "optim.learning_rate"),
        ("trian.steps", "train.steps"),
        ("optim.lr", "optim.learning_rate"),
        ("max_steps", "train.steps"),
        ("quant.double_quantt", "quant.double_quant"),
        ("--confg", "--config"),
        ("lora.batch_size", "train.batch_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(typo, meant):
    (message,) = mistakes_of(f"{typo}=3")
    assert typo.lstrip("-") in message
    assert meant in message.split("did you mean")[1]


def test_all_mistakes_are_reported_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lora: {rank: eight, rnk: 3}\nquant: {type: nf5}\nmodel: {path: no/such/folder}\n")
    messages = mistakes_of("--config", str(file), "stray", "optim.betas=[0.9,2]", "data.path=missing.jsonl", "lora=1")
    text = "\n".join(messages)
    for wanted in (
        f"lora.rank=eight ({file})",
        f"unknown key lora.rnk ({file})",
        "quant.type=nf5",
        "'e3m0' or 'none'",
        "'stray' is neither key=value",
        "optim.betas=[0.9,2] (command line)",
        "data.path=missing.jsonl (command line) does not exist",
        "no/such/folder",
        "lora is a section",
    ):
        assert wanted in text
    assert len(messages) == 8


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("lora.rank=0", "greater than or equal to 1"),
        ("lora.rank=yes", "not true or false"),
        ("lora.rank=8.5", "lora.rank=8.5"),
        ("lora.dropout=1", "less than 1"),
        ("optim.learning_rate=-1", "greater than 0"),
        ("optim.learning_rate=.nan", "finite"),
        ("optim.eps=.inf", "finite"),
        ("quant.block_size=48", "32, 64"),
        ("data.eval_split=1.5", "neither a fraction below 1 nor a number of rows"),
        ("lora.targets=[]", "lora.targets"),
        ("seed=-1", "seed=-1"),
        ("train.packing=maybe", "boolean"),
        ("model.dtype=float16", "'bfloat16' or 'float32'"),
    ],
)
def test_bad_values_are_refused_and_named(argument, named):
    (message,) = mistakes_of(argument)
    assert named in message


def test_keys_that_contradict_each_other_are_refused():
    (message,) = mistakes_of("train.steps=5", "train.epochs=2")
    assert "train.steps=5 and train.epochs=2" in message
    file = __file__
    (message,) = mistakes_of(f"data.eval_path={file}", "data.eval_split=0.1")
    assert "data.eval_path" in message
    assert "data.eval_split" in message


def test_a_path_that_is_nearly_right_gets_the_right_one(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (message,) = mistakes_of(f"data.path={tmp_path}/rows.json")
    assert f"did you mean {tmp_path / 'rows.jsonl'}?" in message


def test_hub_names_are_not_mistaken_for_missing_paths():
    assert config_of("model.path=meta-llama/Llama-2-7b-hf").model.path == "meta-llama/Llama-2-7b-hf"
    assert len(mistakes_of("model.path=models/tiny.gguf")) == 1
    assert len(mistakes_of("model.path=./meta-llama/Llama-2-7b-hf")) == 1


def test_yaml_may_be_nested_or_dotted_and_empty_sections_are_empty(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lora.rank: 8\ntrain:\n  steps: 3\n  seq_len: 64\noptim:\n")
    config = config_of("--config", str(file), "train.seq_len=32")
    assert (config.lora.rank, config.train.steps, config.train.seq_len) == (8, 3, 32)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lora: {rank: 8\n", "not valid YAML"),
        ("lora: {rank: 8, rank: 9}\n", "'rank' is given twice"),
        ("- a\n- b\n", "maps keys to values"),
    ],
)
def test_unusable_yaml_is_named(tmp_path, text, named):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)


def test_an_unknown_config_lists_the_shipped_ones():
    (message,) = mistakes_of("--config", "llama2/7b")
    assert "--config llama2/7b_qlora" in message
    assert "smollm2/135m_qlora" in message


def test_the_python_schema_refuses_unknown_keys_and_is_frozen():
    with pytest.raises(ValueError, match="Extra inputs"):
        TrainConfig(lora={"rnk": 3})
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().seed = 3


def test_a_resolved_configuration_reads_back_equal(tmp_path):
    config = with_absolute_paths(config_of("train.epochs=2.5", f"data.path={__file__}", "lora.targets=q_proj"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert build_config(read_yaml(file)) == config


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(config_of("data.path=rows.jsonl", "model.path=org/name"))
    assert Path(config.data.path) == tmp_path / "rows.jsonl"
    assert config.model.path == "org/name"


def stored_run(tmp_path: Path) -> dict[str, Setting]:
    (tmp_path / "rows.jsonl").touch()
    config = config_of(f"data.path={tmp_path}/rows.jsonl", "lora.rank=8", "train.epochs=2", "output_dir=runs/a")
    return {key: Setting(value, "runs/a/config.yaml") for key, value in flatten(config).items()}


def test_resuming_refuses_every_key_that_disagrees(tmp_path):
    asked = parse_arguments(["lora.rank=4", "seed=1", "optim.learning_rate=2e-4", "train.seq_len=64"]).settings
    with pytest.raises(UserErrors) as caught:
        resume_settings(asked, stored_run(tmp_path))
    assert [str(error).split()[0] for error in caught.value.errors] == ["lora.rank=4", "seed=1", "train.seq_len=64"]
    assert "which has lora.rank=8" in str(caught.value)


def test_resuming_takes_a_new_length_and_new_intervals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["resume=true", "train.steps=9", "eval.every=3", "checkpoint.every=4", "log.every=5", "lora.rank=8"]
    asked = parse_arguments(
        [*arguments, "log.tensorboard=false", "data.path=rows.jsonl", "output_dir=elsewhere"]
    ).settings
    config = build_config(resume_settings(asked, stored_run(tmp_path)))
    assert (config.train.steps, config.train.epochs) == (9, None)
    assert (config.eval.every, config.checkpoint.every, config.log.every) == (3, 4, 5)
    assert config.log.tensorboard is False
    assert (config.output_dir, config.resume, config.lora.rank) == ("elsewhere", True, 8)


def test_help_names_every_key_with_default_and_consequence():
    text = help_text()
    for key, field in FIELDS.items():
        assert f"  {key}=" in text
        assert field.description
    assert "lora.rank=16   (int)" in text


def test_the_schema_and_the_help_do_not_import_jax():
    code = "import sys, qlora_jax.train; print([name for name in ('jax', 'flax', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "too few values", "optim.betas=[0.9,0.999]"]),
        ("optim.betas=0.9,0.99,0.999", ["too many values"]),
        ("lora.targets=", ["lora.targets=[]", "too few values"]),
        ("lora.targets=,", ["lora.targets=[]", "too few values"]),
        ("--lora.rank", ["--lora.rank is given no value", "fix: --lora.rank 16"]),
        ("--config", ["--config is given no value", "llama2/7b_qlora"]),
        ("model.path=", ["model.path= (command line) does not exist", "fix: model.path=FOLDER_OR_GGUF"]),
    ],
)
def test_lists_and_values_that_are_not_there(argument, told):
    given = parse_arguments([argument])
    with pytest.raises(UserError) as caught:
        build_config(given.settings, given.mistakes)
    for text in told:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "after", [["output_dir=a"], ["true", "output_dir=a"], ["--output_dir", "a"], ["yes", "--output_dir=a"]]
)
def test_a_switch_needs_no_value(after):
    config = build_config(parse_arguments(["--resume", *after]).settings)
    assert (config.resume, config.output_dir) == (True, "a")
    assert not build_config(parse_arguments(["--resume", "false", "output_dir=a"]).settings).resume


def test_white_space_around_the_items_of_a_list_is_left_out():
    config = build_config(parse_arguments(["lora.targets=q_proj, v_proj,"]).settings)
    assert config.lora.targets == ["q_proj", "v_proj"]
