"""The run folder: when it may be written, and what survives a crash."""

import json
from pathlib import Path

import pytest
import yaml

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.run_folder import RunFolder

CONFIG = TrainConfig(train={"steps": 3})


def test_create_writes_the_resolved_configuration_and_the_environment(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.create(CONFIG.model_copy(update={"resume": True}))
    stored = yaml.safe_load(folder.config_path.read_text())
    assert stored == CONFIG.model_dump(mode="json")
    assert stored["resume"] is False
    environment = json.loads(folder.environment_path.read_text())
    assert {"python", "cpu", "versions", "devices", "kernels"} <= set(environment)
    assert environment["versions"]["jax"][0].isdigit()
    assert environment["kernels"]["cpu"]
    assert environment["dispatch"]["asked"] in ("auto", "ffi", "xla")
    assert (environment["dispatch"]["cuda"] is not None) == (environment["kernels"]["cuda"] == "loaded")
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "environment.json"]


def test_a_used_folder_is_refused_unless_resumed(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create(CONFIG)
    before = folder.config_path.read_bytes()
    with pytest.raises(UserError, match="holds a run") as caught:
        RunFolder(tmp_path / "a").create(CONFIG.model_copy(update={"seed": 9}))
    assert "resume=true" in str(caught.value)
    assert str(tmp_path / "a-2") in str(caught.value)
    assert folder.config_path.read_bytes() == before
    RunFolder(tmp_path / "a").create(CONFIG.model_copy(update={"resume": True, "seed": 9}))
    assert yaml.safe_load(folder.config_path.read_text())["seed"] == 9


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files, but no run"):
        RunFolder(tmp_path).check(resume=resume)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").check(resume=resume)


@pytest.mark.parametrize("below", ["", "runs", "runs/deep"])
def test_a_path_that_is_or_lies_under_a_file_is_refused(tmp_path, below):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is a file|lies under .*notes\.txt, which is a file"):
        RunFolder(tmp_path / "notes.txt" / below).create(CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_numbered_siblings_count_up(tmp_path):
    names = []
    for _ in range(3):
        folder = RunFolder(tmp_path / "demo").numbered_sibling()
        folder.path.mkdir()
        names.append(folder.path.name)
    assert names == ["demo", "demo-2", "demo-3"]


def test_discard_removes_what_create_made_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "x" / "y")
    folder.create(CONFIG)
    folder.discard()
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "other").touch()
    folder.create(CONFIG)
    folder.discard()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["other"]

    RunFolder(tmp_path / "run").create(CONFIG)
    resumed = RunFolder(tmp_path / "run")
    resumed.create(CONFIG.model_copy(update={"resume": True}))
    resumed.discard()
    assert resumed.config_path.exists()

    before = resumed.config_path.read_text()
    resumed.create(TrainConfig(resume=True, train={"steps": 99}))
    assert resumed.config_path.read_text() != before
    resumed.discard()
    assert resumed.config_path.read_text() == before
    resumed.create(TrainConfig(resume=True, train={"steps": 99}))
    resumed.append_metrics({"step": 4, "loss": 1.0})
    resumed.discard()
    assert yaml.safe_load(resumed.config_path.read_text())["train"]["steps"] == 99

    begun = RunFolder(tmp_path / "begun")
    begun.create(CONFIG)
    begun.append_metrics({"step": 0, "eval_loss": 1.0})
    begun.discard()
    assert begun.metrics_path.exists()


def test_a_folder_is_trained_into_by_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    with folder.locked():
        folder.create(CONFIG)
        other = RunFolder(tmp_path / "a" / "run")
        with pytest.raises(UserError, match="another process is training into it") as caught, other.locked():
            pass
        assert str(tmp_path / "a" / "run-2") in str(caught.value)
        other.discard()
        assert folder.config_path.exists()
    with RunFolder(tmp_path / "a" / "run").locked():
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_cannot_be_made_is_refused():
    with pytest.raises(UserError, match=r"output_dir=/proc/run/a cannot be made"):
        RunFolder("/proc/run/a").create(CONFIG)


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_used_folder_without_a_name_of_its_own_is_refused(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="holds files, but no run") as caught:
        RunFolder(path).check()
    assert f"output_dir={Path(path) / 'run'}" in str(caught.value)


@pytest.fixture
def with_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 0, "eval_loss": 4.5})
    for step in range(1, 6):
        folder.append_metrics({"step": step, "loss": 1 / step, "eval_loss": None})
    return folder


def test_metrics_are_one_object_per_line_and_never_null(with_metrics):
    lines = with_metrics.metrics_path.read_text().splitlines()
    assert lines[0] == '{"step": 0, "eval_loss": 4.5}'
    assert lines[3] == '{"step": 3, "loss": 0.3333333333333333}'
    assert with_metrics.read_metrics() == [json.loads(line) for line in lines]
    with pytest.raises(ValueError, match="JSON"):
        with_metrics.append_metrics({"step": 6, "loss": float("nan")})
    assert with_metrics.metrics_path.read_text().splitlines() == lines


def test_truncation_drops_what_a_resumed_run_writes_again(with_metrics):
    kept = with_metrics.metrics_path.read_text().splitlines()[:4]
    with_metrics.truncate_metrics(3)
    assert with_metrics.metrics_path.read_text().splitlines() == kept
    with_metrics.truncate_metrics(3)
    assert with_metrics.metrics_path.read_text().splitlines() == kept
    assert [path.name for path in with_metrics.path.iterdir()] == ["metrics.jsonl"]


def test_a_line_torn_by_a_crash_is_dropped_and_a_broken_one_is_not_ignored(with_metrics):
    with with_metrics.metrics_path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in with_metrics.read_metrics()] == [0, 1, 2, 3, 4, 5]
    with_metrics.truncate_metrics(5)
    with_metrics.append_metrics({"step": 6, "loss": 1.0})
    assert with_metrics.read_metrics()[-1] == {"step": 6, "loss": 1.0}
    with_metrics.metrics_path.write_text("{}\nbroken\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not JSON"):
        with_metrics.read_metrics()


def test_a_new_run_has_no_metrics(tmp_path):
    assert RunFolder(tmp_path).read_metrics() == []
    RunFolder(tmp_path).truncate_metrics(0)
    assert list(tmp_path.iterdir()) == []
