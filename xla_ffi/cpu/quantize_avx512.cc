// AVX-512 (F, BW, DQ, VL): vectors of 16 lanes.
#define QLORA_JAX_ISA quantize_avx512
#define QLORA_JAX_PICKS

#include "quantize.h"

#include <immintrin.h>

namespace qlora_jax::quantize_avx512 {

constexpr int kLanes = 16;
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

static inline void PackCodes(Words codes, uint8_t* packed) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64((__m512i)codes, 4), _mm512_srli_epi64((__m512i)codes, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pairs));
}

static inline __m512 Pick(const float* table, Words indices) {
  const __m512 twice = _mm512_broadcast_f32x8(_mm256_load_ps(table));  // indices have 4 bits here
  return _mm512_permutexvar_ps((__m512i)indices, twice);
}

}  // namespace qlora_jax::quantize_avx512

#include "quantize_kernels.h"

namespace qlora_jax {

const QuantizeKernels& QuantizeAvx512() {
  static constexpr QuantizeKernels kernels = quantize_avx512::NamedQuantize("avx512");
  return kernels;
}

}  // namespace qlora_jax
