"""What quantize_model did to each layer, as data and as a table."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Swap:
    """One layer that was swapped: the kernel's shape, and its bytes before and after."""

    shape: tuple[int, ...]
    dense_bytes: int
    packed_bytes: int


@dataclasses.dataclass
class QuantizeReport:
    """What was swapped and what was left dense; `str()` is a table.

    Attributes:
      swapped: by dotted path; a module that hangs on several paths is listed on each.
      kept: the reason, by dotted path.
    """

    swapped: dict[str, Swap]
    kept: dict[str, str]

    def __str__(self) -> str:
        rows = [
            (path, " x ".join(map(str, swap.shape)), f"{_size(swap.dense_bytes)} -> {_size(swap.packed_bytes)}")
            for path, swap in self.swapped.items()
        ]
        rows += [(path, "dense", reason) for path, reason in self.kept.items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [f"{path:<{widths[0]}}  {shape:<{widths[1]}}  {what}".rstrip() for path, shape, what in rows]
        return "\n".join([f"{len(self.swapped)} layers swapped, {len(self.kept)} left dense", *lines])


def _size(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
