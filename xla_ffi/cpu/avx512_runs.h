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

// Decodes the runs of one row one after the other and keeps the table of the block that they lie in.
template <Dtype kWeight>
class RowReader {
 public:
  RowReader(const Nf4Weight& w, int64_t out) : w_(&w), out_(out) {}

  // The run that begins at weight `in` of the row. Reads of one block must follow each other; `first` starts anew.
  inline __m512i Run(Table codes, int64_t in, bool first) {
    const int64_t weight = out_ * w_->in_features + in;
    if (first || (weight & ((int64_t{1} << w_->block_shift) - 1)) == 0) {
      table_ = ScaledHalves<kWeight>(codes, BlockScale(*w_, kDynamicMap.value, out_, in));
    }
    return DecodeRun(table_, w_->packed + weight / 2);
  }

 private:
  const Nf4Weight* w_;
  int64_t out_;
  HalvesTable table_;
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AVX512_RUNS_H_
