// Vector operations of AVX-512 (F, BW, DQ, VL), for the instruction sets built on it.
// The includer has defined QLORA_JAX_ISA and included problem.h; weights.h says what is defined here.

#include <immintrin.h>

namespace qlora_jax::QLORA_JAX_ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;

using Vector = __m512;
using Indices = __m512i;
using Table = __m512;

static inline Vector Zero() { return _mm512_setzero_ps(); }
static inline Vector Load(const float* source) { return _mm512_loadu_ps(source); }
static inline void Store(float* target, Vector value) { _mm512_storeu_ps(target, value); }
static inline Vector Broadcast(const uint32_t* word) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*word)));
}
static inline Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
static inline Vector Multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
static inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

// bfloat16 bits in the upper halves; lower halves are 0.
static inline __m512i Bfloat16InUpperHalves(Vector value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(result, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

static inline __m256i Bfloat16Halves(Vector value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(Bfloat16InUpperHalves(value), 16));
#endif
}

// The first in the lower 16 words.
static inline __m512i Bfloat16Halves(Vector first, Vector second) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(Bfloat16Halves(first)), Bfloat16Halves(second), 1);
#endif
}

static inline __m256i Float16Halves(Vector value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <Dtype kDtype>
static inline Vector Round(Vector value) {
  if constexpr (kDtype == Dtype::kBfloat16) return _mm512_castsi512_ps(Bfloat16InUpperHalves(value));
  if constexpr (kDtype == Dtype::kFloat16) return _mm512_cvtph_ps(Float16Halves(value));
  return value;
}

template <Dtype kDtype>
static inline Vector LoadAs(const void* source) {
  if constexpr (kDtype == Dtype::kFloat32) return Load(static_cast<const float*>(source));
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(source));
  if constexpr (kDtype == Dtype::kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <Dtype kDtype>
static inline void StoreAs(void* target, Vector value) {
  if constexpr (kDtype == Dtype::kFloat32) return Store(static_cast<float*>(target), value);
  const __m256i halves = kDtype == Dtype::kFloat16 ? Float16Halves(value) : Bfloat16Halves(value);
  _mm256_storeu_si256(static_cast<__m256i*>(target), halves);
}

static inline Table LoadTable(const float* values) { return _mm512_loadu_ps(values); }
static inline Table Scale(Table table, float factor) { return _mm512_mul_ps(table, _mm512_set1_ps(factor)); }
// The permutation reads the low 4 bits of an index alone.
static inline Vector Lookup(Table table, Indices indices) { return _mm512_permutexvar_ps(indices, table); }
static inline Indices ShiftRight(Indices indices, int bits) {
  return _mm512_srli_epi32(indices, static_cast<unsigned>(bits));
}

static inline Indices RowCodes(const uint8_t* bytes) {
  int words[2];
  __builtin_memcpy(words, bytes, sizeof words);
  const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
  return _mm512_srlv_epi32(both,
                           _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4));
}

static inline void ColumnCodes(const uint8_t* const rows[kLanes], Indices columns[4]) {
  // quads[i]: 16 bytes of rows i, 4 + i, 8 + i, 12 + i; then a transposition of 4 x 4 words in each 128 bits.
  __m512i quads[4];
  for (int i = 0; i < 4; ++i) {
    const auto bytes = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row + i])); };
    quads[i] = _mm512_inserti32x4(_mm512_castsi128_si512(bytes(0)), bytes(4), 1);
    quads[i] = _mm512_inserti32x4(_mm512_inserti32x4(quads[i], bytes(8), 2), bytes(12), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quads[0], quads[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quads[2], quads[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(quads[0], quads[1]);
  const __m512i high23 = _mm512_unpackhi_epi32(quads[2], quads[3]);
  columns[0] = _mm512_unpacklo_epi64(low01, low23);
  columns[1] = _mm512_unpackhi_epi64(low01, low23);
  columns[2] = _mm512_unpacklo_epi64(high01, high23);
  columns[3] = _mm512_unpackhi_epi64(high01, high23);
}

}  // namespace qlora_jax::QLORA_JAX_ISA
