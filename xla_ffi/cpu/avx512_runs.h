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

// Tables of two scales: the conversion takes two vectors in the time of one.
template <Dtype kWeight>
static inline void ScaledHalves(Table codes, float first_scale, float second_scale, HalvesTable tables[2]) {
  const Vector first = RoundFirst<kWeight, Dtype::kBfloat16>(Scale(codes, first_scale));
  const Vector second = RoundFirst<kWeight, Dtype::kBfloat16>(Scale(codes, second_scale));
  const __m512i both = Bfloat16Halves(first, second);
  tables[0] = {_mm512_shuffle_i64x2(both, both, 0x44)};
  tables[1] = {_mm512_shuffle_i64x2(both, both, 0xee)};
}

// The 16 bytes of a run, in each 128 bits.
static inline __m512i RunWords(const uint8_t* bytes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Position p of a decoded run holds weight 4 * (p % 8) + p / 8 of it: the run's 16 bytes are 8 words of 4 codes, and
// each 128 bits of the result take another code of every word.
static inline __m512i DecodeRun(HalvesTable table, const uint8_t* bytes) {
  const __m512i shifts =
      _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c, 0, 0,
                       0x0004000400040004, 0x0004000400040004);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(RunWords(bytes), shifts), table.values);
}

// The same by other means. On Intel's cores the permutation takes both ports of 512-bit operations, the shift one of
// them and this selection of bits the other: runs decoded in turns keep both busy.
static inline __m512i DecodeRunInTurn(HalvesTable table, const uint8_t* bytes) {
#ifdef __AVX512VBMI__
  const __m512i first_bits =
      _mm512_set_epi64(0x0038002800180008, 0x0038002800180008, 0x003c002c001c000c, 0x003c002c001c000c,
                       0x0030002000100000, 0x0030002000100000, 0x0034002400140004, 0x0034002400140004);
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(first_bits, RunWords(bytes)), table.values);
#else
  return DecodeRun(table, bytes);
#endif
}

// 32 bfloat16 values in the order of a decoded run.
static inline __m512i InRunOrder(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2,  //
                                         29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Weights [out, out + rows) x [in, in + columns).
struct Rectangle {
  int64_t out, rows;
  int64_t in, columns;
};

// A table serves 64 columns, as nearly every weight has its blocks. 16 of them get their scales at once.
constexpr int64_t kTableColumns = 64;
constexpr int64_t kScaleSpan = 16 * kTableColumns;

static inline bool HasWholeTables(const Nf4Weight& w, const Rectangle& r) {
  return w.block_shift >= 6 && ((w.in_features | r.in | r.columns) & (kTableColumns - 1)) == 0;
}

// Scales of the tables of a rectangle that has whole ones, of at most kScaleSpan columns; rows `stride` apart.
static inline void DecodeScales(const Nf4Weight& w, const Rectangle& r, int64_t stride, float* scales) {
  const int64_t tables = r.columns / kTableColumns;
  for (int64_t out = r.out; out < r.out + r.rows; ++out, scales += stride) {
    const int64_t block = (out * w.in_features + r.in) >> w.block_shift;
    const int64_t global_block = GlobalBlock(w, block, out, r.in), group = global_block >> kGroupShift;
    if (w.scale_codes == nullptr || w.block_shift != 6 || (global_block + tables - 1) >> kGroupShift != group) {
      for (int64_t i = 0; i < tables; ++i) {
        scales[i] = BlockScale(w, kDynamicMap.value, out, r.in + i * kTableColumns);
      }
      continue;
    }
    const uint8_t* codes = w.scale_codes + block;
    const float group_scale = w.group_scales[group], offset = w.offset;
    if (tables == 16) {
      const __m512i indices = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const Vector entries = _mm512_i32gather_ps(indices, kDynamicMap.value, sizeof(float));
      Store(scales, Add(Multiply(entries, _mm512_set1_ps(group_scale)), _mm512_set1_ps(offset)));
      continue;
    }
    for (int64_t i = 0; i < tables; ++i) {
      scales[i] = AddRounded(MultiplyRounded(kDynamicMap.value[codes[i]], group_scale), offset);
    }
  }
}

// A row of so many is decoded without a loop.
constexpr int64_t kWideColumns = 256;

// Decodes 64 * kTables weights from `bytes` on; run after run goes to put(number, weights).
template <Dtype kWeight, int kTables, class Put>
static inline void DecodeTables(Table codes, const float* scales, const uint8_t* bytes, int64_t run, Put put) {
  HalvesTable tables[kTables + 1];
  for (int i = 0; i < kTables; i += 2) {
    ScaledHalves<kWeight>(codes, scales[i], scales[i + 1 < kTables ? i + 1 : i], tables + i);
  }
  for (int i = 0; i < kTables; ++i, run += 2, bytes += kRun) {
    put(run, DecodeRunInTurn(tables[i], bytes));
    put(run + 1, DecodeRun(tables[i], bytes + kRun / 2));
  }
}

// Decodes weights [in, in + count) of a row; run after run goes to put(number, weights). `scales`: those of its tables,
// or null where it has no whole ones.
template <Dtype kWeight, class Put>
static inline void DecodeRow(const Nf4Weight& w, Table codes, const float* scales, int64_t out, int64_t in,
                             int64_t count, Put put) {
  const int64_t first = out * w.in_features + in;
  const uint8_t* bytes = w.packed + first / 2;
  if (scales != nullptr) {
    if (count == kWideColumns) return DecodeTables<kWeight, kWideColumns / kTableColumns>(codes, scales, bytes, 0, put);
    for (int64_t i = 0; i < count / kTableColumns; ++i) {
      DecodeTables<kWeight, 1>(codes, scales + i, bytes + i * kRun, 2 * i, put);
    }
    return;
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
