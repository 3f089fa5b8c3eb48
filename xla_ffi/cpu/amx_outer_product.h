// Gradients of adapters in tiles of bfloat16: rows are 32 columns of the narrow matrix, columns 32 of the wide one, whose
// tokens are paired as they are read. A task takes some features of the wide matrix and all tokens, in their order.
//
// Included after amx_tiles.h.
#ifndef QLORA_JAX_CPU_AMX_OUTER_PRODUCT_H_
#define QLORA_JAX_CPU_AMX_OUTER_PRODUCT_H_

#include "amx_packing.h"
#include "outer_product.h"

namespace qlora_jax::QLORA_JAX_ISA {

struct OuterProduct {
  static constexpr int64_t kFeatures = 128;  // 256 bytes of a row, which are read together
  static constexpr int64_t kSteps = 8;       // of 32 tokens that are packed at once: 64 KiB with so many features

  static int64_t Steps(const OuterProductProblem& p) { return CeilDivide(p.tokens, kBlockSide); }
  static int64_t RankBlocks(const OuterProductProblem& p) { return CeilDivide(p.rank, kBlockSide); }

  static int64_t PackedBytes(const OuterProductProblem& p) { return RankBlocks(p) * Steps(p) * kBlockBytes; }

  static int64_t WorkspaceBytes(const OuterProductProblem& p) {
    return kFeatures / kBlockSide * (kSteps * kBlockBytes + RankBlocks(p) * kBlockSums * int64_t{sizeof(float)});
  }

  static void Pack(const OuterProductProblem& p, void* packed) {
    PackTokens({p.narrow, p.rank, p.tokens, p.rank}, true, static_cast<uint8_t*>(packed));
  }

  static void Multiply(const OuterProductProblem& p, int64_t feature, const void* packed, void* workspace) {
    const Matrix wide{p.wide + feature, p.features, p.tokens, Smaller(kFeatures, p.features - feature)};
    const int64_t blocks = CeilDivide(wide.features, kBlockSide), rank_blocks = RankBlocks(p), steps = Steps(p);
    uint8_t* columns = static_cast<uint8_t*>(workspace);
    float* sums = reinterpret_cast<float*>(columns + kFeatures / kBlockSide * kSteps * kBlockBytes);
    LoadTileConfig(FullTiles());
    for (int64_t first = 0; first < steps; first += kSteps) {
      const int64_t chunk = Smaller(kSteps, steps - first);
      for (int64_t step = 0; step < chunk; ++step) {
        PackStepOfTokens(wide, (first + step) * kBlockSide, false, kSteps * kTileBytes, columns + step * kTileBytes);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t rank = 0; rank < rank_blocks; ++rank) {
          Strip rows = PackedBlock(static_cast<const uint8_t*>(packed), rank, steps);
          rows.tiles += first * kTileBytes;
          MultiplyBlockTiles<2, 2>(rows, PackedBlock(columns, block, kSteps), chunk, first > 0,
                                   sums + (block * rank_blocks + rank) * kBlockSums);
        }
      }
    }
    ReleaseTiles();
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t rank = 0; rank < rank_blocks; ++rank) {
        for (int tile = 0; tile < 4; ++tile) {
          StoreTile16(p, rank * kBlockSide + tile / 2 * kTileSide, feature + block * kBlockSide + tile % 2 * kTileSide,
                      sums + (block * rank_blocks + rank) * kBlockSums + tile * kTileSums);
        }
      }
    }
  }

  static void StoreTile16(const OuterProductProblem& p, int64_t rank, int64_t feature, const float* tile) {
    __m512i rows[kTileSide];
    for (int i = 0; i < kTileSide; ++i) rows[i] = _mm512_load_si512(tile + i * kTileSide);
    if (p.features_first) Transpose(rows);
    const int64_t row = p.features_first ? feature : rank, row_count = p.features_first ? p.features : p.rank;
    const int64_t column = p.features_first ? rank : feature, columns = p.features_first ? p.rank : p.features;
    const __mmask16 valid = static_cast<__mmask16>(Lanes(Smaller(kTileSide, columns - column)));
    for (int64_t i = 0; i < Smaller(kTileSide, row_count - row); ++i) {
      _mm512_mask_storeu_epi32(p.sums + (row + i) * columns + column, valid, rows[i]);
    }
  }

  static constexpr OuterProductKernels kKernels = {PackedBytes, WorkspaceBytes, Pack, Multiply, kFeatures};
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_OUTER_PRODUCT_H_
