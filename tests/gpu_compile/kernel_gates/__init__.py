"""What the compiled CUDA kernels look like without a GPU: SASS, counts, limits, predicted times."""

import sys
from pathlib import Path

# The toolchain room of the PTX tests.
sys.path.append(str(Path(__file__).parents[2] / "ptx"))
