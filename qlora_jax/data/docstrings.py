"""An instruction set out of the running Python's own docstrings: real text, on every machine, without a network.

    "In one sentence, what does the Python function `os.killpg` do?"  ->  "Kill a process group with a signal."

The rows are a function of the interpreter (its version and the modules built into it), the seed and nothing else.
The standard library is imported in a child process (`docstring_scan.py`), so the caller's process keeps its signal
handlers, its modules and its output; everything after that is plain text work, here.
"""

import hashlib
import inspect
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.errors import UserError

Row = dict[str, str]

QUESTIONS = {
    "function": "In one sentence, what does the Python function `{}` do?",
    "method": "In one sentence, what does the Python method `{}` do?",
    "class": "In one sentence, what is the Python class `{}`?",
    "property": "In one sentence, what is the Python attribute `{}`?",
    "module": "In one sentence, what is the Python module `{}` for?",
}
MAX_NAME = 60  # characters
MAX_ANSWER = 240  # characters
WORDS = range(4, 37)  # words of an answer
NEAR_COPY = 0.6  # Jaccard similarity of word sets from which an eval answer counts as a copy of a training answer


class Candidate(NamedTuple):
    """A row, and the number of the Python object it is about."""

    row: Row
    object: int


@dataclass(frozen=True)
class DocstringSet:
    """Rows {"instruction", "output", "name", "kind", "module"}.

    Attributes:
      train, evaluation: no top-level module has rows in both.
      dropped: how many names gave no row, by reason.
    """

    train: list[Row]
    evaluation: list[Row]
    dropped: Counter[str]


def build_docstring_rows(seed: int = 0, eval_rows: int = 400) -> tuple[list[Row], list[Row]]:
    """Training rows and at most `eval_rows` held-out rows of `build_docstring_set`."""
    built = build_docstring_set(seed, eval_rows)
    return built.train, built.evaluation


def build_docstring_set(seed: int = 0, eval_rows: int = 400) -> DocstringSet:
    """Builds the rows of the running interpreter.

    Args:
      seed: which modules are held out, and the order of the rows.
      eval_rows: held-out rows to aim at; whole modules are held out, so there may be fewer, never more.

    Raises:
      UserError: the running Python cannot be started again to read its standard library.
    """
    dropped: Counter[str] = Counter()
    candidates = _unique(_candidates(scan_docstrings(), dropped), dropped)
    train, held_out = _split_by_module(candidates, seed, eval_rows)
    held_out = _without_near_copies(held_out, train, dropped)
    shuffle = random.Random(seed).shuffle
    for rows in (train, held_out):
        rows.sort(key=lambda row: row["name"])
        shuffle(rows)
    dropped["held out beyond eval_rows"] = len(held_out[eval_rows:])
    return DocstringSet(train, held_out[:eval_rows], dropped)


def scan_docstrings() -> list[dict[str, Any]]:
    """The public names of the running Python's standard library, as docstring_scan.py lists them.

    Raises:
      UserError: the running Python cannot be started again.
    """
    # -I: neither the current folder nor PYTHONPATH may put a file of the user's in a standard module's place.
    command = [sys.executable, "-I", "-W", "ignore", str(Path(__file__).with_name("docstring_scan.py"))]
    try:
        child = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or "it runs a second time to import its standard library"
        raise UserError(
            f"the docstrings of {sys.executable or 'this Python'} cannot be read: {error}",
            why=said.strip()[-500:],
            fix="data.path=rows.jsonl   (rows of your own)",
        ) from error
    return [json.loads(line) for line in child.stdout.splitlines()]


def _candidates(scanned: Iterable[dict[str, Any]], dropped: Counter[str]) -> Iterable[Candidate]:
    for entry in scanned:
        if not (entry["doc"] or "").strip():
            dropped["no docstring"] += 1
            continue
        answer = finish(first_sentence(entry["doc"]))
        fault = fault_of(answer)
        name, kind = entry["name"], entry["kind"]
        if kind != "module":
            name = name.removeprefix("builtins.")
        if fault is None and len(name) > MAX_NAME:
            fault = "long name"
        if fault is not None:
            dropped[fault] += 1
            continue
        question = QUESTIONS[kind].format(name)
        row = {"instruction": question, "output": answer, "name": name, "kind": kind, "module": entry["module"]}
        yield Candidate(row, entry["object"])


# ---- From a docstring to a sentence

_SIGNATURE_LINE = re.compile(r"[\w.\[\],]* *\(.*?\)\s*(->\s*[^.]{0,60})?[:.]?")
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z`\"'(*:<]|$)")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|eg|ie|resp|approx|No|St|Mr|Dr|Inc|ca)\.$", re.I)

# (what it repairs, pattern, replacement), in this order.
_REPAIRS = [
    ("reST literals to Markdown's", re.compile(r"``"), "`"),
    ("'S.append(value) -- append ...', 'Functools.py - Tools ...'", re.compile(r"^[\w.]+(\([^)]*\))? --? "), ""),
    (
        "a second sentence in lower case",
        re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)([.!?])\s+[a-z].*$"),
        r"\1",
    ),
    ("white space before a full stop or comma", re.compile(r"\s+([.,])"), r"\1"),
    ("a missing full stop", re.compile(r"(?<=[^.!?])$"), "."),
]


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, signature lines left out, white space single; "" if there is none."""
    paragraphs = [text for text in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if text.strip()]
    for paragraph in paragraphs[:3]:
        lines = [line.strip() for line in paragraph.split("\n")]
        while lines and _SIGNATURE_LINE.fullmatch(lines[0]):
            lines.pop(0)
        text = " ".join(" ".join(lines).split())
        if text:
            ends = (found.end() for found in _SENTENCE_END.finditer(text))
            return text[: next((end for end in ends if not _ABBREVIATION.search(text[:end])), len(text))]
    return ""


def finish(sentence: str) -> str:
    """The sentence with a capital first letter, a full stop, and a docstring's habits taken off."""
    sentence = sentence.strip()
    for _, pattern, replacement in _REPAIRS:
        sentence = pattern.sub(replacement, sentence)
    return sentence[:1].upper() + sentence[1:]


# ---- Sentences that would teach something else than answering

_CODE = re.compile(r"(^|\s)=(\s|$)|^\w*[_(]|^\w+\.\w")
_MARKUP = re.compile(r"->|>>>|\.\.\.|::|__|:(class|meth|func|mod|ref|exc|attr|data):|\bTODO\b|\bXXX\b|https?:|\|", re.I)
_REFERS_ELSEWHERE = re.compile(
    r"^(alias|see|same as|like|equivalent to|create and return) |^(the same|inherit|override|convenience|helper)|"
    r"\b(see|above|below)\b|implementation of|^this (method|function|class) is",
    re.I,
)
_INTERNAL = re.compile(r"deprecat|^(internal|constructor|copyright)|^initiali[sz]e self", re.I)


def _half_quoted(text: str) -> bool:
    return text.count("'") % 2 == 1 and not re.search(r"\w'\w|s'", text)


def _unpaired(text: str) -> bool:
    return text.count("(") != text.count(")") or text.count("`") % 2 == 1 or text.count('"') % 2 == 1


_FAULTS: list[tuple[str, Callable[[str], object]]] = [
    ("empty or not ASCII", lambda text: len(text) < 2 or not text.isascii()),
    ("code in the sentence", lambda text: _CODE.search(text) or _half_quoted(text)),
    ("signature or markup", _MARKUP.search),
    ("refers to something else", _REFERS_ELSEWHERE.search),
    ("deprecated or internal", _INTERNAL.search),
    ("cut sentence", lambda text: text[-2] in ":;,(" or _unpaired(text)),
    ("odd start", lambda text: not re.match(r"[A-Z`]", text)),
    ("length", lambda text: len(text) > MAX_ANSWER or len(text.split()) not in WORDS),
    ("mostly symbols", lambda text: sum(c.isalpha() or c == " " for c in text) < 0.85 * len(text)),
]


def fault_of(answer: str) -> str | None:
    """Why a finished sentence is no good answer, or None."""
    return next((reason for reason, is_at_fault in _FAULTS if is_at_fault(answer)), None)


# ---- One row per object and answer; a split without leaks


def _unique(candidates: Iterable[Candidate], dropped: Counter[str]) -> list[Row]:
    """Of rows about one object, or with one answer, the one with the shortest dotted name stays."""
    objects, answers, rows = set(), set(), []
    by_name = sorted(candidates, key=lambda c: (c.row["name"].count("."), len(c.row["name"]), c.row["name"]))
    for row, number in by_name:
        answer = _words(row["output"])
        if number in objects:
            dropped["same object under another name"] += 1
        elif answer in answers:
            dropped["same answer"] += 1
        else:
            objects.add(number)
            answers.add(answer)
            rows.append(row)
    return rows


def _split_by_module(rows: Sequence[Row], seed: int, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """Holds out whole top-level modules, in the order of a hash, until `eval_rows` are reached.

    A module with more than a fifth of them always trains: a few large modules would be all there is to evaluate.
    """
    sizes = Counter(row["module"] for row in rows)
    held: set[str] = set()
    count = 0
    for module in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()):
        if count >= eval_rows:
            break
        if sizes[module] <= eval_rows // 5 and count + sizes[module] <= eval_rows * 1.15:
            held.add(module)
            count += sizes[module]
    train = [row for row in rows if row["module"] not in held]
    return train, [row for row in rows if row["module"] in held]


def _without_near_copies(held_out: Iterable[Row], train: Iterable[Row], dropped: Counter[str]) -> list[Row]:
    train_words = [set(_words(row["output"])) for row in train]
    rows_with = defaultdict(list)
    for index, words in enumerate(train_words):
        for word in words:
            rows_with[word].append(index)
    kept = []
    for row in held_out:
        words = set(_words(row["output"]))
        shared = Counter(index for word in words for index in rows_with[word])
        if any(n / (len(words) + len(train_words[index]) - n) >= NEAR_COPY for index, n in shared.items()):
            dropped["held-out answer close to a training answer"] += 1
        else:
            kept.append(row)
    return kept


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))
