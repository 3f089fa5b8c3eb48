"""LoftQ (arXiv 2310.08659): 4-bit weights and the start of an adapter chosen together, so that Q + s * B @ A is near W.

    A, B = 0
    repeat: Q = quantize(W - s * B @ A);  s * B @ A = the best approximation of W - Q by a matrix of that rank

After the first round Q is W quantized as ever, and only the adapter starts elsewhere; further rounds change Q, so the
base is a checkpoint of its own, which goes with the adapter.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Float

from qlora_jax.checkpoints.digest import sha256_of
from qlora_jax.checkpoints.peft_reader import LinearAdapter
from qlora_jax.checkpoints.peft_writer import adapter_config, write_adapter
from qlora_jax.errors import UserError
from qlora_jax.nf4.decode import dequantize
from qlora_jax.nf4.streaming import quantize_rows
from qlora_jax.nf4.tensor import NF4Tensor


class LoftQ:
    """Quantizes weights one by one (see `convert`) and keeps the adapter that belongs to them.

    Args:
      rank: of the adapter.
      alpha: its factor is scaled by `alpha / rank`.
      iterations: rounds, at least 1.
      quantized: `quant_type`, `block_size` and `double_quant`.

    Attributes:
      linears: the adapter so far, by module name.
      error_plain, error: norms of W - Q by quantization alone and of W - (Q + s * B @ A), over all weights so far.
    """

    def __init__(self, rank: int, alpha: float, iterations: int, quantized: dict[str, Any]) -> None:
        self.rank, self.alpha, self.iterations = rank, float(alpha), iterations
        self._quantized = quantized
        self.linears: dict[str, LinearAdapter] = {}
        self._squares = np.zeros(2)

    @property
    def error_plain(self) -> float:
        return float(np.sqrt(self._squares[0]))

    @property
    def error(self) -> float:
        return float(np.sqrt(self._squares[1]))

    def quantize(self, name: str, weight: np.ndarray) -> tuple[NF4Tensor, bool]:
        """The weight `[out, in]` in 4 bits, and whether all its values are finite.

        Raises:
          UserError: the weight has fewer rows or columns than the rank.
        """
        if min(weight.shape) < self.rank:
            raise UserError(
                f"--loftq-rank {self.rank}, but {name!r} is {weight.shape[0]} x {weight.shape[1]}",
                why="a product of that rank is the whole matrix",
                fix=f"--loftq-rank {min(weight.shape)} or less",
            )
        w, finite = quantize_rows(weight, **self._quantized)
        if not finite:
            return w, False
        wanted, scaling = weight.astype(w.dtype).astype(np.float32), self.alpha / self.rank
        left = wanted - np.asarray(_decoded(w)).T
        self._squares[0] += np.sum(left**2, dtype=np.float64)
        b, a = factors(left / scaling, self.rank)
        for _ in range(self.iterations - 1):
            w, _ = quantize_rows((wanted - scaling * (b @ a)).astype(w.dtype), **self._quantized)
            left = wanted - np.asarray(_decoded(w)).T
            b, a = factors(left / scaling, self.rank)
        self._squares[1] += np.sum((left - scaling * (b @ a)) ** 2, dtype=np.float64)
        self.linears[name.removesuffix(".weight")] = LinearAdapter(a, b, self.alpha)
        return w, True

    def write(self, folder: Path, place: Path) -> None:
        """Writes the adapter into `folder/adapter`; `folder` holds the base's weights and will lie at `place`."""
        adapter = folder / "adapter"
        adapter.mkdir()
        config = adapter_config(self.linears, self.linears, base_model=str(place.absolute()))
        precision = f"{self._quantized['quant_type']}, blocks of {self._quantized['block_size']}, LoftQ"
        sha256 = sha256_of(sorted(folder.glob("*.safetensors")))
        write_adapter(adapter, self.linears, config, sha256, precision=precision, place=place / "adapter")


def factors(
    matrix: Float[np.ndarray, "out in"], rank: int
) -> tuple[Float[np.ndarray, "out rank"], Float[np.ndarray, "rank in"]]:
    """(B, A) whose product is the best approximation of a matrix by one of that rank (Eckart and Young), float32.

    From the largest eigenvalues of the smaller of M M' and M' M, for only few singular vectors are wanted; each factor
    takes the root of the singular values.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    m = matrix if tall else matrix.T
    size = m.shape[1]
    squares, vectors = scipy.linalg.eigh(m.T @ m, subset_by_index=[size - rank, size - 1])
    roots = np.sqrt(np.sqrt(np.maximum(squares, 1e-30)))
    right = vectors * roots
    left = m @ (vectors / roots)
    b, a = (left, right.T) if tall else (right, left.T)
    return np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32)


_decoded = jax.jit(lambda w: dequantize(w, np.float32))
