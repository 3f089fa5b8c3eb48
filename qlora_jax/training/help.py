"""The text of `python -m qlora_jax.train --help`: every key with its default and what changing it does."""

import shutil
import textwrap

from qlora_jax.training.settings import FIELDS, allowed_values, shipped_configs, show

_USAGE = """\
usage: python -m qlora_jax.train [--config NAME_OR_PATH] [key=value ...] [--key value ...]

Finetunes a LLaMA with QLoRA: the base frozen in 4 bits, adapters trained, everything kept in one run folder.

  python -m qlora_jax.train                                              the demo: a real 135M chat model, two minutes
  python -m qlora_jax.train model.path=FOLDER data.path=rows.jsonl       your own checkpoint and rows
  python -m qlora_jax.train data.path=rows.jsonl                         your own rows, the demo's model
  python -m qlora_jax.train --config llama2/7b_qlora data.path=rows.jsonl
  python -m qlora_jax.train output_dir=RUN resume=true                   go on with a run

Exit codes: 0 done, 2 something you can mend, 130 interrupted (saved; resume=true goes on), 1 anything else."""


def help_text() -> str:
    """Fits the terminal's width."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    options = {
        "--config NAME_OR_PATH": f"settings from a YAML file, or shipped ones: {', '.join(shipped_configs())}",
        "--dry-run": "print rows kept and dropped, one example with what is trained, steps and bytes; write nothing",
        "--debug": "show the traceback of an error that you can mend",
        "--version": "print the version",
        "--help": "this text",
    }
    lines = [_USAGE, "", "options"]
    for option, text in options.items():
        lines += [f"  {option}", textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    lines += ["", "keys, as key=value or --key value; in YAML, nested or dotted. The command line wins over --config."]
    section = ""
    for key, field in FIELDS.items():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += [""] if "." in key else []
        lines.append(f"  {key}={show(field.default)}   ({allowed_values(field)})")
        text = field.description or ""
        lines.append(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)
