"""From a finished run to a folder that other programs load: its adapter, the merged model, or the base in 4 bits.

A merge is into the weights that were trained against, 4 bits decoded, or into the original ones in 16 bits. It is never
quantized again unless that was asked for, and then with the rounding it costs.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.atomic import whole_folder
from qlora_jax.checkpoints.bitsandbytes import QUANTIZED_FROM, BitsandbytesCheckpoint
from qlora_jax.checkpoints.bitsandbytes_writer import QUANT_TYPES
from qlora_jax.checkpoints.companions import copy_files
from qlora_jax.checkpoints.conversion import Converted, block_linears, convert, write_dense
from qlora_jax.checkpoints.digest import quantized_from, sha256_of
from qlora_jax.checkpoints.merging import MergedCheckpoint, adapter_for
from qlora_jax.checkpoints.peft_reader import CONFIG, WEIGHTS, PeftAdapter
from qlora_jax.checkpoints.peft_readme import readme
from qlora_jax.checkpoints.peft_writer import metadata
from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint
from qlora_jax.checkpoints.tensorfile import read_json, read_metadata
from qlora_jax.errors import UserError
from qlora_jax.models.loading import check_model
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.finished import base_model, finished_adapter, read_run

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run, opened.

    Attributes:
      checkpoint: the base.
      base_path: where it lies, or its name.
      adapter: what was trained.
      quantized: arguments of quantize for the linears in training; None: they were in 16 bits, or the base lies in 4
        bits already.
      same_base: whether the base has the very weights that were trained on; None: the adapter does not say which.
    """

    checkpoint: Checkpoint
    base_path: str
    adapter: PeftAdapter
    quantized: dict[str, Any] | None
    same_base: bool | None

    @property
    def in_4_bits(self) -> bool:
        return self.quantized is not None or isinstance(self.checkpoint, BitsandbytesCheckpoint)

    def load_arguments(self, *, original: bool = False) -> dict[str, Any]:
        """Arguments of `load_model` for the base as it was trained against, or in 16 bits."""
        if isinstance(self.checkpoint, BitsandbytesCheckpoint):
            return {}
        return {"quant_type": None} if original or self.quantized is None else self.quantized


def open_trained(run: Path, model: str | None, say: Callable[[str], None]) -> Trained:
    """Opens a run folder, or an adapter folder (then its base is `model`, or what its configuration names).

    Raises:
      UserError: neither; a run that has not finished; a base that cannot be read or that the adapter does not fit.
    """
    if (run / CONFIG).is_file():
        config, folder = TrainConfig.model_validate({}), run
        named = read_json(run / CONFIG).get("base_model_name_or_path")
        path = model or (str(named) if named else None)
        if path is None:
            raise UserError(f"{run / CONFIG} does not name its base", fix="--model FOLDER_OR_GGUF")
    else:
        config, folder = read_run(run, option="RUN"), finished_adapter(run)
        path = model or base_model(config.model.path, say)
    checkpoint = open_checkpoint(path)
    arguments = config.quant.load_arguments()
    check_model(checkpoint, **arguments)
    adapter = adapter_for(checkpoint, folder)
    stored = isinstance(checkpoint, BitsandbytesCheckpoint)
    return Trained(
        checkpoint=checkpoint,
        base_path=path,
        adapter=adapter,
        quantized=None if stored or arguments["quant_type"] is None else arguments,
        same_base=None if adapter.base_sha256 is None else _is_base(checkpoint, adapter, arguments),
    )


def _is_base(checkpoint: Checkpoint, adapter: PeftAdapter, arguments: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, read with these arguments, has the weights that an adapter was trained against: they are
    those, or the one was quantized from the other as `convert` or the run does it.
    """
    sha256 = checkpoint.fingerprint()
    if sha256 == adapter.base_sha256 or adapter.base_sha256 is None:
        return sha256 == adapter.base_sha256
    trained = adapter.base_quantized_from or quantized_from(adapter.base_sha256, **arguments)
    if isinstance(checkpoint, BitsandbytesCheckpoint):
        found = checkpoint.quantized_from
    else:
        found = quantized_from(sha256, **arguments)
    return found is not None and found == trained


def check_base(trained: Trained, *, original: bool) -> None:
    """Whether a merge into this base, as trained against or original, is what was asked for.

    Raises:
      UserError: the base is another than the one that was trained on; or 16 bits are asked for where it lies in 4.
    """
    path = trained.base_path
    if original and isinstance(trained.checkpoint, BitsandbytesCheckpoint):
        raise UserError(
            f"--base original, but {path} is in 4 bits",
            why="the weights that it was quantized from are not in it",
            fix="--model FOLDER of the 16-bit model --base original, or --base dequantized",
        )
    if trained.same_base is False and not original:
        raise UserError(
            f"{path} is not the model that {trained.adapter.folder} was trained on: its sha256 is another",
            why="an adapter corrects the very weights that it was trained against",
            fix="--model PATH of that model, or --base original to merge into the weights of this one all the same",
        )


def export_peft(trained: Trained, out: Path, *, base_name: str | None) -> None:
    """Copies the adapter, with its tokenizer and chat template, and says in it what its base is called."""
    with whole_folder(out) as new:
        sha256 = trained.adapter.base_sha256 or trained.checkpoint.fingerprint()
        made_of = trained.adapter.base_quantized_from
        _write_adapter(trained, new, base_name or trained.base_path, sha256, made_of, place=out)


def export_merged(
    trained: Trained, out: Path, *, original: bool, dtype: str | None, shard_bytes: int, progress: Progress
) -> Converted:
    """Writes the merged model in 16 (or 32) bits; see `check_base`."""
    merged = merged_checkpoint(trained, original=original, dtype=dtype)
    return write_dense(merged, out, shard_bytes=shard_bytes, progress=progress, also=_tokenizer_of(trained))


def export_bitsandbytes(trained: Trained, out: Path, *, shard_bytes: int, progress: Progress) -> Converted:
    """Writes the base in the 4 bits that were trained against, and the adapter in `out/adapter`.

    Raises:
      UserError: it was trained in 16 bits, or in a type that bitsandbytes does not have.
    """
    if not trained.in_4_bits:
        raise UserError(
            "--to bitsandbytes, but the run was trained on 16-bit weights (quant.type=none)",
            why="in 4 bits they would be others than the adapter was trained against",
            fix="--to merged, or --to bitsandbytes --requantize to round the merged weights to 4 bits all the same",
        )
    quantized = trained.quantized or {}
    if quantized.get("quant_type", "nf4") not in QUANT_TYPES:
        raise UserError(
            f"--to bitsandbytes, but the run was trained in {quantized['quant_type']}",
            why=f"bitsandbytes has {' and '.join(QUANT_TYPES)} alone",
            fix="--to merged",
        )

    def also(filled: Path) -> None:
        copy_files(trained.adapter.folder, filled)
        (filled / "adapter").mkdir()
        sha256 = sha256_of(sorted(filled.glob("*.safetensors")))
        made_of = read_metadata(min(filled.glob("*.safetensors"))).get(QUANTIZED_FROM)
        _write_adapter(trained, filled / "adapter", str(out.absolute()), sha256, made_of, place=out / "adapter")

    return convert(
        trained.checkpoint,
        out,
        **quantized,
        source_sha256=trained.checkpoint.fingerprint(),
        shard_bytes=shard_bytes,
        progress=progress,
        also=also,
    )


def export_requantized(
    trained: Trained, out: Path, *, original: bool, shard_bytes: int, progress: Progress
) -> tuple[Converted, float]:
    """Merges, quantizes the result to NF4, and measures what that costs.

    Returns:
      What was written, and the norm of the rounding over the norm of what the adapter changes, in all adapted linears.
    """
    merged = merged_checkpoint(trained, original=original)
    made = convert(merged, out, shard_bytes=shard_bytes, progress=progress, also=_tokenizer_of(trained))
    written, base = open_checkpoint(out), merged_checkpoint(trained, original=original, without_adapter=True)
    rounding = change = 0.0
    for name in block_linears(merged):
        if name.removesuffix(".weight") in trained.adapter.linears:
            wanted = merged.read(name).astype(np.float32)
            rounding += float(np.sum((written.read(name).astype(np.float32) - wanted) ** 2, dtype=np.float64))
            change += float(np.sum((base.read(name).astype(np.float32) - wanted) ** 2, dtype=np.float64))
    return made, float(np.sqrt(rounding / change)) if change else float("inf")


def merged_checkpoint(
    trained: Trained, *, original: bool, dtype: str | None = None, without_adapter: bool = False
) -> MergedCheckpoint:
    """The run's model as a checkpoint."""
    adapter = dataclasses.replace(trained.adapter, linears={}, whole={}) if without_adapter else trained.adapter
    quantized = None if original else trained.quantized
    return MergedCheckpoint(trained.checkpoint, adapter, quantized=quantized, dtype=dtype)


def _write_adapter(
    trained: Trained, folder: Path, base_name: str, base_sha256: str, made_of: str | None, *, place: Path
) -> None:
    """The adapter of a run into a folder that will lie at `place`, for a base of another name and file."""
    source, config = trained.adapter.folder, dict(trained.adapter.config)
    config["base_model_name_or_path"] = base_name
    copy_files(source, folder)
    save_file(load_file(source / WEIGHTS), folder / WEIGHTS, metadata=metadata(base_sha256, made_of))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = readme(config, base_name, base_sha256, _precision(trained), place)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tokenizer_of(trained: Trained) -> Callable[[Path], None]:
    """The adapter's own tokenizer and chat template, which training used, go before the base's."""
    return functools.partial(copy_files, trained.adapter.folder)


def _precision(trained: Trained) -> str:
    if trained.quantized is not None:
        return f"{trained.quantized['quant_type']}, blocks of {trained.quantized['block_size']}"
    return "4 bits, as they lie in the base" if trained.in_4_bits else "16 bits"
