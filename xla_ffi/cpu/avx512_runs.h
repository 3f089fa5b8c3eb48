// Decoding runs of kRun bfloat16 weights with AVX-512 (BW): one table lookup for a whole run, no nibble is unpacked.
// Included after weights.h.
#ifndef QLORA_JAX_CPU_AVX512_RUNS_H_
#define QLORA_JAX_CPU_AVX512_RUNS_H_

namespace qlora_jax::QLORA_JAX_ISA {

// The 16 weights that a block can hold, rounded as the product's weights are, as bfloat16, twice over: a lookup reads 5
// bits, and the fifth belongs to the neighbouring code.
struct HalvesTable {
  __m512i values;
};

template <Dtype kWeight>
static inline HalvesTable ScaledHalves(Table codes, float scale) {
  const Vector weights = RoundFirst<kWeight, Dtype::kBfloat16>(Scale(codes, scale));
  return {_mm512_broadcast_i64x4(Bfloat16Halves(weights))};
}

// Position p of a decoded run holds weight 4 * (p % 8) + p / 8 of it: the run's 16 bytes are 8 words of 4 codes, and
// each 128 bits of the result take another code of every word.
static inline __m512i DecodeRun(HalvesTable table, const uint8_t* bytes) {
  const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i shifts =
      _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c, 0, 0,
                       0x0004000400040004, 0x0004000400040004);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), table.values);
}

// 32 bfloat16 values in the order of a decoded run.
static inline __m512i InRunOrder(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2,  //
                                         29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Decodes `blocks` whole blocks of 64, as nearly every weight has them; run after run goes to put(number, weights).
template <Dtype kWeight, class ScaleOf, class Put>
static inline void DecodeBlocksOf64(Table codes, const uint8_t* bytes, int64_t blocks, ScaleOf scale_of, Put put) {
  for (int64_t block = 0; block < blocks; ++block, bytes += kRun) {
    const HalvesTable table = ScaledHalves<kWeight>(codes, scale_of(block));
    put(2 * block, DecodeRun(table, bytes));
    put(2 * block + 1, DecodeRun(table, bytes + kRun / 2));
  }
}

// Decodes weights [in, in + count) of a row; run after run goes to put(number, weights).
template <Dtype kWeight, class Put>
static inline void DecodeRow(const Nf4Weight& w, Table codes, int64_t out, int64_t in, int64_t count, Put put) {
  const int64_t first = out * w.in_features + in;
  const uint8_t* bytes = w.packed + first / 2;
  if (w.block_shift == 6 && ((first | count) & 63) == 0) {
    const int64_t block = first >> 6, blocks = count >> 6;
    if (w.scale_codes == nullptr) {
      const float* scales = w.scales + block;
      return DecodeBlocksOf64<kWeight>(codes, bytes, blocks, [=](int64_t i) { return scales[i]; }, put);
    }
    const int64_t global_block = GlobalBlock(w, block, out, in);
    const int64_t group = global_block >> kGroupShift;
    if (((global_block + blocks - 1) >> kGroupShift) == group) {
      const uint8_t* scale_codes = w.scale_codes + block;
      const float group_scale = w.group_scales[group], offset = w.offset;
      const auto scale_of = [=](int64_t i) {
        return AddRounded(MultiplyRounded(kDynamicMap.value[scale_codes[i]], group_scale), offset);
      };
      return DecodeBlocksOf64<kWeight>(codes, bytes, blocks, scale_of, put);
    }
  }
  const int64_t block_mask = (int64_t{1} << w.block_shift) - 1;
  HalvesTable table = {};
  for (int64_t i = 0; i < count; i += kRun) {
    if (i == 0 || ((first + i) & block_mask) == 0) {
      table = ScaledHalves<kWeight>(codes, BlockScale(w, kDynamicMap.value, out, in + i));
    }
    put(i / kRun, DecodeRun(table, bytes + i / 2));
  }
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AVX512_RUNS_H_
