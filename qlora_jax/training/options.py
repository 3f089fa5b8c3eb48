"""Options of the doors that take few: `--key value`, `--key=value`, `key=value`; typos answered by the nearest one."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from qlora_jax.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """argparse, with UserErrors for mistakes. It has --debug and --version beside --help.

    Args:
      door: the module's name.
      settings: of ArgumentParser.
    """

    def __init__(self, door: str, **settings: Any) -> None:
        from qlora_jax import __version__

        super().__init__(
            prog=f"python -m qlora_jax.{door}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )
        self._help = f"python -m qlora_jax.{door} --help lists every option"
        self.add_argument("--debug", action="store_true", help="show where in the code an error arose")
        self.add_argument("--version", action="version", version=f"qlora_jax {__version__}")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Reads a command line.

        Raises:
          UserError: an unknown option (with the nearest known one), a value that does not fit or is missing, or a
            place that is not named.
        """
        return self.parse_args(self._normalized(arguments))

    def error(self, message: str) -> NoReturn:
        needed = [str(action.metavar) for action in self._places()]
        for action in self._actions:
            if action.option_strings and action.required:
                needed += [action.option_strings[0], "|".join(action.choices or [str(action.metavar)])]
        missing = message.startswith("the following arguments are required")
        raise UserError(message, fix=" ".join([self.prog, *needed]) if missing else self._help)

    def _places(self) -> list[argparse.Action]:
        return [action for action in self._actions if not action.option_strings]

    def _normalized(self, arguments: Sequence[str]) -> list[str]:
        """Options as `--key=value`, so that values may begin with a dash; then the places."""
        known = {name: action for action in self._actions for name in action.option_strings}
        normalized: list[str] = []
        places: list[str] = []
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "-h":
                normalized.append("--help")
                continue
            key, equals, value = argument.partition("=")
            if not argument.startswith("-") and (not equals or "/" in key):
                if len(places) == len(self._places()):
                    fix = f"--prompt {argument!r}" if "--prompt" in known else self._help
                    raise UserError(f"unexpected argument {argument!r}", fix=fix)
                places.append(argument)
                continue
            name = "--" + key.lstrip("-").replace("_", "-")
            if name not in known:
                raise UserError(f"unknown option {key}", fix=hint(name, known, self._help))
            if known[name].nargs == 0:  # a flag
                if equals and value.lower() not in ("true", "false"):
                    raise UserError(f"{argument}: {name} is true or false", fix=name)
                normalized += [name] if value.lower() != "false" else []
            elif equals or rest:
                normalized.append(f"{name}={value if equals else rest.pop(0)}")
            else:
                raise UserError(f"{name} is given no value", fix=f"{name} {known[name].metavar or '...'}")
        return [*normalized, *places]


def hint(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean --temperature or --template?` for options that a name is part of or a plausible misspelling of."""
    given, words = name.lstrip("-"), {word.lstrip("-"): word for word in known}
    near = [word for word in words if len(given) > 2 and given in word]
    # Compared without the dashes, which all share. At 0.65 a slip in a word of three letters is found ("rnu": run), and
    # "nope" is not like "stop".
    near = near or difflib.get_close_matches(given, words, n=1, cutoff=0.65)
    return f"did you mean {' or '.join(words[word] for word in near[:3])}?" if near else otherwise


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes, for argparse.

    Raises:
      argparse.ArgumentTypeError: neither.
    """
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text, 1
    for suffix, factor in units.items():
        if text.upper().endswith(suffix):
            number, unit = text[: -len(suffix)], factor
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return size
