"""Rows of a JSON list or a JSONL file, each with the line it begins on, so that errors can point at it."""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.errors import UserError


class JsonRow(NamedTuple):
    """A value, or what is wrong with it, and its line, from 1. Rows of a list that share lines have their number."""

    line: int
    value: Any = None
    fault: str | None = None


def read_json_rows(path: Path, setting: str) -> list[JsonRow]:
    """Reads a JSON list, or JSONL (one row a line, blank lines allowed); the contents tell which.

    Args:
      path: the file, UTF-8.
      setting: the configuration key that names it, for messages.

    Raises:
      UserError: no such file, not UTF-8, neither JSON nor JSONL, or no rows. One broken row is a `fault`.
    """
    text = read_text(path, setting)
    start = text.lstrip()
    rows = _list_rows(text) if start.startswith("[") else _jsonl_rows(text)
    if not rows:
        raise UserError(f"{path} has no rows", why="it is empty", fix=f"{setting}=rows.jsonl")
    if start[0] not in "[{" and all(row.fault for row in rows):
        raise UserError(
            f"{path} is not JSON: it begins with {start[:40]!r}",
            why="rows come as a JSON list, or as JSONL with one JSON object a line",
            fix=f"{setting}=rows.jsonl",
        )
    if len({row.line for row in rows}) < len(rows):
        return [row._replace(line=number) for number, row in enumerate(rows, start=1)]
    return rows


def read_text(path: Path, setting: str) -> str:
    """A file's text. UserError: no such file, or not UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        raise UserError(
            f"no such file: {setting}={path}",
            why=f"there is nothing of that name in {path.absolute().parent}",
            fix=f"{setting}={path.with_name(near[0])}   (did you mean this one?)" if near else f"{setting}=rows.jsonl",
        ) from None
    except IsADirectoryError:
        inside = [name for name in _names_in(path) if name.endswith((".json", ".jsonl"))]
        raise UserError(
            f"{setting}={path} is a folder",
            why="rows are read from one file",
            fix=f"{setting}={path / (inside[0] if inside else 'rows.jsonl')}",
        ) from None
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read", why=str(error), fix=f"{setting}=rows.jsonl") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8",
            why="rows are read as UTF-8 text",
            fix=f"iconv -f {guess} -t utf-8 {path} > rows.jsonl, then {setting}=rows.jsonl   (if it is {guess})",
        ) from None


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _jsonl_rows(text: str) -> list[JsonRow]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = [_parse(number, line) for number, line in lines]
    if len(rows) > 1 and all(row.fault for row in rows):
        whole = _parse(1, text)  # perhaps one object over many lines
        if whole.fault is None:
            return [whole]
    return rows


def _parse(line: int, text: str) -> JsonRow:
    try:
        return JsonRow(line, json.loads(text))
    except json.JSONDecodeError as error:
        return JsonRow(line + error.lineno - 1, fault=f"not JSON: {error.msg}, column {error.colno}")
    except RecursionError:
        return JsonRow(line, fault="not JSON that can be read: nested too deeply")


def _list_rows(text: str) -> list[JsonRow]:
    """Parses row by row instead of all at once: only so are their lines known."""
    decoder = json.JSONDecoder()
    rows: list[JsonRow] = []
    line = _LineCounter(text)
    position = _skip_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        begin = position
        try:
            value, position = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            fault = f"not JSON: {error.msg}, column {error.colno}; the rest of the list was not read"
            return [*rows, JsonRow(error.lineno, fault=fault)]
        except RecursionError:
            return [*rows, JsonRow(line.at(begin), fault="nested too deeply; the rest of the list was not read")]
        rows.append(JsonRow(line.at(begin), value))
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            found = repr(text[position]) if position < len(text) else "the end of the file"
            fault = f"not JSON: , or ] expected after a row, found {found}; the rest of the list was not read"
            return [*rows, JsonRow(line.at(position), fault=fault)]
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        rows.append(JsonRow(line.at(rest), fault=f"text after the end of the list: {text[rest : rest + 20]!r}"))
    return rows


class _LineCounter:
    """The line of ever later positions, each part of the text looked at once."""

    def __init__(self, text: str) -> None:
        self._text, self._line, self._counted = text, 1, 0

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
