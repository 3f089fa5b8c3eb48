"""What a frozen leaf is called in an NNX model, so that filters tell it from what is trained.

| leaf | variable | trained |
|---|---|---|
| 4-bit weight | NF4Param, holds an NF4Tensor | never |
| dense array of a base model: bias, norm, embedding, 16-bit kernel | FrozenParam | never |
| dense array that came with an adapter in the base's place | ReplacedParam | never |
| adapter | nnx.LoRAParam, float32 | yes |

No frozen kind is an `nnx.Param`: `wrt=nnx.Param` then never reaches integer leaves.
"""

from flax import nnx


class NF4Param(nnx.Variable):
    """A frozen 4-bit weight; `get_value()` is an NF4Tensor."""


class FrozenParam(nnx.Variable):
    """A frozen dense array of a base model."""


class ReplacedParam(FrozenParam):
    """A frozen dense array that an adapter brought in place of the base's own (PEFT's modules_to_save), and that goes
    with the adapter where it is saved.
    """
