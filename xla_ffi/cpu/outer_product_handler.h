#ifndef QLORA_JAX_CPU_OUTER_PRODUCT_HANDLER_H_
#define QLORA_JAX_CPU_OUTER_PRODUCT_HANDLER_H_

#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

// XLA FFI handler, for machines whose instruction set has it (see InstructionSet):
//   narrow bfloat16 [tokens, rank], wide bfloat16 [tokens, features]  ->  float32 narrow^T @ wide [rank, features], or,
//   where the result has features first, its transposition. Attribute: features_first int64, 0 or 1.
extern "C" XLA_FFI_Error* OuterProduct(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_OUTER_PRODUCT_HANDLER_H_
