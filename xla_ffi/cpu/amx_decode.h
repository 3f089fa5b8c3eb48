// Decoding parts of a weight, or of an adapter's v, in the order of tiles.
#ifndef QLORA_JAX_CPU_AMX_DECODE_H_
#define QLORA_JAX_CPU_AMX_DECODE_H_

#include "weights.h"

#include "amx_blocks.h"
#include "avx512_runs.h"
#include "avx512_transpose.h"

namespace qlora_jax::QLORA_JAX_ISA {

// Between rows of decoded weights: without it rows that are a power of two apart would share few lines of a cache.
constexpr int64_t kRowPadding = 64;

// How much a task computes at most, and how many elements of the reduction it decodes at once. What is used again stays
// in a cache: the weights of one block (16 KiB) in the first level; the sums of a task (512 KiB) and its chunk of x
// (256 KiB) in the second. Reading is fast along rows of the stored matrix, where outputs of the gradient lie, so for it
// all outputs of a task are decoded at once.
constexpr int64_t kMaxTaskRows = 512;  // of x
constexpr int64_t kMaxTaskOutputs = 256;
constexpr int64_t kChunk = 256;

// Rows of a weight that a task decodes one after the other, and tables of a row, whose scales it keeps.
constexpr int64_t kScaledRows = kMaxTaskOutputs > kChunk ? kMaxTaskOutputs : kChunk;
constexpr int64_t kTaskScales = kScaleSpan / kTableColumns;
static_assert(kScaleSpan % kChunk == 0 && kMaxTaskOutputs <= kScaleSpan);

static inline int64_t DecodedOutputs(const Problem& problem) {
  return problem.input_gradient ? kMaxTaskOutputs : kBlockSide;
}

// At most 32 values; zeros where there are fewer.
static inline __m512i LoadUpTo(const uint16_t* values, int64_t count) {
  const __mmask32 valid = static_cast<__mmask32>((uint64_t{1} << Smaller(kBlockSide, count)) - 1);
  return _mm512_maskz_loadu_epi16(valid, values);
}

// Decoded weights lie in tiles' order: forward [output][element], for dx [pair of elements][output][2], in rows
// `row_bytes` apart; zeros past the last output or element.
struct Decoded {
  uint8_t* tiles;
  int64_t row_bytes;
};

// Scales of the tables that decode rows of a weight; null where it has no whole tables.
struct Scales {
  const float* Row(int64_t row) const { return first == nullptr ? nullptr : first + row * kTaskScales; }

  const float* first;
};

// The part of a weight that is decoded at once, and the part that comes next: lines of a part lie too far apart for the
// hardware to guess the next ones.
struct Part {
  int64_t output, outputs;
  int64_t element, elements;
  int64_t next_output, next_element;
};

// Bytes of rows of a weight, from one column on.
struct Rows {
  Rows(const Nf4Weight& w, int64_t out, int64_t in)
      : bytes(w.packed + (out * w.in_features + in) / 2), stride(w.in_features / 2) {}

  const uint8_t* operator[](int64_t row) const { return bytes + row * stride; }

  const uint8_t* const bytes;
  const int64_t stride;
};

// Inlined by force: GCC 12 takes a function that only prefetches for one without effects, and drops its calls.
__attribute__((always_inline)) static inline void Prefetch(const uint8_t* bytes, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i);
}

template <Dtype kWeight>
static void DecodeForward(const Nf4Weight& w, const Part& part, const Scales& scales, const Decoded& decoded) {
  const Table codes = LoadTable(kNf4Code.value);
  const Rows rows(w, part.output, part.element), next_rows(w, part.next_output, part.next_element);
  uint8_t* row = decoded.tiles;
  const auto put = [&row](int64_t run, __m512i weights) { _mm512_store_si512(row + run * kTileRowBytes, weights); };
  int64_t i = 0;
  if (scales.first != nullptr && part.elements == kWideColumns) {
    for (; i < part.outputs; ++i, row += decoded.row_bytes) {
      Prefetch(next_rows[i], kWideColumns / 2);
      DecodeTables<kWeight, kWideColumns / kTableColumns>(codes, scales.Row(i), rows[i], 0, put);
    }
  }
  for (; i < part.outputs; ++i, row += decoded.row_bytes) {
    Prefetch(next_rows[i], part.elements / 2);
    DecodeRow<kWeight>(w, codes, scales.Row(i), part.output + i, part.element, part.elements, put);
  }
  for (; i < RoundUpToBlock(part.outputs); ++i, row += decoded.row_bytes) {
    for (int64_t j = 0; j < part.elements; j += kRun) _mm512_store_si512(row + j * 2, _mm512_setzero_si512());
  }
}

template <Dtype kWeight>
static void DecodeInputGradient(const Nf4Weight& w, const Part& part, const Scales& scales, const Decoded& decoded) {
  const Table codes = LoadTable(kNf4Code.value);
  const Rows next_rows(w, part.next_element, part.next_output);
  uint8_t* target = decoded.tiles;
  for (int64_t i = 0; i < RoundUpToBlock(part.elements); i += 2, target += decoded.row_bytes) {
    __m512i row[2][kMaxTaskOutputs / kRun];
    for (int j = 0; j < 2; ++j) {
      Prefetch(next_rows[i + j], part.outputs / 2);
      if (i + j < part.elements) {
        DecodeRow<kWeight>(w, codes, scales.Row(i + j), part.element + i + j, part.output, part.outputs,
                           [&](int64_t run, __m512i weights) { row[j][run] = weights; });
      } else {
        for (__m512i& run : row[j]) run = _mm512_setzero_si512();
      }
    }
    for (int64_t run = 0; run < part.outputs / kRun; ++run) {
      // 128 bits q of a run hold weights q, 4 + q, 8 + q and so on: the lower tile takes 0 to 15, the upper 16 to 31.
      uint8_t* pairs = target + run * 2 * kTileRowBytes;
      _mm512_store_si512(pairs, _mm512_unpacklo_epi16(row[0][run], row[1][run]));
      _mm512_store_si512(pairs + kTileRowBytes, _mm512_unpackhi_epi16(row[0][run], row[1][run]));
    }
  }
}

// v in the place of decoded weights, for elements of the rank.
static void FillForward(const Problem& problem, const Part& part, const Decoded& decoded) {
  uint8_t* row = decoded.tiles;
  for (int64_t i = 0; i < RoundUpToBlock(part.outputs); ++i, row += decoded.row_bytes) {
    const uint16_t* v = static_cast<const uint16_t*>(problem.v) + (part.output + i) * problem.rank + part.element;
    for (int64_t j = 0; j < part.elements; j += kBlockSide) {
      _mm512_store_si512(row + j * 2, i < part.outputs ? LoadUpTo(v + j, part.elements - j) : _mm512_setzero_si512());
    }
  }
}

static void FillInputGradient(const Problem& problem, const Part& part, const Decoded& decoded) {
  for (int64_t element = 0; element < part.elements; element += kBlockSide) {
    uint8_t* tile = decoded.tiles + element / 2 * decoded.row_bytes;
    for (int64_t column = 0; column < part.outputs; column += kTileSide, tile += kTileRowBytes) {
      __m512i columns[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {  // in the order of decoded columns
        const int64_t output = part.output + column + i % 4 * 4 + i / 4;
        const uint16_t* v = static_cast<const uint16_t*>(problem.v) + output * problem.rank + part.element + element;
        columns[i] = LoadUpTo(v, part.elements - element);
      }
      Transpose(columns);
      for (int i = 0; i < kTileSide; ++i) _mm512_store_si512(tile + i * decoded.row_bytes, columns[i]);
    }
  }
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_DECODE_H_
