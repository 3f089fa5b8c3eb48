"""From YAML files and the command line to a checked TrainConfig, with every mistake reported at once.

Settings are kept flat (`lora.rank`) until the end, each with where it came from, so that a message can name the file
and a resumed run can tell what was asked for from what was left at its default. Nothing here imports JAX.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.config import Section, TrainConfig

COMMAND_LINE = "command line"
FLAGS = ("help", "version", "debug", "dry-run")
# May differ when a run is resumed: none of them changes a step that was already taken.
CHANGEABLE_ON_RESUME = re.compile(r"resume|train\.steps|\w+\.every|log\..*|output_dir")

# org/name, and nothing that looks like a path.
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(?<!\.gguf)(?<!\.safetensors)")
_PLACEHOLDERS = {
    "model.path": "FOLDER_OR_GGUF",
    "data.path": "rows.jsonl",
    "data.eval_path": "held_out.jsonl",
    "lora.adapter": "RUN/adapter",
}
_KINDS = {"model.path": "a folder, a .gguf file or a hub name (org/name)", "lora.adapter": "an adapter's folder"}
# What other finetuning tools call our keys: too far from ours for difflib.
_ELSEWHERE = {
    "lr": "optim.learning_rate",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "max_seq_length": "train.seq_len",
    "max_length": "train.seq_len",
    "gradient_accumulation_steps": "train.accumulation",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_checkpointing": "train.remat",
    "max_grad_norm": "optim.clip",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "dataset": "data.path",
    "target_modules": "lora.targets",
    "adapter_name_or_path": "lora.adapter",
    "lora_model_dir": "lora.adapter",
    "use_dora": "lora.dora",
}


_SWITCHED = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what pydantic takes for a bool, too
# pydantic's words, where they say nothing to a user of a list.
_MESSAGES = {
    "missing": "too few values",
    "too_short": "too few values",
    "too_long": "too many values",
}


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str


@dataclass(frozen=True)
class Invocation:
    """What was asked for: explicit settings by dotted key, the --config, the flags, and what could not be read."""

    settings: Mapping[str, Setting]
    config: str | None
    flags: frozenset[str]
    mistakes: tuple[UserError, ...] = ()

    @property
    def is_demo(self) -> bool:
        return self.config is None and not {"model.path", "data.path"} & set(self.settings)


def fields(model: type[Section] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its field, dotted, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


FIELDS = dict(fields())
SECTIONS = {key.split(".")[0] for key in FIELDS if "." in key}


def parse_arguments(arguments: list[str]) -> Invocation:
    """Reads `--config X`, the flags, and `key=value`, `--key value`, `--key=value` in any order; the last one wins.

    Never raises: mistakes are collected, so that they can be shown beside those of the values.
    """
    mistakes: list[UserError] = []
    config: str | None = None
    flags, given = set(), {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h" or (argument.startswith("--") and argument[2:].replace("_", "-") in FLAGS):
            flags.add("help" if argument == "-h" else argument[2:].replace("_", "-"))
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not argument.startswith("--"):
            mistakes.append(UserError(f"{argument!r} is neither key=value nor --key value", fix=_suggest(argument)))
            continue
        if not equals:
            switch = key in FIELDS and FIELDS[key].annotation is bool
            if switch and not (rest and rest[0].lower() in _SWITCHED):  # `--resume output_dir=RUN`
                value = "true"
            elif rest and not (rest[0].startswith("--") and len(rest[0]) > 2):
                value = rest.pop(0)
            elif key == "config":
                mistakes.append(
                    UserError("--config is given no value", fix=f"--config {', or '.join(shipped_configs())}")
                )
                continue
            else:
                known = FIELDS.get(key)
                fix = (
                    f"--{key} {show(known.default)}   (the default; {allowed_values(known)})"
                    if known
                    else _suggest(key)
                )
                mistakes.append(UserError(f"--{key} is given no value", fix=fix))
                continue
        if key == "config" and argument.startswith("--"):
            config = value
        else:
            given[key] = Setting(_parse_value(key, value), COMMAND_LINE)
    settings: dict[str, Setting] = {}
    if config is not None and not flags & {"help", "version"}:
        try:
            settings = read_yaml(find_config(config))
        except UserError as error:
            mistakes.append(error)
    return Invocation(settings | given, config, frozenset(flags), tuple(mistakes))


def build_config(settings: Mapping[str, Setting], mistakes: Iterable[UserError] = ()) -> TrainConfig:
    """Checks flat settings and makes the configuration.

    Raises:
      UserErrors: the mistakes found so far, every unknown key, every bad value, every file that is not there.
    """
    mistakes = [*mistakes, *unknown_keys(settings)]
    known = {key: setting for key, setting in settings.items() if key in FIELDS}
    nested: dict[str, Any] = {}
    for key, setting in known.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = setting.value
    try:
        config = TrainConfig.model_validate(nested)
    except ValidationError as error:
        mistakes += _describe(error, known)
    mistakes += _missing_files(known)
    if mistakes:
        raise UserErrors(mistakes)
    return config


def resume_settings(settings: Mapping[str, Setting], stored: Mapping[str, Setting]) -> dict[str, Setting]:
    """The stored run's settings with those that may change taken from what is given now.

    Raises:
      UserErrors: every key given again that disagrees with the run.
    """
    now, before = flatten(build_config(settings)), flatten(build_config(stored))
    merged, mistakes = dict(stored), []
    for key, setting in settings.items():
        if CHANGEABLE_ON_RESUME.fullmatch(key):
            merged[key] = setting
        elif _comparable(key, now[key]) != _comparable(key, before[key]):
            mistakes.append(
                UserError(
                    f"{key}={show(setting.value)} ({setting.source}) disagrees with the run, which has "
                    f"{key}={show(before[key])}",
                    why="a resumed run continues exactly; only train.steps, *.every and log.* may change",
                    fix=f"leave {key} out, or start anew with another output_dir",
                )
            )
    if mistakes:
        raise UserErrors(mistakes)
    if merged.get("train.steps", Setting(None, "")).value is not None:
        merged["train.epochs"] = Setting(None, merged["train.steps"].source)
    return merged


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Local paths made absolute, so that the run can be resumed from anywhere; hub names stay."""
    for name in _PLACEHOLDERS:
        section, key = name.split(".")
        path = getattr(getattr(config, section), key)
        if path is not None and os.path.exists(os.path.expanduser(path)):
            absolute = getattr(config, section).model_copy(update={key: os.path.abspath(os.path.expanduser(path))})
            config = config.model_copy(update={section: absolute})
    return config


def flatten(config: TrainConfig) -> dict[str, Any]:
    """`{"lora.rank": 16, ...}`: every key with its plain value."""
    return _flatten(config.model_dump(mode="json"))


def read_yaml(path: Path) -> dict[str, Setting]:
    """The settings of a file; `lora: {rank: 8}` and `lora.rank: 8` mean the same.

    Raises:
      UserError: unreadable, not YAML, a key given twice, or a section that is not one.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML", why=" ".join(str(error).split())) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", why=str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {show(content)}", why="a configuration maps keys to values", fix="lora.rank: 16")
    return {key: Setting(value, str(path)) for key, value in _flatten(content).items()}


def find_config(name: str) -> Path:
    """A path as it is, or a shipped configuration by name (`llama2/7b_qlora`, with or without .yaml).

    Raises:
      UserError: neither; lists the names there are.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    found = shipped.get(name.removesuffix(".yaml"))
    if found is not None:
        return found
    nearest = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    raise UserError(
        f"--config {name} is neither a file nor a shipped configuration",
        why=f"shipped: {', '.join(shipped)}",
        fix=f"--config {nearest[0] if nearest else next(iter(shipped), 'FILE.yaml')}",
    )


def shipped_configs() -> dict[str, Path]:
    """Name -> file, of the configurations in the wheel (qlora_jax/configs) or, in a source checkout, in configs/."""
    package = Path(str(resources.files("qlora_jax")))
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {
                file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))
            }
    return {}


def unknown_keys(settings: Mapping[str, Setting]) -> list[UserError]:
    mistakes = []
    for key, setting in settings.items():
        if key in SECTIONS:
            example = next(name for name in FIELDS if name.startswith(key + "."))
            mistakes.append(
                UserError(
                    f"{key}={show(setting.value)} ({setting.source}): {key} is a section, not a key",
                    fix=f"{example}={show(FIELDS[example].default)}",
                )
            )
        elif key not in FIELDS:
            mistakes.append(UserError(f"unknown key {key} ({setting.source})", fix=_suggest(key)))
    return mistakes


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(show, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed_values(field: FieldInfo) -> str:
    """The type of a field in a user's words: `int`, `nf4 | none`, `number or null`."""
    return " | ".join(dict.fromkeys(_words(field.annotation)))


def _words(annotation: Any) -> Iterator[str]:
    names = {int: "int", float: "number", bool: "true | false", str: "text", type(None): "null"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in names:
        yield names[annotation]
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _words(argument)
    elif origin is list:
        yield "[" + "".join(_words(arguments[0])) + ", ...]"
    elif origin is tuple:
        yield "[" + ", ".join("".join(_words(argument)) for argument in arguments) + "]"
    else:  # Annotated
        yield from _words(arguments[0])


def _parse_value(key: str, text: str) -> Any:
    """A value from the command line: YAML, but text stays as it is where text is wanted (`output_dir=0012`)."""
    if key in FIELDS and "text" in _words(FIELDS[key].annotation):
        return None if text == "null" else text
    if key in FIELDS and "[" in allowed_values(FIELDS[key]) and text != "null" and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _suggest(key: str) -> str:
    """The line that mends an unknown key: the nearest key, or the key of that name in another section."""
    last = key.rpartition(".")[2]
    if last in _ELSEWHERE:
        return f"did you mean {_ELSEWHERE[last]}?"
    ends = [name for name in FIELDS if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, [*FIELDS, "--config", *(f"--{flag}" for flag in FLAGS)], n=1, cutoff=0.6)
    near_ends = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in FIELDS], n=1, cutoff=0.7)
    found = ends or near or [name for name in FIELDS if near_ends and name.rpartition(".")[2] == near_ends[0]]
    return f"did you mean {' or '.join(found)}?" if found else "python -m qlora_jax.train --help lists every key"


def _describe(error: ValidationError, given: Mapping[str, Setting]) -> Iterable[UserError]:
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"]]
        key = next((".".join(parts[:end]) for end in (2, 1) if ".".join(parts[:end]) in FIELDS), ".".join(parts))
        message = _MESSAGES.get(detail["type"], detail["msg"].removeprefix("Value error, "))
        if key in given:
            setting, default = given[key], FIELDS[key].default
            problem = f"{key}={show(setting.value)} ({setting.source}): {message[0].lower()}{message[1:]}"
            yield UserError(problem, fix=f"{key}={show(default)}   (the default; {allowed_values(FIELDS[key])})")
        else:
            sources = sorted({setting.source for name, setting in given.items() if name.startswith(f"{key}.")})
            yield UserError(f"{message} ({', '.join(sources)})")


def _missing_files(given: Mapping[str, Setting]) -> Iterator[UserError]:
    for key in _PLACEHOLDERS:
        path = given[key].value if key in given else None
        if not isinstance(path, str) or os.path.exists(os.path.expanduser(path)):
            continue
        if key == "model.path" and _HUB_NAME.fullmatch(path):
            continue
        what = _KINDS.get(key, "a file")
        folder = next(place for place in Path(path).expanduser().absolute().parents if place.is_dir())
        near = difflib.get_close_matches(Path(path).name, os.listdir(folder), n=1)
        why = f"it must be {what}" + ("" if Path(path).name == path else f"; {folder} is the last folder on its way")
        yield UserError(
            f"{key}={path} ({given[key].source}) does not exist",
            why=why,
            fix=f"did you mean {folder / near[0]}?" if near else f"{key}={_PLACEHOLDERS[key]}",
        )


def _flatten(values: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS and (value is None or isinstance(value, dict)):
            flat |= {f"{name}.{key}": inner for key, inner in (value or {}).items()}
        else:
            flat[str(name)] = value
    return flat


def _comparable(key: str, value: Any) -> Any:
    """Paths are the same run's when they lead to the same place."""
    if key not in _PLACEHOLDERS or value is None:
        return value
    path = os.path.expanduser(value)
    return os.path.realpath(path) if os.path.exists(path) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
