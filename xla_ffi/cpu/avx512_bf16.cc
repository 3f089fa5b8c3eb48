// AVX-512 with BF16: bfloat16 activations are multiplied in pairs, two products a lane and instruction.
#define QLORA_JAX_ISA avx512_bf16

#include "problem.h"

#include "avx512_vectors.h"

#include "panels.h"

namespace qlora_jax {
namespace avx512_bf16 {

// vdpbf16ps: exact products of bfloat16 pairs, added to a float32 sum with rounding to nearest; subnormal inputs and
// results count as 0.
struct Bfloat16Pairs {
  static constexpr int kElements = 2;

  static inline Vector Accumulate(Vector sum, Vector weights, Vector x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
  }

  template <Dtype kActivation>
  static inline void Put(float* panel, int64_t element, int64_t lane, Vector first, Vector second) {
    // Rounds both to bfloat16, `first` in the lower 16 words, and interleaves them.
    const __m512i halves = Bfloat16Halves(first, second);
    const __m512i order = _mm512_or_si512(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
    const __m512i pairs = _mm512_permutexvar_epi16(order, halves);
    Store(panel + element / 2 * kPanelWidth + lane, _mm512_castsi512_ps(pairs));
  }

  static inline void PutOne(float* panel, int64_t element, int64_t lane, float weight) {
    const uint16_t bits = Bfloat16Bits(weight);
    float* pair = panel + element / 2 * kPanelWidth + lane;
    __builtin_memcpy(reinterpret_cast<char*>(pair) + element % 2 * sizeof bits, &bits, sizeof bits);
  }
};

}  // namespace avx512_bf16

const InstructionSet& Avx512Bf16() {
  static constexpr InstructionSet set = {"avx512_bf16", [](const Problem&) -> const Method& {
    return avx512_bf16::Panels<avx512_bf16::Bfloat16Pairs>::kMethod;
  }};
  return set;
}

}  // namespace qlora_jax
