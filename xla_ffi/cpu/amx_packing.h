// Matrices of bfloat16 packed into tiles, as rows or columns of products of blocks.
#ifndef QLORA_JAX_CPU_AMX_PACKING_H_
#define QLORA_JAX_CPU_AMX_PACKING_H_

#include "amx_blocks.h"
#include "avx512_transpose.h"

namespace qlora_jax::QLORA_JAX_ISA {

constexpr int64_t kBlockSums = kBlockSide * kBlockSide;
constexpr int64_t kBlockBytes = kBlockSums * 2;  // of packed operands

// A matrix of tokens by features inside a tensor.
struct Matrix {
  const uint16_t* data;
  int64_t stride;  // in elements, between tokens
  int64_t tokens, features;
};

// Operands of products: blocks of 32 rows (or columns) [block][half of 16][step] of tiles, a step being 32 elements of
// the reduction. `steps` is that of the packed matrix; a product may take fewer.
static inline Strip PackedBlock(const uint8_t* tiles, int64_t block, int64_t steps) {
  return {tiles + block * steps * kBlockBytes, kTileRowBytes, kTileBytes, steps * kTileBytes};
}

// Sums [rows' block][columns' block] of one block of rows with `column_blocks` blocks of columns.
static void MultiplyRow(const Strip& rows, const uint8_t* columns, int64_t column_blocks, int64_t column_steps,
                        int64_t steps, float* sums) {
  for (int64_t j = 0; j < column_blocks; ++j) {
    MultiplyBlockTiles<2, 2>(rows, PackedBlock(columns, j, column_steps), steps, false, sums + j * kBlockSums);
  }
}

static inline __mmask32 Lanes(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : static_cast<__mmask32>((uint64_t{1} << count) - 1);
}

// 32 features of a token; zeros past the last of either.
static inline __m512i LoadFeatures(const Matrix& m, int64_t token, int64_t feature) {
  if (token >= m.tokens) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(Lanes(m.features - feature), m.data + token * m.stride + feature);
}

// Words i of two rows side by side: of the lower 16 elements of each, and of the upper 16.
static inline void Pair(__m512i first, __m512i second, __m512i pairs[2]) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  pairs[0] = _mm512_permutex2var_epi16(first, lower, second);
  pairs[1] = _mm512_permutex2var_epi16(first, upper, second);
}

// 32 tokens as rows of a product over features, [half][step]; transposed: as its columns.
static void PackBlockOfRows(const Matrix& m, int64_t token, bool transposed, uint8_t* tiles) {
  for (int half = 0; half < 2; ++half) {
    for (int64_t feature = 0; feature < m.features; feature += kBlockSide, tiles += kTileBytes) {
      __m512i rows[kTileSide];
      for (int i = 0; i < kTileSide; ++i) rows[i] = LoadFeatures(m, token + half * kTileSide + i, feature);
      if (transposed) Transpose(rows);
      for (int i = 0; i < kTileSide; ++i) _mm512_store_si512(tiles + i * kTileRowBytes, rows[i]);
    }
  }
}

// 32 tokens as one step of a product over tokens: tiles [feature / 16], `stride` bytes apart, of columns; transposed: of
// rows.
static void PackStepOfTokens(const Matrix& m, int64_t token, bool transposed, int64_t stride, uint8_t* tiles) {
  for (int64_t feature = 0; feature < m.features; feature += kBlockSide, tiles += 2 * stride) {
    __m512i tile[2][kTileSide];
    for (int i = 0; i < kTileSide; ++i) {
      __m512i pairs[2];
      Pair(LoadFeatures(m, token + 2 * i, feature), LoadFeatures(m, token + 2 * i + 1, feature), pairs);
      tile[0][i] = pairs[0];
      tile[1][i] = pairs[1];
    }
    for (int half = 0; half < 2; ++half) {
      if (transposed) Transpose(tile[half]);
      for (int i = 0; i < kTileSide; ++i) {
        _mm512_store_si512(tiles + half * stride + i * kTileRowBytes, tile[half][i]);
      }
    }
  }
}

static void PackRows(const Matrix& m, bool transposed, uint8_t* tiles) {
  const int64_t bytes = CeilDivide(m.features, kBlockSide) * kBlockBytes;
  for (int64_t token = 0; token < m.tokens; token += kBlockSide, tiles += bytes) {
    PackBlockOfRows(m, token, transposed, tiles);
  }
}

static void PackTokens(const Matrix& m, bool transposed, uint8_t* tiles) {
  const int64_t steps = CeilDivide(m.tokens, kBlockSide);
  for (int64_t step = 0; step < steps; ++step, tiles += kTileBytes) {
    PackStepOfTokens(m, step * kBlockSide, transposed, steps * kTileBytes, tiles);
  }
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_PACKING_H_
