"""A whole run: open, load, resume, train, save the adapter, report.

What a run folder promises: where `checkpoints/<step>` exists, metrics.jsonl has every line up to `step`. A resumed run
drops the lines past its checkpoint and writes them again, bit for bit.
"""

import dataclasses

import jax.numpy as jnp

from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.models.loading import load_model
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.meter import Meter
from qlora_jax.training.preparation import Prepared, prepare
from qlora_jax.training.progress import Progress
from qlora_jax.training.report import write_report
from qlora_jax.training.result import Result
from qlora_jax.training.resume import dataset_sha256, first_step
from qlora_jax.training.run_folder import RunFolder
from qlora_jax.training.samples import Samples
from qlora_jax.training.session import NonFiniteLossError, Session

__all__ = ["NonFiniteLossError", "Result", "run_training"]


def run_training(
    config: TrainConfig, folder: RunFolder, *, progress: Progress, prepared: Prepared | None = None
) -> Result:
    """Runs, or continues, the training that `config` describes.

    Args:
      config: with model.path and data.path given.
      folder: made already (`folder.create(config)`). With `config.resume` its newest complete checkpoint is continued.
      progress: told of every step.
      prepared: `prepare(config)`, where the caller has it already.

    Raises:
      UserError: the model, the rows, or a checkpoint that does not belong to them.
      NonFiniteLossError: at the first loss or gradient that is not finite.
      KeyboardInterrupt: where there is no checkpoint yet: at the second Ctrl-C, or at the first one before the model is
        loaded.
    """
    prepared = prepared or prepare(config)
    checkpoint, dataset, total_steps = prepared.checkpoint, prepared.dataset, prepared.steps
    store = CheckpointStore(folder.checkpoints, keep=config.checkpoint.keep)
    start = first_step(config, folder, store, progress.say)
    if start is not None and start >= total_steps and folder.finished_at() == start:
        progress.say(
            f"{folder.path} is finished: {start} of {total_steps} steps are done. Its adapter: {folder.adapter}"
        )
        return _with_eval_losses(Result(start, already_finished=True), folder)

    fingerprint = {"base_sha256": checkpoint.fingerprint(), "data_sha256": dataset_sha256(dataset)}
    with Meter("loading", "tensors") as meter:
        model = load_model(
            checkpoint,
            **config.quant.load_arguments(),
            rank=config.lora.rank if config.lora.adapter is None else 0,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            dora=config.lora.dora,
            targets=config.lora.targets,
            dtype=jnp.dtype(config.model.dtype),
            seed=config.seed,
            progress=meter.show,
        )
    if config.lora.adapter is not None:
        load_adapter(model, config.lora.adapter, dropout=config.lora.dropout)
    session = Session(
        config,
        folder,
        progress,
        model=model,
        dataset=dataset,
        store=store,
        fingerprint=fingerprint,
        total_steps=total_steps,
    )
    if start is not None:
        session.restore(start)
    if config.resume:
        # Only now: a resume that was refused has changed nothing. These steps will be taken again.
        folder.truncate_metrics(-1 if start is None else start)
    samples = Samples(
        dataset.held_out, prepared.renderer, count=config.eval.samples, max_new_tokens=config.eval.sample_tokens
    )
    result = _with_eval_losses(session.run(samples), folder)
    if not result.interrupted:
        save_adapter(
            session.model(),
            folder.adapter,
            base_model=str(config.model.path),
            base_sha256=fingerprint["base_sha256"],
            base_quantized_from=getattr(checkpoint, "quantized_from", None),
            tokenizer=prepared.tokenizer,
        )
        write_report(folder, config, result)  # last: it says that all the rest is there
    return result


def _with_eval_losses(result: Result, folder: RunFolder) -> Result:
    losses = [line["eval_loss"] for line in folder.read_metrics() if "eval_loss" in line]
    return dataclasses.replace(
        result, first_eval_loss=losses[0] if losses else None, last_eval_loss=losses[-1] if losses else None
    )
