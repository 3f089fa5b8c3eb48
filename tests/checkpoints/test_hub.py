"""Names on the Hugging Face hub: `model.path=org/name`, with the hub's real client on a made-up server and cache."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(golden_dir: Path, tmp_path: Path, monkeypatch):
    """A server with org/tiny, and org/gated, which it closes; the files that were asked for."""
    from huggingface_hub import constants

    folder = golden_dir / "interop" / "tiny_llama_bf16"
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"pytorch_model.bin": b"x", "notes.md": b"y"}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/org/tiny/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in files.items()
                ]
                self.answer(200, json.dumps(listed).encode())
            elif path.startswith("/api/models/org/tiny"):
                names = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": names}).encode())
            elif path.startswith("/org/tiny/resolve/"):
                name = path.rpartition("/")[2]
                if self.command == "GET":
                    asked.append(name)
                self.answer(200, files[name])
            elif "org/gated" in path:
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        do_HEAD = do_GET

        def answer(self, code: int, body: bytes, headers: dict | None = None) -> None:
            self.send_response(code)
            more = {"Content-Length": len(body), "X-Repo-Commit": COMMIT, "ETag": hashlib.sha1(body).hexdigest()}
            for key, value in {**more, **(headers or {})}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.chdir(tmp_path)
    yield server, asked
    server.shutdown()
    server.server_close()


def test_a_name_is_fetched_once_and_then_read_without_a_network(hub, golden_dir, monkeypatch) -> None:
    from huggingface_hub import constants

    server, asked = hub
    checkpoint = open_checkpoint("org/tiny")
    original = golden_dir / "interop" / "tiny_llama_bf16"
    assert checkpoint.fingerprint() == open_checkpoint(original).fingerprint()
    assert "model.safetensors" in asked
    assert not {"pytorch_model.bin", "notes.md"} & set(asked)
    asked.clear()
    assert open_checkpoint("org/tiny").path == checkpoint.path
    assert not asked
    server.shutdown()
    server.server_close()
    assert open_checkpoint("org/tiny").path == checkpoint.path  # no network
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/tiny").path == checkpoint.path  # HF_HUB_OFFLINE=1
    with pytest.raises(UserError, match=r"(?s)no such folder or file: org/other.*hf download org/other"):
        open_checkpoint("org/other")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/gated", ["org/gated is gated", "https://huggingface.co/org/gated", "hf auth login"]),
        ("org/tinny", ["no such folder or file: org/tinny", "check the name"]),
    ],
)
def test_names_that_cannot_be_had(hub, name, told) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(name)
    for words in told:
        assert words in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_a_folder_goes_before_the_hub(hub, golden_dir, tmp_path) -> None:
    _, asked = hub
    shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "org" / "tiny")
    assert open_checkpoint("org/tiny").path == Path("org/tiny")
    assert not asked
