#include "quantize_weight.h"

#include <algorithm>
#include <memory>
#include <new>

#include "dispatch.h"

namespace qlora_jax {
namespace {

// Every instruction set beyond AVX2 has the AVX-512 that quantization needs.
const QuantizeKernels& BestQuantizeKernels() {
#ifdef QLORA_JAX_X86
  const std::string best = BestInstructionSet().name;
  if (best == "avx2") return QuantizeAvx2();
  if (best != "portable") return QuantizeAvx512();
#endif
  return QuantizePortable();
}

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole blocks, bytes and groups.
constexpr int64_t kTaskElements = int64_t{1} << 18;
constexpr int64_t kTaskScales = int64_t{1} << 14;
// Of an input-major weight: what a row of them takes is whole cache lines.
constexpr int64_t kTaskColumns = 32;

void EncodeConsecutive(const QuantizeKernels& kernels, const QuantizeProblem& p, const Parallel& parallel) {
  parallel(CeilDivide(p.size(), kTaskElements), [&](int64_t task) {
    const int64_t first = task * kTaskElements;
    kernels.encode(p.encoding, p.kind, static_cast<const char*>(p.elements) + first * BytesOf(p.kind),
                   std::min(kTaskElements, p.size() - first), p.block_shift, p.packed + first / 2,
                   p.absmax + (first >> p.block_shift));
  });
}

void EncodeInputMajor(const QuantizeKernels& kernels, const QuantizeProblem& p, const Parallel& parallel) {
  parallel(CeilDivide(p.out_features, kTaskColumns), [&](int64_t task) {
    const int64_t first = task * kTaskColumns;
    const int64_t element = first * p.in_features;
    kernels.encode_columns(p.encoding, p.kind, static_cast<const char*>(p.elements) + first * BytesOf(p.kind),
                           p.out_features, p.in_features, std::min(kTaskColumns, p.out_features - first),
                           p.block_shift, p.packed + element / 2, p.absmax + (element >> p.block_shift));
  });
}

}  // namespace

void QuantizeWeight(const QuantizeProblem& p, const Parallel& parallel) {
  const QuantizeKernels& kernels = BestQuantizeKernels();
  if (p.size() == 0) return;
  if (p.input_major) {
    EncodeInputMajor(kernels, p, parallel);
  } else {
    EncodeConsecutive(kernels, p, parallel);
  }
  if (p.scale_codes == nullptr) return;
  const int64_t blocks = p.blocks();
  const std::unique_ptr<float[]> sums(new float[(blocks + 1) / 2]);
  const float offset = kernels.mean(p.absmax, blocks, sums.get());
  parallel(CeilDivide(blocks, kTaskScales), [&](int64_t task) {
    const int64_t first = task * kTaskScales;
    kernels.encode_scales(p.absmax + first, std::min(kTaskScales, blocks - first), offset, p.scale_codes + first,
                          p.group_scales + (first >> kGroupShift));
  });
  *p.offset = offset;
}

std::string MakeEncoding(const float* thresholds, int64_t num_thresholds, const uint8_t* codes, int64_t num_codes,
                         Encoding* encoding) {
  *encoding = {};
  encoding->by_magnitude = num_thresholds == 7;
  if ((num_thresholds != 7 && num_thresholds != 15) || num_codes != num_thresholds + 1) {
    return "7 thresholds and 8 codes or 15 and 16 are needed, got " + std::to_string(num_thresholds) + " and " +
           std::to_string(num_codes);
  }
  for (int64_t i = 0; i < num_codes; ++i) {
    if (encoding->by_magnitude ? codes[i] > 7 : codes[i] != i) {
      return "code " + std::to_string(i) + " of " + std::to_string(num_codes) + " is " + std::to_string(codes[i]);
    }
  }
  std::copy_n(thresholds, num_thresholds, encoding->thresholds);
  std::copy_n(codes, num_codes, encoding->codes);
  return "";
}

int BlockShift(int64_t block_size) {
  for (int shift = kMinBlockShift; shift <= kMaxBlockShift; ++shift) {
    if (block_size == int64_t{1} << shift) return shift;
  }
  return -1;
}

}  // namespace qlora_jax
