"""Every configuration that ships: parses, explains itself, and its header's command is a real one."""

import re
from pathlib import Path

import pytest
import yaml

from qlora_jax.training import demo
from qlora_jax.training.settings import FIELDS, build_config, parse_arguments, read_yaml, shipped_configs

CONFIGS = shipped_configs()


def test_the_promised_configurations_are_found_by_name():
    names = {"smollm2/135m_qlora", "llama2/7b_qlora", "qwen2.5/7b_qlora", "pythia/12b_qlora", "t5/large_qlora"}
    assert names | {demo.CONFIG} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_valid(name):
    build_config(read_yaml(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_its_sections_come_in_the_schemas_order(name):
    order = list(dict.fromkeys(key.partition(".")[0] for key in FIELDS))
    found = list(yaml.safe_load(CONFIGS[name].read_text()))
    assert found == [section for section in order if section in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_of_its_header_name_it_and_real_keys(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    header = CONFIGS[name].read_text().split("\n\n")[0]
    commands = re.findall(r"python -m qlora_jax\.train (--config .*)", header)
    assert commands
    for command in commands:
        words = command.partition("  ")[0].split()
        invocation = parse_arguments([word for word in words if not word.startswith("model.path=/")])
        assert invocation.config == name
        build_config(invocation.settings, invocation.mistakes)


def test_the_demo_has_neither_model_nor_rows_of_its_own():
    config = build_config(read_yaml(CONFIGS[demo.CONFIG]))
    assert (config.model.path, config.data.path) == (None, None)
    assert config.eval.rows == 64
    assert config.eval.samples == 3
