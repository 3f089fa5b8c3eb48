// AMX with BF16: bfloat16 activations are multiplied in tiles, whatever tiles do not take as AVX-512 does it.
#define QLORA_JAX_ISA amx

#include "problem.h"
#include "tile_config.h"

#include "avx512_vectors.h"

#include "amx_instructions.h"

#include "amx_tiles.h"

#include "amx_attention.h"
#include "amx_outer_product.h"

namespace qlora_jax {

const InstructionSet& Amx() {
  static constexpr InstructionSet set = {"amx",
                                         [](const Problem& problem) -> const Method& {
                                           return amx::Tiles::Takes(problem) ? amx::Tiles::kMethod
                                                                             : Avx512().choose(problem);
                                         },
                                         &amx::Attention::kKernels, &amx::OuterProduct::kKernels};
  return set;
}

}  // namespace qlora_jax
