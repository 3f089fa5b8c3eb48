"""Rows of a JSON or JSONL file as conversations.

Formats, told apart by the first row and then the same for the whole file:

    alpaca           {"instruction": "Translate to French", "input": "good morning", "output": "bonjour"}
    prompt/response  {"prompt": "Translate to French: good morning", "response": "bonjour"}      (or "completion")
    source/target    {"source": "Translate to French: good morning", "target": "bonjour"}        (or "input", "output")
    messages         {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    ShareGPT         {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}

Other keys of a row are left alone. No row is skipped: broken ones are errors, all of them reported together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.json_rows import JsonRow, read_json_rows, read_text
from qlora_jax.errors import UserError

ROLES = ("system", "user", "assistant")
SHOWN_FAULTS = 20  # broken rows named one by one

_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}


class Message(NamedTuple):
    """One turn. `role` is one of ROLES; an assistant's `content` is never blank."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages with at least one answer, which is never the first of them.

    Attributes:
      line: line of the file on which the row begins, from 1; where rows of a JSON list share lines, the row's number.
      source: path of the file.
    """

    messages: tuple[Message, ...]
    line: int
    source: str


def read_conversations(path: str | Path, *, setting: str = "data.path") -> list[Conversation]:
    """Reads all rows of a file.

    Args:
      path: a JSON list of rows, or JSONL with one row a line; UTF-8.
      setting: the configuration key that names the file, for messages.

    Raises:
      UserError: no such file, not UTF-8, not JSON, no rows; or broken rows, each with its line, what was found and what
        is expected: the first SHOWN_FAULTS, then their number.
    """
    conversations: list[Conversation] = []
    faults: list[str] = []
    row_format: _Format | None = None
    rows = read_json_rows(Path(path), setting)
    for row in rows:
        try:
            value = _object(row)
            row_format = row_format or _detect(value)
            messages = tuple(row_format.read(value))
            _check_turns(messages)
            conversations.append(Conversation(messages, row.line, str(path)))
        except _Fault as fault:
            faults.append(f"  {path}:{row.line}: {fault}")
    if faults:
        if len(faults) > SHOWN_FAULTS:
            faults[SHOWN_FAULTS:] = [f"  and {len(faults) - SHOWN_FAULTS} more"]
        broken = len(rows) - len(conversations)
        why = f"a row should be {_EVERY_FORMAT}"
        if row_format is not None:
            why = f"by its first row the file is in {row_format.name} format: {row_format.expected}"
        raise UserError(
            "\n".join([f"{broken} of {len(rows)} rows of {path} {'is' if broken == 1 else 'are'} broken", *faults]),
            why=why,
            fix=f"mend or remove {'that row' if broken == 1 else 'those rows'}, or {setting}=ANOTHER_FILE",
        )
    return conversations


@dataclass(frozen=True)
class Prompt:
    """What to ask: messages of which the last is no answer.

    Attributes:
      line: as of a Conversation.
      row: the row of the file, as it was read.
    """

    messages: tuple[Message, ...]
    line: int
    row: Any


def read_prompts(path: str | Path, *, setting: str = "--prompts") -> list[Prompt]:
    """Reads a file of prompts: text with one a line, or rows of any format, or plain texts, in JSON or JSONL.

    The answer that a row ends with is left out, and need not be there. Blank lines of text are no prompts.

    Args:
      path: JSON or JSONL where the name ends so, else text; UTF-8.
      setting: the option that names the file, for messages.

    Raises:
      UserError: as `read_conversations`.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        rows = read_json_rows(path, setting)
    else:
        lines = enumerate(read_text(path, setting).splitlines(), start=1)
        rows = [JsonRow(number, line.strip()) for number, line in lines if line.strip()]
        if not rows:
            raise UserError(f"{path} has no prompts", why="it is empty", fix=f"{setting}=prompts.jsonl")
    prompts, faults = [], []
    for row in rows:
        try:
            prompts.append(Prompt(_asked(row), row.line, row.value))
        except _Fault as fault:
            faults.append(f"  {path}:{row.line}: {fault}")
    if faults:
        broken = len(faults)
        faults[SHOWN_FAULTS:] = [f"  and {broken - SHOWN_FAULTS} more"] if broken > SHOWN_FAULTS else []
        raise UserError(
            "\n".join([f"{broken} of {len(rows)} prompts of {path} {'is' if broken == 1 else 'are'} broken", *faults]),
            why=f"a prompt is a text, or {_EVERY_FORMAT}, with or without the answer",
            fix="mend or remove them",
        )
    return prompts


def _asked(row: JsonRow) -> tuple[Message, ...]:
    if row.fault is None and isinstance(row.value, str):
        messages = [Message("user", _text({"prompt": row.value}, "prompt"))]
    else:
        value = _object(row)
        row_format = _detect(value)
        messages = list(row_format.read({**value, **dict.fromkeys(_ANSWERS, "to come")}))
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or not messages[-1].content.strip():
        raise _Fault("nothing is asked")
    return tuple(messages)


class _Fault(Exception):
    """What is wrong with one row."""


class _Format(NamedTuple):
    name: str
    expected: str
    read: Callable[[Mapping[str, Any]], Sequence[Message]]


def _alpaca(row: Mapping[str, Any]) -> Sequence[Message]:
    instruction, answer = _text(row, "instruction"), _answer(row, "output")
    given = "" if row.get("input") is None else _text(row, "input")
    return (
        Message("user", f"{instruction}\n\n{given}" if given.strip() else instruction),
        Message("assistant", answer),
    )


def _pair(prompt: str, response: str) -> _Format:
    return _Format(
        f"{prompt}/{response}",
        f'{{"{prompt}": ..., "{response}": ...}}',
        lambda row: (Message("user", _text(row, prompt)), Message("assistant", _answer(row, response))),
    )


def _chat(row: Mapping[str, Any]) -> Sequence[Message]:
    return _turns(row, "messages", "role", "content", {role: role for role in ROLES})


def _sharegpt(row: Mapping[str, Any]) -> Sequence[Message]:
    return _turns(row, "conversations", "from", "value", _SHAREGPT_ROLES)


# By the key that gives a format away, in the order in which they are looked for.
_FORMATS = {
    "messages": _Format(
        "messages", '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}', _chat
    ),
    "conversations": _Format(
        "ShareGPT", '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}', _sharegpt
    ),
    "instruction": _Format("alpaca", '{"instruction": ..., "input": ... (may be absent), "output": ...}', _alpaca),
    "completion": _pair("prompt", "completion"),
    "prompt": _pair("prompt", "response"),
    "source": _pair("source", "target"),
    "input": _pair("input", "output"),
}
_ANSWERS = ("output", "response", "completion", "target")
_EVERY_FORMAT = " or ".join(each.expected for each in _FORMATS.values())


def _object(row: JsonRow) -> Mapping[str, Any]:
    if row.fault is not None:
        raise _Fault(row.fault)
    if not isinstance(row.value, dict):
        raise _Fault(f"a row should be an object, found {_describe(row.value)}")
    return row.value


def _detect(row: Mapping[str, Any]) -> _Format:
    for key, row_format in _FORMATS.items():
        if key in row:
            return row_format
    lists = [key for key, value in row.items() if isinstance(value, list)]
    raise _Fault(f"no known format ({_keys(row)})" + (f"; are the rows inside {lists[0]!r}?" if lists else ""))


def _turns(
    row: Mapping[str, Any], key: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> Sequence[Message]:
    turns = row.get(key)
    if not isinstance(turns, list):
        raise _Fault(
            f'"{key}" should be a list, found {_describe(turns)}' if key in row else f'no "{key}" ({_keys(row)})'
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _Fault(f"message {number} should be an object, found {_describe(turn)}")
        where = f" of message {number}"
        name = _text(turn, role_key, where)
        if name not in roles:
            raise _Fault(f'"{role_key}"{where} is {name!r}; known are {", ".join(roles)}')
        read = _answer if roles[name] == "assistant" else _text
        messages.append(Message(roles[name], read(turn, content_key, where)))
    return messages


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    if "assistant" not in roles:
        raise _Fault(f"no answer among its {len(messages)} messages: nothing to train on")
    if roles[0] == "assistant":
        raise _Fault("begins with an answer: a user's message should come first")


def _text(row: Mapping[str, Any], key: str, where: str = "") -> str:
    value = row.get(key)
    if value is None:
        raise _Fault(f'"{key}"{where} is null' if key in row else f'no "{key}"{where} ({_keys(row)})')
    if not isinstance(value, str):
        raise _Fault(f'"{key}"{where} should be text, found {_describe(value)}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Fault(f'"{key}"{where} holds half a character (a lone surrogate)') from None
    return value


def _answer(row: Mapping[str, Any], key: str, where: str = "") -> str:
    value = _text(row, key, where)
    if not value.strip():
        raise _Fault(f'"{key}"{where} is empty: no answer to train on')
    return value


def _keys(row: Mapping[str, Any]) -> str:
    return f"keys: {', '.join(row)}" if row else "no keys"


def _describe(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "nothing:"}
    shown = json.dumps(value)
    return f"{kinds.get(type(value), 'a number')} {shown[:40]}{'...' if len(shown) > 40 else ''}"
