// AVX-512: float32 multiply-adds, 16 lanes.
#define QLORA_JAX_ISA avx512

#include "problem.h"

#include "avx512_vectors.h"

#include "panels.h"

namespace qlora_jax {

const InstructionSet& Avx512() {
  static constexpr InstructionSet set = {"avx512", [](const Problem&) -> const Method& {
    return avx512::Panels<avx512::Float32Steps>::kMethod;
  }};
  return set;
}

}  // namespace qlora_jax
