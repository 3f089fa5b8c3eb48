"""Which products are timed, and in which order: what tells most comes first, since time on a GPU is short."""

from dataclasses import dataclass

# (in, out) of the linears of a block: attention, MLP up and gate, MLP down; with grouped queries keys and values too.
LLAMA = {
    "7B": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "65B": ((8192, 8192), (8192, 22016), (22016, 8192)),
    "8B": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "70B": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "13B": ((5120, 5120), (5120, 13824), (13824, 5120)),
}
SMOLLM2 = ((576, 576), (576, 192), (576, 1536), (1536, 576))

# Rows of x in the order in which they are measured: the middle of each range of the dispatch table first.
GPU_ROWS = (16, 2048, 64, 256, 1, 4096, 128, 512, 16384, 8, 1024, 8192)
# Decoding one and sixteen sequences, a short prompt, and a step of the demo (8 rows of 96 tokens).
CPU_ROWS = (1, 16, 128, 768)
QUICK_SHAPES, QUICK_ROWS = ((576, 192),), (1, 128)


@dataclass(frozen=True)
class Size:
    """A product in both directions: x `[rows, in]` and dy `[rows, out]`."""

    in_features: int
    out_features: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @property
    def models(self) -> list[str]:
        """The LLaMA sizes that have such a weight."""
        return [name for name, shapes in LLAMA.items() if self.shape in shapes]


def gpu_shapes() -> tuple[tuple[int, int], ...]:
    """Every linear of LLaMA 7B, 65B, 8B, 70B and 13B once, in that order."""
    return tuple(dict.fromkeys(shape for shapes in LLAMA.values() for shape in shapes))


def cpu_shapes() -> tuple[tuple[int, int], ...]:
    """The linears of SmolLM2-135M, and one of LLaMA 7B."""
    return (*SMOLLM2, (4096, 4096))


def sizes(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> list[Size]:
    """All products; three shapes (a model) at a time with all their numbers of rows, in the order given."""
    return [Size(*shape, m) for first in range(0, len(shapes), 3) for m in rows for shape in shapes[first : first + 3]]
