// AVX2: vectors of 8 lanes.
#define QLORA_JAX_ISA quantize_avx2
#define QLORA_JAX_PICKS

#include "quantize.h"

#include <immintrin.h>

namespace qlora_jax::quantize_avx2 {

constexpr int kLanes = 8;
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

static inline void PackCodes(Words codes, uint8_t* packed) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64((__m256i)codes, 4), _mm256_srli_epi64((__m256i)codes, 32));
  // The lowest bytes of the four 64-bit lanes; bytes 0 and 8 of each half come first.
  const __m256i bytes = _mm256_shuffle_epi8(pairs, _mm256_set1_epi64x(0x0800));
  const int low = _mm256_extract_epi16(bytes, 0), high = _mm256_extract_epi16(bytes, 8);
  const uint32_t word = static_cast<uint32_t>(low | high << 16);
  __builtin_memcpy(packed, &word, sizeof word);
}

static inline __m256 Pick(const float* table, Words indices) {
  return _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)indices);
}

}  // namespace qlora_jax::quantize_avx2

#include "quantize_kernels.h"

namespace qlora_jax {

const QuantizeKernels& QuantizeAvx2() {
  static constexpr QuantizeKernels kernels = quantize_avx2::NamedQuantize("avx2");
  return kernels;
}

}  // namespace qlora_jax
