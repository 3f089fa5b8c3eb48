#ifndef QLORA_JAX_CPU_DISPATCH_H_
#define QLORA_JAX_CPU_DISPATCH_H_

#include "problem.h"

namespace qlora_jax {

// The best instruction set of this machine, chosen once. The environment variable QLORA_JAX_ISA = portable | avx2 |
// avx512 | avx512_bf16 caps the choice. Throws std::invalid_argument where it holds another word.
const InstructionSet& BestInstructionSet();

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_DISPATCH_H_
