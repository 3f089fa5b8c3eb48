#ifndef QLORA_JAX_CPU_ATTENTION_HANDLER_H_
#define QLORA_JAX_CPU_ATTENTION_HANDLER_H_

#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

// XLA FFI handlers of causal attention, for machines whose instruction set has it (see InstructionSet). Operands:
//   query bfloat16 [batch, seq, heads, head_dim];  key, value bfloat16 [batch, seq, kv_heads, head_dim];
//   mask bool [batch, seq, seq], or [0]: everything up to itself is seen
//     ->  y as query, normalizer float32 [batch, heads, seq];
// and of the backward pass, after them, normalizer and dy as query  ->  the gradients of query, key and value.
// Attribute: scale float32, of the scores.
extern "C" XLA_FFI_Error* CausalAttention(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* CausalAttentionGradients(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_ATTENTION_HANDLER_H_
