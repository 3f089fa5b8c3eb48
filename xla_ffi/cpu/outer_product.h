// Products of the transposed first matrix with a narrow second one: gradients of adapters.
#ifndef QLORA_JAX_CPU_OUTER_PRODUCT_H_
#define QLORA_JAX_CPU_OUTER_PRODUCT_H_

#include <cstdint>

namespace qlora_jax {

// sums = narrow^T @ wide [rank, features], or its transposition [features, rank]; bfloat16, summed in float32.
struct OuterProductProblem {
  int64_t tokens, rank, features;
  const uint16_t* narrow;  // [tokens, rank]
  const uint16_t* wide;    // [tokens, features]
  float* sums;
  bool features_first;
};

// `packed` (of narrow, shared by all tasks) and `workspace` are aligned to 64 bytes.
struct OuterProductKernels {
  int64_t (*packed_bytes)(const OuterProductProblem& problem);
  int64_t (*workspace_bytes)(const OuterProductProblem& problem);
  void (*pack)(const OuterProductProblem& problem, void* packed);
  void (*multiply)(const OuterProductProblem& problem, int64_t feature, const void* packed, void* workspace);
  int64_t feature_step;  // features of a task
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_OUTER_PRODUCT_H_
