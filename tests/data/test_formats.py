"""Data files in every accepted format, and what is said of broken ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.formats import Message, read_conversations
from qlora_jax.errors import UserError

QUESTION, ANSWER = "Translate to French: good morning", "bonjour"
TWO_TURNS = (Message("user", QUESTION), Message("assistant", ANSWER))
ALPACA = {"instruction": QUESTION, "output": ANSWER}


def written(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def message_of(path: Path, **arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read_conversations(path, **arguments)
    return str(caught.value)


FORMATS = {
    "alpaca": (ALPACA, TWO_TURNS),
    "alpaca, empty input": ({**ALPACA, "input": ""}, TWO_TURNS),
    "alpaca, null input": ({**ALPACA, "input": None}, TWO_TURNS),
    "alpaca, input": (
        {"instruction": "Translate", "input": "good morning", "output": ANSWER},
        (Message("user", "Translate\n\ngood morning"), Message("assistant", ANSWER)),
    ),
    "prompt/response": ({"prompt": QUESTION, "response": ANSWER}, TWO_TURNS),
    "prompt/completion": ({"prompt": QUESTION, "completion": ANSWER}, TWO_TURNS),
    "source/target": ({"source": QUESTION, "target": ANSWER}, TWO_TURNS),
    "input/output": ({"input": QUESTION, "output": ANSWER}, TWO_TURNS),
    "messages": (
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        TWO_TURNS,
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": QUESTION},
                {"from": "gpt", "value": ANSWER},
            ]
        },
        (Message("system", "Be brief."), *TWO_TURNS),
    ),
    "other keys": ({**ALPACA, "source": "me", "score": 3}, TWO_TURNS),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["jsonl", "compact list", "indented list"])
def test_every_format_and_layout(tmp_path: Path, name: str, layout: str) -> None:
    row, messages = FORMATS[name]
    path = tmp_path / "rows.json"
    if layout == "jsonl":
        path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}")
        lines = [1, 3]
    else:
        text = json.dumps([row, row], indent=2 if layout == "indented list" else None)
        path.write_text(text)
        begins = [i for i, line in enumerate(text.split("\n"), start=1) if line.startswith("  {")]
        lines = begins or [1, 2]  # on one line: the row's number
    read = read_conversations(path)
    assert [conversation.messages for conversation in read] == [messages, messages]
    assert [conversation.line for conversation in read] == lines
    assert {conversation.source for conversation in read} == {str(path)}


def test_text_arrives_unchanged(tmp_path: Path) -> None:
    answer = "  zwölf 🐍\u2028 tabs\t and\r\n lines\n"
    row = json.dumps({"prompt": "", "response": answer}, ensure_ascii=False).encode() + b"\r\n"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row + row)
    read = read_conversations(path)
    assert [conversation.messages for conversation in read] == [(Message("user", ""), Message("assistant", answer))] * 2
    assert [conversation.line for conversation in read] == [1, 2]


def test_every_broken_line_is_reported_at_once(tmp_path: Path) -> None:
    rows: list[Any] = [
        ALPACA,
        '{"instruction": "x", "output": ',
        {"instruction": "x"},
        {"instruction": "x", "output": " \n"},
        {"instruction": "x", "output": None},
        {"instruction": "x", "output": ["y"]},
        {"instruction": 7, "output": "y"},
        {"prompt": "x", "response": "y"},
        "17",
        {"instruction": "x", "output": "half \ud83d of it"},
        {},
    ]
    path = written(tmp_path, rows)
    message = message_of(path)
    expected = {
        2: "not JSON: Expecting value, column 32",
        3: 'no "output" (keys: instruction)',
        4: '"output" is empty: no answer to train on',
        5: '"output" is null',
        6: '"output" should be text, found a list ["y"]',
        7: '"instruction" should be text, found a number 7',
        8: 'no "instruction" (keys: prompt, response)',
        9: "a row should be an object, found a number 17",
        10: '"output" holds half a character (a lone surrogate)',
        11: 'no "instruction" (no keys)',
    }
    for line, said in expected.items():
        assert f"{path}:{line}: {said}\n" in message
    assert f"10 of 11 rows of {path} are broken" in message
    assert 'alpaca format: {"instruction": ..., "input": ... (may be absent), "output": ...}' in message
    assert "fix: mend or remove those rows, or data.path=" in message


def test_messages_and_sharegpt_faults_name_the_message(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    rows = [
        [user, answer],
        [user, {"role": "assistant", "content": ""}],
        [user, {"role": "tool", "content": "y"}, answer],
        [user, {"from": "gpt", "value": "y"}],
        [user, {"role": "system", "content": "y"}],
        [answer, user],
        [],
        [user, "hello"],
        "hello",
    ]
    message = message_of(written(tmp_path, [{"messages": row} for row in rows]))
    for line, said in {
        2: '"content" of message 2 is empty',
        3: "\"role\" of message 2 is 'tool'; known are system, user, assistant",
        4: 'no "role" of message 2 (keys: from, value)',
        5: "no answer among its 2 messages",
        6: "begins with an answer",
        7: "no answer among its 0 messages",
        8: 'message 2 should be an object, found text "hello"',
        9: '"messages" should be a list, found text "hello"',
    }.items():
        assert f".jsonl:{line}: {said}" in message


def test_faults_past_the_first_twenty_are_counted(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, [ALPACA, *[{"instruction": "x"}] * 33]))
    assert "33 of 34 rows" in message
    assert len(re.findall(r"\.jsonl:\d+: ", message)) == 20
    assert "and 13 more" in message


def test_one_broken_row(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, [*[ALPACA] * 6, "{broken", ALPACA]), setting="data.eval_path")
    assert ".jsonl:7: not JSON: Expecting property name enclosed in double quotes, column 2" in message
    assert "1 of 8 rows" in message
    assert "data.eval_path=" in message


def test_a_file_in_no_known_format(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, [{"question": "x", "answer": "y"}]))
    assert "no known format (keys: question, answer)" in message
    for key in ("messages", "conversations", "instruction", "completion", "response"):
        assert f'"{key}"' in message


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_the_rows(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path, [json.dumps({"version": 1, "data": [ALPACA]}, indent=indent)])
    assert "no known format (keys: version, data); are the rows inside 'data'?" in message_of(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[\n{"prompt": "x", "response": "y"},\n{"prompt": "x" "response": "y"}\n]',
            ":3: not JSON: Expecting ',' delimiter",
        ),
        ('[\n{"prompt": "x", "response": "y"}\n{"prompt"', ":3: not JSON: , or ] expected after a row, found '{'"),
        ('[{"prompt": "x", "response": "y"}\n', ":2: not JSON: , or ] expected after a row, found the end of the file"),
        ('[{"prompt": "x", "response": "y"}]\n\nmore', ":3: text after the end of the list: 'more'"),
        ('[{"prompt": "x", "response": "y"},\n "z"]', ':2: a row should be an object, found text "z"'),
        ("prompt,response\nx,y\n", "is not JSON: it begins with 'prompt,response"),
        ("", "has no rows"),
        (" \n\n", "has no rows"),
        ("[]", "has no rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    message = message_of(path)
    assert said in message
    assert "data.path=" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    written(tmp_path, [ALPACA], "train.jsonl")
    assert f"fix: data.path={tmp_path}/train.jsonl" in message_of(tmp_path / "trian.jsonl")
    assert "no such file: data.path=" in message_of(tmp_path / "elsewhere" / "rows.jsonl")
    folder = message_of(tmp_path)
    assert "is a folder" in folder
    assert f"fix: data.path={tmp_path}/train.jsonl" in folder
    assert "cannot be read" in message_of(tmp_path / "train.jsonl" / "rows.jsonl")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"prompt": "x", "response": "y"}\n{"prompt": "caf\xe9", "response": "y"}', ":2: byte 0xe9 is not UTF-8"),
        (json.dumps(ALPACA).encode("utf-16"), "iconv -f utf-16"),
    ],
)
def test_other_encodings(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    assert said in message_of(path)
