// Blockwise quantization: what its callers hand to the kernels of one instruction set. Plain data, no standard library,
// for the reason that problem.h gives.
#ifndef QLORA_JAX_CPU_QUANTIZE_H_
#define QLORA_JAX_CPU_QUANTIZE_H_

#include <cstdint>

#include "../nf4.h"

namespace qlora_jax {

// A 4-bit type, as codebook.py defines it. A weight divided by its block's scale takes codes[i] where i thresholds lie
// strictly below it; `by_magnitude`: below its magnitude, and bit 3 is set where it is negative.
struct Encoding {
  bool by_magnitude;
  float thresholds[15];  // ascending; the first 7 where by_magnitude
  uint8_t codes[16];     // 0..15 where not by_magnitude
};

// How elements are stored; kRounded: as float32, each rounded to bfloat16 when it is read. The others as in Dtype.
enum class Elements : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kRounded = 3 };

static constexpr int64_t BytesOf(Elements elements) {
  return elements == Elements::kFloat32 || elements == Elements::kRounded ? 4 : 2;
}

// Blocks hold 32 to 4096 weights.
constexpr int kMinBlockShift = 5;
constexpr int kMaxBlockShift = 12;

// The kernels of one instruction set. They compute as XLA's CPU backend does, which counts subnormal numbers as 0.
// Elements need not be aligned.
struct QuantizeKernels {
  const char* name;
  // Encodes `count` consecutive elements, from the start of a block and of a byte on: a scale for each block begun, two
  // codes a byte begun. What a block or byte lacks counts as 0.
  void (*encode)(const Encoding& encoding, Elements kind, const void* elements, int64_t count, int block_shift,
                 uint8_t* packed, float* absmax);
  // Encodes `columns` columns of a matrix, from its first row on, each as `encode` does: the results of one column after
  // those of the other. `rows` are whole blocks; `stride` elements lie between rows.
  void (*encode_columns)(const Encoding& encoding, Elements kind, const void* elements, int64_t stride, int64_t rows,
                         int64_t columns, int block_shift, uint8_t* packed, float* absmax);
  // Encodes block scales, less `offset`, from the start of a group on: a byte each and a scale for each group begun.
  void (*encode_scales)(const float* absmax, int64_t count, float offset, uint8_t* codes, float* group_scales);
  // Mean by a tree of sums, whose order blockwise.py has too; `sums` holds (count + 1) / 2 floats.
  float (*mean)(const float* values, int64_t count, float* sums);
};

const QuantizeKernels& QuantizePortable();
#ifdef QLORA_JAX_X86
const QuantizeKernels& QuantizeAvx2();
const QuantizeKernels& QuantizeAvx512();
#endif

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_QUANTIZE_H_
