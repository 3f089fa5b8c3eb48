"""Errors that a user can mend: the value seen, why it is wrong, the line that mends it."""

from collections.abc import Sequence


class UserError(ValueError):
    """A user's mistake. The command-line doors print it without a traceback and exit with code 2.

    Args:
      problem: what was wrong, with the value seen.
      why: why it cannot work.
      fix: the line (of configuration, shell or code) that mends it.
    """

    def __init__(self, problem: str, *, why: str = "", fix: str = "") -> None:
        self.problem, self.why, self.fix = problem, why, fix
        super().__init__("\n".join(filter(None, (problem, why and f"  why: {why}", fix and f"  fix: {fix}"))))


class UserErrors(UserError):
    """Several mistakes found together, shown together."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))
