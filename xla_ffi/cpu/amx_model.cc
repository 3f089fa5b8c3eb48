// The kernels of amx.cc over a model of the tile instructions: for tests on machines that have AVX-512 but no AMX.
#define QLORA_JAX_ISA amx_model

#include "problem.h"
#include "tile_config.h"

#include "avx512_vectors.h"

#include "amx_model.h"

#include "amx_tiles.h"

#include "amx_attention.h"
#include "amx_outer_product.h"

namespace qlora_jax {

const InstructionSet& AmxModel() {
  static constexpr InstructionSet set = {"amx_model",
                                         [](const Problem& problem) -> const Method& {
                                           return amx_model::Tiles::Takes(problem) ? amx_model::Tiles::kMethod
                                                                             : Avx512().choose(problem);
                                         },
                                         &amx_model::Attention::kKernels, &amx_model::OuterProduct::kKernels};
  return set;
}

}  // namespace qlora_jax
