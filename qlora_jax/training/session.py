"""One session of training: the compiled steps, the state they hand on, and where their numbers go."""

import time
from collections.abc import Iterable, Mapping, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.data.loader import Loader, eval_batches
from qlora_jax.evaluation.perplexity import mean_loss
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.t5 import T5
from qlora_jax.optim import paged_jit
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.dataset import Dataset, row_lengths
from qlora_jax.training.interrupts import Interrupt, first_interrupt_is_a_request
from qlora_jax.training.optimizer import learning_rate_schedule, make_optimizer
from qlora_jax.training.progress import Progress
from qlora_jax.training.result import Result
from qlora_jax.training.resume import check_fingerprint
from qlora_jax.training.run_folder import RunFolder
from qlora_jax.training.samples import Samples, keep_answers, kept_answers
from qlora_jax.training.step import (
    StepMetrics,
    TrainState,
    init_train_state,
    make_eval_step,
    make_train_step,
    model_arrays,
    split_model,
)
from qlora_jax.training.tensorboard import TensorBoard
from qlora_jax.training.usage import peak_memory_bytes

# Evaluation rows are padded to the longest of them, rounded up to a multiple of this: one shape, one compilation.
EVAL_LENGTH_MULTIPLE = 32

_ADVICE = "  Often it helps to look at those rows, to lower optim.learning_rate, or to set model.dtype=float32."


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became NaN or infinite. The update was not applied; the last checkpoint is as it was."""


class Window(NamedTuple):
    """The micro-batches of one optimizer step."""

    arrays: dict[str, np.ndarray]  # what the model reads, each [micro-batches, batch, seq]
    lines: list[list[list[int]]]  # by micro-batch and row: lines of the data file


class Session:
    """Trains a model on a dataset and writes what happens into a run folder."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        progress: Progress,
        *,
        model: Decoder | T5,
        dataset: Dataset,
        store: CheckpointStore,
        fingerprint: Mapping[str, str],
        total_steps: int,
    ) -> None:
        """Takes over `model`: the arrays of its adapters are donated to the first step. Read `self.model()` instead."""
        self.config, self.folder, self.progress = config, folder, progress
        self.store, self.fingerprint = store, dict(fingerprint)
        self.step, self.total_steps = 0, total_steps
        self._resumed = False
        train = config.train
        lengths = row_lengths(train, has_sources=dataset.has_sources)
        self._loader = Loader(
            dataset.train,
            batch_size=train.batch_size,
            seq_len=lengths.seq_len,
            source_len=lengths.source_len,
            packing=train.packing,
            seed=config.seed,
        )
        self._held_out = dataset.evaluation

        schedule = learning_rate_schedule(config.optim, total_steps)
        optimizer = make_optimizer(config.optim, schedule)
        model.remat = train.remat
        self._graphdef, adapters, self._frozen = split_model(model)
        self._state = init_train_state(adapters, optimizer)
        self._train_function = make_train_step(
            self._graphdef,
            optimizer,
            schedule,
            dropout_seed=config.seed if config.lora.dropout > 0 else None,
        )
        self._train_step: Any = None  # compiled at the first batch
        self._eval_step = jax.jit(make_eval_step(self._graphdef))

    def model(self) -> Decoder | T5:
        """The model as it is now."""
        return nnx.merge(self._graphdef, self._state.trainable, self._frozen)

    def restore(self, step: int) -> None:
        """Takes over the state of a checkpoint.

        Raises:
          UserError: it was made from another base or other rows, or does not fit this adapter and optimizer.
        """
        saved = self.store.restore(step, adapter_like=self._state.trainable, optimizer_like=self._state.optimizer)
        check_fingerprint(saved["fingerprint"], self.fingerprint, self.config)
        self._state = TrainState(jnp.asarray(step, jnp.int32), saved["adapter"], saved["optimizer"])
        self._loader.set_state(saved["data"])
        self.step, self._resumed = step, True

    def run(self, samples: Samples) -> Result:
        """Trains to the last step or to Ctrl-C, which saves the state; a second Ctrl-C leaves the last checkpoint.

        Raises:
          NonFiniteLossError: at the first loss or gradient that is not finite.
          KeyboardInterrupt: at the second Ctrl-C where there is no checkpoint.
        """
        result = Result(self.step, resumed_at=self.step)
        began = time.monotonic()
        board = TensorBoard(self.folder.tensorboard, self.config.log.tensorboard, first_step=self.step)
        self.progress.start(self.total_steps, self.step)
        try:
            with first_interrupt_is_a_request() as interrupt:
                if samples.turns and not self._resumed:
                    keep_answers(self.folder, samples.answer(self.model()))
                self._take_steps(result, board, interrupt)
                before = kept_answers(self.folder)
                if before and not interrupt.requested:
                    result.samples = samples.pair(before, samples.answer(self.model()))
        except KeyboardInterrupt:
            saved = self.store.latest()
            if saved is None:
                raise
            self.step = saved
        finally:
            self.progress.finish()
            board.close()
        result.steps, result.seconds = self.step, time.monotonic() - began
        result.interrupted = self.step < self.total_steps
        result.peak_memory_bytes = peak_memory_bytes()
        return result

    def _take_steps(self, result: Result, board: TensorBoard, interrupt: Interrupt) -> None:
        if not self._resumed and self._held_out:
            self._record(board, {"eval_loss": self._evaluate()})
        saved_at = self.step if self._resumed else None
        timed_tokens, timed_seconds = 0, 0.0
        data_state = self._loader.get_state()
        window = None if self.step >= self.total_steps else self._next_window()
        while window is not None and not interrupt.requested:
            began = time.monotonic()
            pending = self._dispatch(window)
            data_state, taken = self._loader.get_state(), window
            # The host makes the next batch while the device computes.
            window = self._next_window() if self.step + 1 < self.total_steps else None
            metrics = jax.device_get(pending)
            self._check_finite(metrics, taken)
            self.step += 1
            last, seconds, tokens = window is None, time.monotonic() - began, int(metrics.tokens)
            if result.trained_tokens:  # the first step of a session compiles
                timed_tokens, timed_seconds = timed_tokens + tokens, timed_seconds + seconds
                result.tokens_per_second = timed_tokens / timed_seconds
            result.trained_tokens += tokens
            line = {
                "loss": float(metrics.loss),
                "lr": float(metrics.learning_rate),
                "grad_norm": float(metrics.grad_norm),
            }
            if self._held_out and (last or self.step % self.config.eval.every == 0):
                line["eval_loss"] = self._evaluate()
            self._record(board, line, tokens_per_second=tokens / seconds)
            if last or self.step % self.config.checkpoint.every == 0:
                self._save(data_state)
                saved_at = self.step
        if interrupt.requested and saved_at != self.step:
            self._save(data_state)

    def _next_window(self) -> Window:
        micro: list[Mapping[str, Any]] = [next(self._loader) for _ in range(self.config.train.accumulation)]
        read = [model_arrays(batch) for batch in micro]
        arrays = {key: np.stack([each[key] for each in read]) for key in read[0]}
        return Window(arrays, [batch["lines"] for batch in micro])

    def _dispatch(self, window: Window) -> StepMetrics:
        """Starts a step; its metrics are on the device."""
        arguments = self._state, self._frozen, window.arrays
        if self._train_step is None:
            self._train_step = paged_jit(self._train_function, *arguments, donate_argnums=0)
        self._state, metrics = self._train_step(*arguments)
        return metrics

    def _check_finite(self, metrics: StepMetrics, window: Window) -> None:
        if metrics.applied:
            return
        bad = ~np.asarray(metrics.finite_rows)
        if bad.any():
            what = f"the loss is {metrics.loss}"
        else:  # any row may have done it
            bad = np.ones_like(bad)
            what = f"the loss is {metrics.loss:.4f}, but the norm of its gradient is {metrics.grad_norm}"
        lines = sorted({line for micro, row in np.argwhere(bad) for line in window.lines[micro][row]})
        saved = self.store.latest()
        kept = "no checkpoint was written yet" if saved is None else f"the checkpoint of step {saved} is intact"
        raise NonFiniteLossError(
            f"step {self.step + 1}: {what}\n"
            f"  rows: {self.config.data.path}, line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))}\n"
            f"  The update was not applied; {kept}.\n{_ADVICE}"
        )

    def _evaluate(self) -> float:
        def longest(rows: Iterable[Sized]) -> int:
            return -(-max(map(len, rows)) // EVAL_LENGTH_MULTIPLE) * EVAL_LENGTH_MULTIPLE

        sources = [example.source_ids for example in self._held_out if example.source_ids is not None]
        batches = eval_batches(
            self._held_out,
            batch_size=min(self.config.eval.batch_size, len(self._held_out)),
            seq_len=longest(example.input_ids for example in self._held_out),
            source_len=longest(sources) if sources else None,
        )

        def eval_step(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
            return self._eval_step(self._state.trainable, self._frozen, model_arrays(batch))

        loss = mean_loss(eval_step, batches).loss
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"step {self.step}: the loss of the {len(self._held_out)} held-out rows is {loss}\n{_ADVICE}"
            )
        return loss

    def _record(self, board: TensorBoard, line: dict[str, float], tokens_per_second: float | None = None) -> None:
        """Writes the line of the step just taken and shows it."""
        self.folder.append_metrics({"step": self.step, **line})
        memory = peak_memory_bytes()
        self.progress.step(
            self.step,
            loss=line.get("loss"),
            lr=line.get("lr"),
            grad_norm=line.get("grad_norm"),
            tokens_per_second=tokens_per_second,
            memory_bytes=memory,
            eval_loss=line.get("eval_loss"),
        )
        board.write(self.step, {**line, "tokens_per_second": tokens_per_second, "memory_bytes": memory})

    def _save(self, data_state: dict[str, Any]) -> None:
        state = self._state
        self.store.save(
            self.step,
            adapter=state.trainable,
            optimizer=state.optimizer,
            data=data_state,
            fingerprint=self.fingerprint,
        )
