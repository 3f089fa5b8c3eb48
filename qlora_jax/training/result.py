"""What a run did, as the loop hands it to whoever reports it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference answer, and the model's before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass
class Result:
    """What a run did. Times and tokens are those of this session; a resumed run adds to what earlier ones did.

    Attributes:
      steps: optimizer steps done in all.
      resumed_at: of those, done in earlier sessions.
      interrupted: ended by Ctrl-C before its last step, with its state saved.
      already_finished: there was nothing left to do.
      seconds: wall time from the first evaluation to the last checkpoint.
      trained_tokens: tokens that losses were taken at.
      tokens_per_second: of those, in training steps after the first (which compiles); None where there was none.
      peak_memory_bytes: of the device where it tells, else of the process.
      first_eval_loss, last_eval_loss: at step 0 and at the newest evaluation, of the whole run.
      samples: held-out prompts with the answers before and after.
    """

    steps: int
    resumed_at: int = 0
    interrupted: bool = False
    already_finished: bool = False
    seconds: float = 0.0
    trained_tokens: int = 0
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    samples: list[Sample] = field(default_factory=list)
