// AVX2 with FMA and F16C: float32 multiply-adds, 8 lanes.
#define QLORA_JAX_ISA avx2

#include "problem.h"

#include <immintrin.h>

namespace qlora_jax::avx2 {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;

using Vector = __m256;
using Indices = __m256i;
struct Table {
  Vector low, high;
};

static inline Vector Zero() { return _mm256_setzero_ps(); }
static inline Vector Load(const float* source) { return _mm256_loadu_ps(source); }
static inline void Store(float* target, Vector value) { _mm256_storeu_ps(target, value); }
static inline Vector Broadcast(const uint32_t* word) {
  return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*word)));
}
static inline Vector Add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
static inline Vector Multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
static inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

// bfloat16 bits in the upper halves; lower halves are 0.
static inline __m256i Bfloat16InUpperHalves(Vector value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
  return _mm256_and_si256(result, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}

static inline __m128i Bfloat16Halves(Vector value) {
  const __m256i words = _mm256_srli_epi32(Bfloat16InUpperHalves(value), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static inline __m128i Float16Halves(Vector value) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <Dtype kDtype>
static inline Vector Round(Vector value) {
  if constexpr (kDtype == Dtype::kBfloat16) return _mm256_castsi256_ps(Bfloat16InUpperHalves(value));
  if constexpr (kDtype == Dtype::kFloat16) return _mm256_cvtph_ps(Float16Halves(value));
  return value;
}

template <Dtype kDtype>
static inline Vector LoadAs(const void* source) {
  if constexpr (kDtype == Dtype::kFloat32) return Load(static_cast<const float*>(source));
  const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(source));
  if constexpr (kDtype == Dtype::kFloat16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <Dtype kDtype>
static inline void StoreAs(void* target, Vector value) {
  if constexpr (kDtype == Dtype::kFloat32) return Store(static_cast<float*>(target), value);
  const __m128i halves = kDtype == Dtype::kFloat16 ? Float16Halves(value) : Bfloat16Halves(value);
  _mm_storeu_si128(static_cast<__m128i*>(target), halves);
}

static inline Table LoadTable(const float* values) { return {Load(values), Load(values + kLanes)}; }
static inline Table Scale(Table table, float factor) {
  const Vector factors = _mm256_set1_ps(factor);
  return {_mm256_mul_ps(table.low, factors), _mm256_mul_ps(table.high, factors)};
}
static inline Vector Lookup(Table table, Indices indices) {
  // The permutations read the low 3 bits of an index; bit 3, moved to the sign, chooses the half of the table.
  const Vector low = _mm256_permutevar8x32_ps(table.low, indices);
  const Vector high = _mm256_permutevar8x32_ps(table.high, indices);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
}
static inline Indices ShiftRight(Indices indices, int bits) { return _mm256_srli_epi32(indices, bits); }

static inline Indices RowCodes(const uint8_t* bytes) {
  int word;
  __builtin_memcpy(&word, bytes, sizeof word);
  return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4));
}

static inline void ColumnCodes(const uint8_t* const rows[kLanes], Indices columns[4]) {
  // quads[i]: 16 bytes of rows i and 4 + i; then a transposition of 4 x 4 words in each 128 bits.
  __m256i quads[4];
  for (int i = 0; i < 4; ++i) {
    const auto bytes = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row + i])); };
    quads[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes(0)), bytes(4), 1);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(quads[0], quads[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(quads[2], quads[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(quads[0], quads[1]);
  const __m256i high23 = _mm256_unpackhi_epi32(quads[2], quads[3]);
  columns[0] = _mm256_unpacklo_epi64(low01, low23);
  columns[1] = _mm256_unpackhi_epi64(low01, low23);
  columns[2] = _mm256_unpacklo_epi64(high01, high23);
  columns[3] = _mm256_unpackhi_epi64(high01, high23);
}

}  // namespace qlora_jax::avx2

#include "panels.h"

namespace qlora_jax {

const InstructionSet& Avx2() {
  static constexpr InstructionSet set = {"avx2", [](const Problem&) -> const Method& {
    return avx2::Panels<avx2::Float32Steps>::kMethod;
  }};
  return set;
}

}  // namespace qlora_jax
