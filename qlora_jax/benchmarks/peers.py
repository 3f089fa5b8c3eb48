"""Peers that live in a Python of their own: started, asked for measurements, and ended."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qlora_jax.errors import UserError

FIX = "make bench-cpu makes an environment with torch, transformers, peft and bitsandbytes, and names its Python"
_HERE = Path(__file__).parent


class PeerError(RuntimeError):
    """A call failed in the peer, which lives on."""


class Peer:
    """A process of another Python that makes the calls of one file (see peer_main.py).

    Args:
      option: the option that named the Python, for messages.
      python: that Python.
      calls: file beside this one with the calls.
      threads: on how many it computes.

    Raises:
      UserError: no such Python, or one without what the calls need.
    """

    def __init__(self, option: str, python: Path, calls: str, threads: int) -> None:
        self._name = f"{option} {python}"
        if not python.is_file() or not os.access(python, os.X_OK):
            raise UserError(f"{self._name} is no program", why="the Python of an environment is meant", fix=FIX)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        own = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        try:
            # -I: what is in this folder, the current one or PYTHONPATH must not stand in for the peer's libraries.
            self._process = subprocess.Popen(
                [str(python), "-I", str(_HERE / "peer_main.py"), str(_HERE / calls)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
                env={**os.environ, **own},
            )
        except OSError as error:
            self._errors.close()
            raise UserError(f"{self._name} does not run", why=str(error), fix=FIX) from error
        try:
            self._receive()
            self.versions: Mapping[str, str] = self.call("start", threads=threads)
        except PeerError as error:
            self.close()
            raise UserError(f"{self._name} cannot be measured", why=str(error), fix=FIX) from error
        except BaseException:
            self.close()
            raise

    def call(self, name: str, /, **arguments: Any) -> Any:
        """What the peer answers.

        Raises:
          PeerError: the call failed there.
          UserError: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._receive()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process, at once."""
        if self._errors.closed:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what was still to be written to it
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise self._ended(line) from error
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def _ended(self, said: str = "") -> UserError:
        if not said:
            self._process.wait()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 1000))
        errors = self._errors.read().decode(errors="replace").strip().splitlines()[-3:]
        code = self._process.poll()
        what = f"ended with code {code}" if code is not None else f"answered {said[:80]!r}"
        return UserError(f"{self._name} {what}", why=" ".join(errors) or "it said nothing", fix=FIX)
