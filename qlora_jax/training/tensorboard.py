"""The run's numbers in TensorBoard's format, where tensorboardX is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qlora_jax.errors import UserError


class TensorBoard:
    """Writes scalars below `folder`; does nothing where there is no writer.

    Args:
      folder: RUN/tensorboard.
      setting: `log.tensorboard`: "auto" writes where tensorboardX is installed.
      first_step: of this session; what an interrupted one wrote at later steps is hidden.

    Raises:
      UserError: `setting` is True and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, setting: Literal["auto"] | bool, *, first_step: int) -> None:
        self._writer: Any = None
        if setting is False:
            return
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            if setting == "auto":
                return
            raise UserError(
                "log.tensorboard=true needs tensorboardX, which is not installed",
                fix="pip install 'qlora-jax[log]', or log.tensorboard=auto",
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point of each curve; None is left out."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
