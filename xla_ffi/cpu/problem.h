// What the handlers hand to the kernels of one instruction set: plain data, no standard library.
//
// Standard containers and functions stay out of the files that are compiled for one instruction set: the linker keeps
// one copy of an inline function, and that copy could hold instructions that the machine lacks.
#ifndef QLORA_JAX_CPU_PROBLEM_H_
#define QLORA_JAX_CPU_PROBLEM_H_

#include <cstdint>

#include "../nf4.h"
#include "attention.h"
#include "outer_product.h"

namespace qlora_jax {

// y = x @ w (forward) or y = x @ w^T (the gradient of the input); y is [rows, outputs], x is [rows, reduction].
// An adapter adds u @ v^T to the same sums: u is [rows, rank], v [outputs, rank].
struct Problem {
  bool input_gradient;
  const void* x;
  void* y;
  const void* u;
  const void* v;
  Dtype dtype;  // of x, y, u and v
  int64_t rows;
  int64_t reduction;
  int64_t outputs;
  int64_t rank;  // 0: there is no adapter
  Nf4Weight weight;
  Dtype weight_dtype;  // weights are rounded to it, then to `dtype`
};

// How a problem is cut into tasks that threads share. The cut leaves no trace in the result.
struct Plan {
  int64_t packed_bytes;     // activations in the order in which the kernel takes them
  int64_t pack_tasks;       // that put them there
  int64_t tile_rows;        // rows of x and outputs of one task
  int64_t tile_outputs;
  int64_t tasks;
  int64_t workspace_bytes;  // of one worker
};

// One way to multiply: activations are packed once per call, then tiles of the result are computed. `packed` and
// `workspace` are aligned to 64 bytes.
struct Method {
  Plan (*plan)(const Problem& problem, int64_t threads);
  void (*pack)(const Problem& problem, int64_t task, void* packed);
  void (*multiply)(const Problem& problem, const Plan& plan, int64_t task, const void* packed, void* workspace);
};

// The kernels of one instruction set.
struct InstructionSet {
  const char* name;
  const Method& (*choose)(const Problem& problem);
  // Only of those that compute in tiles.
  const AttentionKernels* attention = nullptr;
  const OuterProductKernels* outer_product = nullptr;
};

const InstructionSet& Portable();
#ifdef QLORA_JAX_X86
const InstructionSet& Avx2();
const InstructionSet& Avx512();
const InstructionSet& Avx512Bf16();
const InstructionSet& AmxModel();
#ifdef QLORA_JAX_AMX
const InstructionSet& Amx();
#endif
#endif

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_PROBLEM_H_
