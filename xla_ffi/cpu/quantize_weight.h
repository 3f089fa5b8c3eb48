// Blockwise quantization of a whole weight, on many threads.
#ifndef QLORA_JAX_CPU_QUANTIZE_WEIGHT_H_
#define QLORA_JAX_CPU_QUANTIZE_WEIGHT_H_

#include <cstdint>
#include <functional>
#include <string>

#include "quantize.h"

namespace qlora_jax {

// One layer, and where its codes and scales go.
struct QuantizeProblem {
  Encoding encoding;
  Elements kind;
  const void* elements;  // [out, in], or [in, out] where input_major, which needs whole blocks in a row of in_features
  bool input_major;
  int64_t in_features;
  int64_t out_features;
  int block_shift;
  uint8_t* packed;       // (size + 1) / 2
  uint8_t* scale_codes;  // one for each block; null: scales are not quantized, and the last two are not written
  float* absmax;         // float32 scales; scratch where scales are quantized
  float* group_scales;
  float* offset;

  int64_t size() const { return in_features * out_features; }
  int64_t blocks() const { return (size() + (int64_t{1} << block_shift) - 1) >> block_shift; }
};

// Calls body(task) for every task in [0, tasks), on whichever threads it has, and returns when all calls have.
using Parallel = std::function<void(int64_t tasks, const std::function<void(int64_t task)>& body)>;

// Throws std::bad_alloc where there is no memory for a sum of the scales.
void QuantizeWeight(const QuantizeProblem& problem, const Parallel& parallel);

// Fills `encoding` and returns an empty string, or says what is wrong: 15 thresholds and codes 0..15, or, by magnitude,
// 7 thresholds and their 8 codes of 3 bits.
std::string MakeEncoding(const float* thresholds, int64_t num_thresholds, const uint8_t* codes, int64_t num_codes,
                         Encoding* encoding);

// log2 of a block size, or -1 where it is not a power of two from 32 to 4096.
int BlockShift(int64_t block_size);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_QUANTIZE_WEIGHT_H_
