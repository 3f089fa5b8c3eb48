"""A process of another Python: what it is asked, what goes wrong there, and that it ends."""

import os
from pathlib import Path

import pytest

from qlora_jax.benchmarks.peers import Peer, PeerError
from qlora_jax.errors import UserError


def test_a_peer_answers_and_ends_with_its_block(fake_python):
    with Peer("--peers", fake_python, "peer_linear.py", 2) as peer:
        # What it printed itself did not get between the answers.
        assert peer.versions == {"python": "fake", "threads": "2"}
        assert peer.call("seconds", name="x", times=3) == pytest.approx(3e-3)
        process = peer._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_call_that_fails_leaves_the_peer_alive(fake_python):
    with Peer("--peers", fake_python, "peer_linear.py", 1) as peer:
        with pytest.raises(PeerError, match="KeyError: 'unknown'"):
            peer.call("unknown")
        with pytest.raises(PeerError, match="FileNotFoundError"):
            peer.call("load_weight", path="nowhere.npy", copies=1)
        assert peer.call("step", name="peft") == 5.5


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("dies", r"--peers .*python ended with code 9(.|\n)*Killed for its memory"), ("babbles", "answered 'not JSON")],
)
def test_a_peer_that_ends_or_babbles_is_a_users_error(fake_python, monkeypatch, fault, problem):
    monkeypatch.setenv("FAKE_PEER", fault)
    with (
        Peer("--peers", fake_python, "peer_linear.py", 1) as peer,
        pytest.raises(UserError, match=problem),
    ):
        peer.call("seconds", name="x", times=1)


def test_a_python_without_torch_is_told_so(fake_python, monkeypatch):
    monkeypatch.setenv("FAKE_PEER", "missing")
    with pytest.raises(UserError, match=r"cannot be measured(.|\n)*No module named 'torch'(.|\n)*make bench-cpu"):
        Peer("--peers", fake_python, "peer_linear.py", 1)


def test_what_is_no_python_is_told_so(tmp_path: Path):
    silent, folder, text = tmp_path / "silent", tmp_path / "folder", tmp_path / "text"
    silent.write_text("#!/bin/sh\necho no such option >&2\nexit 2\n")
    silent.chmod(0o755)
    folder.mkdir()
    text.write_text("torch")
    unknown = tmp_path / "unknown"
    unknown.write_bytes(b"\x00\x01\x02")
    unknown.chmod(0o755)
    for path, problem in (
        (tmp_path / "none", "is no program"),
        (folder, "is no program"),
        (unknown, "does not run"),
        (silent, r"ended with code 2(.|\n)*no such option"),
    ):
        with pytest.raises(UserError, match=problem):
            Peer("--peers", path, "peer_linear.py", 1)


def test_a_file_without_permission_is_no_program(tmp_path: Path):
    (tmp_path / "python").write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="is no program"):
        Peer("--peers", tmp_path / "python", "peer_linear.py", 1)
