// Causal attention as one kernel: what its handler hands to the kernels of one instruction set.
#ifndef QLORA_JAX_CPU_ATTENTION_H_
#define QLORA_JAX_CPU_ATTENTION_H_

#include <cstdint>

namespace qlora_jax {

// Tokens see themselves and earlier ones; query heads that share a key/value head lie together. All tensors but the mask
// and the normalizers are bfloat16.
struct AttentionProblem {
  int64_t batch, seq, heads, kv_heads, head_dim;
  float scale;               // of the scores
  const uint16_t* query;     // [batch, seq, heads, head_dim]
  const uint16_t* key;       // [batch, seq, kv_heads, head_dim]
  const uint16_t* value;
  const uint8_t* mask;       // [batch, seq, seq], 1 where a query sees a key, or null: everything up to itself
  float* normalizer;         // [batch, heads, seq]: log of the sum of a query's exp(scores)
  uint16_t* y;               // [batch, seq, heads, head_dim]; of the forward pass, as the rest is of the backward pass
  const uint16_t* dy;
  uint16_t *d_query, *d_key, *d_value;
};

// A task of the forward pass: some queries of the heads that share one key/value head; of the backward pass: all of
// them, as their gradients of keys and values are summed. `workspace` is aligned to 64 bytes.
struct AttentionKernels {
  int64_t (*forward_bytes)(const AttentionProblem& problem);
  int64_t (*backward_bytes)(const AttentionProblem& problem);
  void (*forward)(const AttentionProblem& problem, int64_t kv_head, int64_t begin, int64_t end, void* workspace);
  void (*backward)(const AttentionProblem& problem, int64_t kv_head, void* workspace);
  int64_t query_step;  // `begin` is a multiple of it, and so is `end` unless it is the end of the sequence
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_ATTENTION_H_
