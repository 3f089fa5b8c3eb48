// Tiles: the method of AMX, for bfloat16 activations and weights whose runs are whole.
//
// The result is computed in blocks of 32 x 32, four tiles of float32 sums, from two tiles of 16 rows and two of 16
// columns at every step of 32 reduction elements:
//   forward  y^T = W x^T   rows: 16 rows of W as they are decoded; columns: 16 rows of x, packed in pairs
//   dx       dx = dy W     rows: 16 rows of dy as they are; columns: 16 columns of W, whose rows are paired
// A tile of columns holds pairs of reduction elements: its row r the elements 2r and 2r + 1 of 16 columns.
// Forward, x is packed in the order of decoded runs, and blocks are transposed when they are stored. For dx, decoded
// runs put columns of the result out of order, which is mended when they are stored.
//
// A task decodes a part of its weights for one chunk of the reduction and multiplies it by all its rows of x before the
// next; sums wait in between. An adapter is a few more elements of the reduction, of which v is the weight. Every sum
// takes its steps in order, so no cut of the work shows in the result.
//
// Included after avx512_vectors.h and amx_instructions.h or amx_model.h.
#ifndef QLORA_JAX_CPU_AMX_TILES_H_
#define QLORA_JAX_CPU_AMX_TILES_H_

#include "weights.h"

#include "amx_blocks.h"
#include "amx_decode.h"
#include "avx512_transpose.h"

namespace qlora_jax::QLORA_JAX_ISA {

// The part of the result that a task computes.
struct TaskRegion {
  int64_t row, rows;  // of x
  int64_t output, outputs;
};

// Packed activations: tiles [chunk][16 rows][step], zeros past the last row and the last element. What a task reads of
// a chunk lies together. Elements of u follow those of x, in chunks of their own.
static inline int64_t RowTiles(const Problem& problem) { return CeilDivide(problem.rows, kTileSide); }

// Forward, a lone tile has no more columns than there are rows.
static inline int64_t PackedRowBytes(const Problem& problem) {
  return problem.input_gradient ? kTileRowBytes : Smaller(problem.rows * 4, kTileRowBytes);
}

static inline Strip PackedStrip(const Problem& problem, const uint8_t* packed, int64_t row, int64_t element,
                                int64_t steps) {
  const int64_t row_bytes = PackedRowBytes(problem), tile_bytes = kTileSide * row_bytes;
  const int64_t tile = element / kBlockSide * RowTiles(problem) + row / kTileSide * steps;
  return {packed + tile * tile_bytes, row_bytes, tile_bytes, steps * tile_bytes};
}

// Packs 16 rows of a matrix of `columns`, whose first element is `begin` of what is summed over.
template <bool kPairs, bool kRunOrder>
static void PackMatrix(const Problem& problem, const void* matrix, int64_t columns, int64_t begin, int64_t first_row,
                       uint8_t* packed) {
  const int64_t row_bytes = PackedRowBytes(problem);
  const __mmask16 columns_mask = static_cast<__mmask16>((1u << row_bytes / 4) - 1);
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t steps = CeilDivide(Smaller(kChunk, columns - chunk), kBlockSide);
    uint8_t* target = const_cast<uint8_t*>(PackedStrip(problem, packed, first_row, begin + chunk, steps).tiles);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t element = chunk + step * kBlockSide;
      __m512i rows[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {
        const uint16_t* source = static_cast<const uint16_t*>(matrix) + (first_row + i) * columns + element;
        rows[i] = first_row + i < problem.rows ? LoadUpTo(source, columns - element) : _mm512_setzero_si512();
        if (kRunOrder) rows[i] = InRunOrder(rows[i]);
      }
      if (kPairs) Transpose(rows);
      for (int i = 0; i < kTileSide; ++i, target += row_bytes) _mm512_mask_storeu_epi32(target, columns_mask, rows[i]);
    }
  }
}

static void PackRowTile(const Problem& problem, int64_t row_tile, void* packed) {
  uint8_t* tiles = static_cast<uint8_t*>(packed);
  const int64_t row = row_tile * kTileSide, after_x = RoundUpToBlock(problem.reduction);
  if (problem.input_gradient) {
    PackMatrix<false, false>(problem, problem.x, problem.reduction, 0, row, tiles);
    PackMatrix<false, false>(problem, problem.u, problem.rank, after_x, row, tiles);
  } else {
    PackMatrix<true, true>(problem, problem.x, problem.reduction, 0, row, tiles);
    PackMatrix<true, false>(problem, problem.u, problem.rank, after_x, row, tiles);
  }
}

// Halves of 16 rows of x that a block has, which begins at `row` of a task.
static inline int RowHalves(const TaskRegion& task, int64_t row) { return task.rows - row > kTileSide ? 2 : 1; }

// Sums of a task: [32 outputs][32 rows], the latter cut short where a task has only 16.
static inline int64_t BlockSums(const TaskRegion& task) { return RowHalves(task, 0) * 2 * kTileSums; }

// Blocks of the forward hold y^T: 32 outputs by 32 rows.
static void StoreForward(const Problem& problem, const TaskRegion& task, const float* block) {
  for (int64_t output = 0; output < task.outputs; output += kBlockSide) {
    const int64_t outputs = Smaller(kBlockSide, task.outputs - output);
    const __mmask32 valid = static_cast<__mmask32>((uint64_t{1} << outputs) - 1);
    for (int64_t row = 0; row < task.rows; row += kBlockSide, block += BlockSums(task)) {
      const int halves = RowHalves(task, row);
      for (int half = 0; half < halves; ++half) {
        const int64_t first = row + half * kTileSide;
        __m512i low[kTileSide], high[kTileSide];
        for (int i = 0; i < kTileSide; ++i) {
          low[i] = _mm512_load_si512(block + half * kTileSums + i * kTileSide);
          high[i] = _mm512_load_si512(block + (halves + half) * kTileSums + i * kTileSide);
        }
        Transpose(low);
        Transpose(high);
        uint16_t* y = static_cast<uint16_t*>(problem.y) + (task.row + first) * problem.outputs + task.output + output;
        for (int64_t i = 0; i < Smaller(kTileSide, task.rows - first); ++i, y += problem.outputs) {
          const __m256i pair[2] = {Bfloat16Halves(_mm512_castsi512_ps(low[i])),
                                   Bfloat16Halves(_mm512_castsi512_ps(high[i]))};
          _mm512_mask_storeu_epi16(y, valid, _mm512_inserti64x4(_mm512_castsi256_si512(pair[0]), pair[1], 1));
        }
      }
    }
  }
}

// Blocks of dx hold 32 rows by 32 columns; column 4q + t of a tile is column 4t + q of the result.
static void StoreInputGradient(const Problem& problem, const TaskRegion& task, const float* sums) {
  const int64_t row_blocks = CeilDivide(task.rows, kBlockSide);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t row = 0; row < task.rows; ++row) {
    uint16_t* dx = static_cast<uint16_t*>(problem.y) + (task.row + row) * problem.outputs + task.output;
    for (int64_t output = 0; output < task.outputs; output += kBlockSide) {
      const float* block = sums + (output / kBlockSide * row_blocks + row / kBlockSide) * BlockSums(task);
      const float* tiles = block + row % kBlockSide / kTileSide * 2 * kTileSums + row % kTileSide * kTileSide;
      for (int half = 0; half < 2; ++half) {
        const __m512 values = _mm512_load_ps(tiles + half * kTileSums);
        StoreAs<Dtype::kBfloat16>(dx + output + half * kTileSide, _mm512_permutexvar_ps(order, values));
      }
    }
  }
}

struct Tiles {
  static bool Takes(const Problem& problem) {
    return problem.dtype == Dtype::kBfloat16 && HasWholeRuns(problem.weight);
  }

  // Bytes of a row of decoded weights, and of all rows.
  static int64_t RowBytes(const Problem& problem) {
    return (problem.input_gradient ? 2 * kMaxTaskOutputs : kChunk) * int64_t{sizeof(uint16_t)} + kRowPadding;
  }

  static int64_t DecodedBytes(const Problem& problem) {
    return (problem.input_gradient ? kChunk / 2 : kBlockSide) * RowBytes(problem);
  }

  static Plan MakePlan(const Problem& problem, int64_t threads) {
    const int64_t row_blocks = CeilDivide(problem.rows, kBlockSide);
    const int64_t output_blocks = CeilDivide(problem.outputs, kBlockSide);
    const int64_t row_parts = CeilDivide(problem.rows, kMaxTaskRows);
    const int64_t output_parts = CeilDivide(4 * threads, row_parts);  // four tasks a thread balance the load
    Plan plan;
    plan.packed_bytes = RowTiles(problem) * SummedElements(problem) / kBlockSide * kTileSide * PackedRowBytes(problem);
    plan.pack_tasks = RowTiles(problem);
    plan.tile_rows = CeilDivide(row_blocks, row_parts) * kBlockSide;
    plan.tile_outputs = Smaller(CeilDivide(output_blocks, output_parts) * kBlockSide, kMaxTaskOutputs);
    // Forward, the sums of few rows stay in tiles over the whole reduction. Short tasks end closer together, too.
    if (!problem.input_gradient && row_blocks == 1) plan.tile_outputs = kBlockSide;
    plan.tasks = CeilDivide(problem.rows, plan.tile_rows) * CeilDivide(problem.outputs, plan.tile_outputs);
    plan.workspace_bytes = DecodedBytes(problem) +
                           (kScaledRows * kTaskScales + plan.tile_outputs * plan.tile_rows) * int64_t{sizeof(float)};
    return plan;
  }

  // Where a block's sums lie between parts: in memory, or, where a task has one block, in the tiles.
  struct SumsOfPart {
    bool first, last;
    bool stay;
  };

  // Inlined by force: with few rows a block is a small part of the work of decoding it.
  template <int kRows, int kColumns>
  __attribute__((always_inline)) static inline void MultiplyBlock(const Strip& rows, const Strip& columns,
                                                                  int64_t steps, const SumsOfPart& kept, float* sums) {
    if (kept.first) {
      ZeroSums<kRows, kColumns>();
    } else if (!kept.stay) {
      LoadSums<kRows, kColumns>(sums);
    }
    AddToSums<kRows, kColumns>(rows, columns, steps);
    if (kept.last || !kept.stay) StoreSums<kRows, kColumns>(sums);
  }

  static bool IsOneBlock(const TaskRegion& task) { return task.rows <= kBlockSide && task.outputs <= kBlockSide; }

  // Elements of x and then of u, both filled up to whole steps.
  static int64_t SummedElements(const Problem& problem) {
    return RoundUpToBlock(problem.reduction) + RoundUpToBlock(problem.rank);
  }

  static TileConfig TilesOf(const Problem& problem) {
    TileConfig config = FullTiles();
    if (!problem.input_gradient) {
      for (int tile = 0; tile < 8; ++tile) {
        const bool rows = tile == 4 || tile == 5;
        if (!rows) config.row_bytes[tile] = static_cast<uint16_t>(PackedRowBytes(problem));
      }
    }
    return config;
  }

  // sums (+)= a decoded part times all rows of the task; `element` is the part's first of what is summed over.
  static void MultiplyPart(const Problem& problem, const TaskRegion& task, const Part& part, int64_t element,
                           const uint8_t* packed, const Decoded& decoded, float* block) {
    const int64_t steps = CeilDivide(part.elements, kBlockSide);
    const SumsOfPart kept{element == 0, element + steps * kBlockSide == SummedElements(problem), IsOneBlock(task)};
    for (int64_t output = 0; output < part.outputs; output += kBlockSide) {
      for (int64_t row = 0; row < task.rows; row += kBlockSide, block += BlockSums(task)) {
        const Strip x = PackedStrip(problem, packed, task.row + row, element, steps);
        const bool whole = RowHalves(task, row) == 2;
        const int64_t tile_bytes = kTileSide * decoded.row_bytes;
        if (problem.input_gradient) {
          const Strip w{decoded.tiles + output * 4, decoded.row_bytes, tile_bytes, kTileRowBytes};
          whole ? MultiplyBlock<2, 2>(x, w, steps, kept, block) : MultiplyBlock<1, 2>(x, w, steps, kept, block);
        } else {
          const Strip w{decoded.tiles + output * decoded.row_bytes, decoded.row_bytes, kTileRowBytes, tile_bytes};
          whole ? MultiplyBlock<2, 2>(w, x, steps, kept, block) : MultiplyBlock<2, 1>(w, x, steps, kept, block);
        }
      }
    }
  }

  // Scales of a part, which are decoded where it is the first of those that share them: forward a task's parts of
  // kScaleSpan elements, for dx none.
  static Scales PartScales(const Problem& problem, const TaskRegion& task, const Part& part, float* scales) {
    const Nf4Weight& w = problem.weight;
    if (problem.input_gradient) {
      const Rectangle rows{part.element, part.elements, part.output, part.outputs};
      if (!HasWholeTables(w, rows)) return {nullptr};
      DecodeScales(w, rows, kTaskScales, scales);
      return {scales};
    }
    const int64_t offset = part.element % kScaleSpan, first = part.element - offset;
    const Rectangle span{task.output, task.outputs, first, Smaller(kScaleSpan, problem.reduction - first)};
    if (!HasWholeTables(w, span)) return {nullptr};
    if (offset == 0 && part.output == task.output) DecodeScales(w, span, kTaskScales, scales);
    return {scales + (part.output - task.output) * kTaskScales + offset / kTableColumns};
  }

  template <Dtype kWeight>
  static void DecodePart(const Problem& problem, const Part& part, const Scales& scales, const Decoded& decoded) {
    if (problem.input_gradient) {
      DecodeInputGradient<kWeight>(problem.weight, part, scales, decoded);
    } else {
      DecodeForward<kWeight>(problem.weight, part, scales, decoded);
    }
  }

  template <Dtype kWeight>
  static void MultiplyTask(const Problem& problem, const TaskRegion& task, const uint8_t* packed,
                           const Decoded& decoded, float* scales, float* sums) {
    const int64_t decoded_outputs = DecodedOutputs(problem);
    const int64_t end = task.output + task.outputs, after_x = RoundUpToBlock(problem.reduction);
    const int64_t block_row = CeilDivide(task.rows, kBlockSide) * BlockSums(task);
    for (int pass = 0; pass < 2; ++pass) {
      const bool adapter = pass == 1;
      const int64_t all_elements = adapter ? problem.rank : problem.reduction;
      for (int64_t element = 0; element < all_elements; element += kChunk) {
        const int64_t elements = Smaller(kChunk, all_elements - element);
        for (int64_t output = task.output; output < end; output += decoded_outputs) {
          const int64_t next = output + decoded_outputs;
          const Part part{output, Smaller(decoded_outputs, end - output), element, elements,
                          next < end ? next : task.output, next < end ? element : element + elements};
          if (!adapter) {
            DecodePart<kWeight>(problem, part, PartScales(problem, task, part, scales), decoded);
          } else if (problem.input_gradient) {
            FillInputGradient(problem, part, decoded);
          } else {
            FillForward(problem, part, decoded);
          }
          MultiplyPart(problem, task, part, (adapter ? after_x : 0) + element, packed, decoded,
                       sums + (output - task.output) / kBlockSide * block_row);
        }
      }
    }
  }

  static void Multiply(const Problem& problem, const Plan& plan, int64_t index, const void* packed, void* workspace) {
    const int64_t row_tasks = CeilDivide(problem.rows, plan.tile_rows);
    TaskRegion task;
    task.row = index % row_tasks * plan.tile_rows;
    task.rows = Smaller(plan.tile_rows, problem.rows - task.row);
    task.output = index / row_tasks * plan.tile_outputs;
    task.outputs = Smaller(plan.tile_outputs, problem.outputs - task.output);
    const Decoded decoded{static_cast<uint8_t*>(workspace), RowBytes(problem)};
    float* scales = reinterpret_cast<float*>(decoded.tiles + DecodedBytes(problem));
    float* sums = scales + kScaledRows * kTaskScales;
    const uint8_t* x = static_cast<const uint8_t*>(packed);

    // The thread is XLA's: its tiles are in use for this task alone.
    LoadTileConfig(TilesOf(problem));
    switch (problem.weight_dtype) {
      case Dtype::kFloat32:
        MultiplyTask<Dtype::kFloat32>(problem, task, x, decoded, scales, sums);
        break;
      case Dtype::kBfloat16:
        MultiplyTask<Dtype::kBfloat16>(problem, task, x, decoded, scales, sums);
        break;
      case Dtype::kFloat16:
        MultiplyTask<Dtype::kFloat16>(problem, task, x, decoded, scales, sums);
        break;
    }
    ReleaseTiles();
    if (problem.input_gradient) {
      StoreInputGradient(problem, task, sums);
    } else {
      StoreForward(problem, task, sums);
    }
  }

  static constexpr Method kMethod = {MakePlan, PackRowTile, Multiply};
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_TILES_H_
