// What the handlers hand to the kernels of one instruction set: plain data, no standard library.
//
// Standard containers and functions stay out of the files that are compiled for one instruction set: the linker keeps
// one copy of an inline function, and that copy could hold instructions that the machine lacks.
#ifndef QLORA_JAX_CPU_PROBLEM_H_
#define QLORA_JAX_CPU_PROBLEM_H_

#include <cstdint>

#include "../nf4.h"

namespace qlora_jax {

// Output features of one panel of dequantized weights, and reduction steps of one chunk: 32 KiB of float32, which
// stays in the first-level cache beside the activations of one register tile.
constexpr int kPanelWidth = 64;
constexpr int kChunkSteps = 128;

// y = x @ w (forward) or y = x @ w^T (the gradient of the input); y is [rows, outputs], x is [rows, reduction].
struct Problem {
  bool input_gradient;
  const void* x;
  void* y;
  Dtype dtype;  // of x and y
  int64_t rows;
  int64_t reduction;
  int64_t outputs;
  Nf4Weight weight;
  Dtype weight_dtype;  // weights are rounded to it, then to `dtype`
};

// Rows [row_begin, row_end) of one panel of outputs.
struct Tile {
  int64_t panel;
  int64_t row_begin;
  int64_t row_end;
};

// The kernels of one instruction set.
//
// Activations are packed once per call, as 32-bit words [chunk][row][kChunkSteps]: a word is what one multiply-add
// step takes, one float32 or a pair of bfloat16. Chunks depend on the reduction alone, so a result's bits depend
// neither on the tiles nor on the threads.
struct InstructionSet {
  const char* name;
  // Reduction elements of one step: 1, or 2 where pairs are multiplied.
  int (*elements_per_step)(Dtype dtype);
  void (*pack_rows)(const Problem& problem, int64_t row_begin, int64_t row_end, uint32_t* packed);
  // `panel` holds kChunkSteps * kPanelWidth floats, `sums` (row_end - row_begin) * kPanelWidth, both 64-byte aligned.
  void (*multiply)(const Problem& problem, const uint32_t* packed, const Tile& tile, float* panel, float* sums);
};

const InstructionSet& Portable();
#ifdef QLORA_JAX_X86
const InstructionSet& Avx2();
const InstructionSet& Avx512();
const InstructionSet& Avx512Bf16();
#endif

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_PROBLEM_H_
