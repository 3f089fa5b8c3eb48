"""What a frozen leaf is called in an NNX model, so that filters tell it from what is trained.

| leaf | variable | trained |
|---|---|---|
| 4-bit weight | NF4Param, holds an NF4Tensor | never |
| dense array of a base model: bias, norm, embedding, 16-bit kernel | FrozenParam | never |
| adapter | nnx.LoRAParam, float32 | yes |

Neither frozen kind is an `nnx.Param`: `wrt=nnx.Param` then never reaches integer leaves.
"""

from flax import nnx


class NF4Param(nnx.Variable):
    """A frozen 4-bit weight; `get_value()` is an NF4Tensor."""


class FrozenParam(nnx.Variable):
    """A frozen dense array of a base model."""
