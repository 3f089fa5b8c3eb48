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

static inline int64_t DecodedOutputs(const Problem& problem) {
  return problem.input_gradient ? kMaxTaskOutputs : kBlockSide;
}

// The part of the result that a task computes.
struct TaskRegion {
  int64_t row, rows;  // of x
  int64_t output, outputs;
};

// At most 32 values; zeros where there are fewer.
static inline __m512i LoadUpTo(const uint16_t* values, int64_t count) {
  const __mmask32 valid = static_cast<__mmask32>((uint64_t{1} << Smaller(kBlockSide, count)) - 1);
  return _mm512_maskz_loadu_epi16(valid, values);
}

// Packed activations: tiles [chunk][16 rows][step], zeros past the last row and the last element. What a task reads of
// a chunk lies together. Elements of u follow those of x, in chunks of their own.
static inline int64_t RowTiles(const Problem& problem) { return CeilDivide(problem.rows, kTileSide); }

static inline Strip PackedStrip(const Problem& problem, const uint8_t* packed, int64_t row, int64_t element,
                                int64_t steps) {
  const int64_t tile = element / kBlockSide * RowTiles(problem) + row / kTileSide * steps;
  return {packed + tile * kTileBytes, kTileRowBytes, kTileBytes, steps * kTileBytes};
}

// Packs 16 rows of a matrix of `columns`, whose first element is `begin` of what is summed over.
template <bool kPairs, bool kRunOrder>
static void PackMatrix(const Problem& problem, const void* matrix, int64_t columns, int64_t begin, int64_t first_row,
                       uint8_t* packed) {
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t steps = CeilDivide(Smaller(kChunk, columns - chunk), kBlockSide);
    uint8_t* target = const_cast<uint8_t*>(PackedStrip(problem, packed, first_row, begin + chunk, steps).tiles);
    for (int64_t step = 0; step < steps; ++step, target += kTileBytes) {
      const int64_t element = chunk + step * kBlockSide;
      __m512i rows[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {
        const uint16_t* source = static_cast<const uint16_t*>(matrix) + (first_row + i) * columns + element;
        rows[i] = first_row + i < problem.rows ? LoadUpTo(source, columns - element) : _mm512_setzero_si512();
        if (kRunOrder) rows[i] = InRunOrder(rows[i]);
      }
      if (kPairs) Transpose(rows);
      for (int i = 0; i < kTileSide; ++i) _mm512_store_si512(target + i * kTileRowBytes, rows[i]);
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

// Decoded weights lie in tiles' order: forward [output][element], for dx [pair of elements][output][2], in rows
// `row_bytes` apart; zeros past the last output or element.
struct Decoded {
  uint8_t* tiles;
  int64_t row_bytes;
};

static inline void PrefetchRow(const Nf4Weight& w, int64_t out, int64_t in, int64_t count) {
  if (out >= w.out_features || in >= w.in_features) return;
  const uint8_t* bytes = w.packed + (out * w.in_features + in) / 2;
  const int64_t size = Smaller(count, w.in_features - in) / 2;
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i);
}

// The part of a weight that is decoded at once, and the part that comes next: lines of a part lie too far apart for the
// hardware to guess the next ones.
struct Part {
  int64_t output, outputs;
  int64_t element, elements;
  int64_t next_output, next_element;
};

template <Dtype kWeight>
static void DecodeForward(const Nf4Weight& w, const Part& part, const Decoded& decoded) {
  const Table codes = LoadTable(kNf4Code.value);
  uint8_t* row = decoded.tiles;
  for (int64_t i = 0; i < part.outputs; ++i, row += decoded.row_bytes) {
    PrefetchRow(w, part.next_output + i, part.next_element, part.elements);
    DecodeRow<kWeight>(w, codes, part.output + i, part.element, part.elements, [row](int64_t run, __m512i weights) {
      _mm512_store_si512(row + run * kTileRowBytes, weights);
    });
  }
  for (int64_t i = part.outputs; i < RoundUpToBlock(part.outputs); ++i, row += decoded.row_bytes) {
    for (int64_t j = 0; j < part.elements; j += kRun) _mm512_store_si512(row + j * 2, _mm512_setzero_si512());
  }
}

template <Dtype kWeight>
static void DecodeInputGradient(const Nf4Weight& w, const Part& part, const Decoded& decoded) {
  const Table codes = LoadTable(kNf4Code.value);
  uint8_t* target = decoded.tiles;
  for (int64_t i = 0; i < RoundUpToBlock(part.elements); i += 2, target += decoded.row_bytes) {
    __m512i row[2][kMaxTaskOutputs / kRun];
    for (int j = 0; j < 2; ++j) {
      PrefetchRow(w, part.next_element + i + j, part.next_output, part.outputs);
      if (i + j < part.elements) {
        DecodeRow<kWeight>(w, codes, part.element + i + j, part.output, part.outputs,
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
    // Four tasks a thread balance the load; with few rows tasks are short, and more of them end closer together.
    const int64_t output_parts = CeilDivide((row_blocks == 1 ? 32 : 4) * threads, row_parts);
    Plan plan;
    const int64_t steps = CeilDivide(problem.reduction, kBlockSide) + CeilDivide(problem.rank, kBlockSide);
    plan.packed_bytes = RowTiles(problem) * steps * kTileBytes;
    plan.pack_tasks = RowTiles(problem);
    plan.tile_rows = CeilDivide(row_blocks, row_parts) * kBlockSide;
    plan.tile_outputs = Smaller(CeilDivide(output_blocks, output_parts) * kBlockSide, kMaxTaskOutputs);
    plan.tasks = CeilDivide(problem.rows, plan.tile_rows) * CeilDivide(problem.outputs, plan.tile_outputs);
    plan.workspace_bytes = DecodedBytes(problem) + plan.tile_outputs * plan.tile_rows * int64_t{sizeof(float)};
    return plan;
  }

  // sums (+)= a decoded part times all rows of the task; `element` is the part's first of what is summed over.
  static void MultiplyPart(const Problem& problem, const TaskRegion& task, const Part& part, int64_t element,
                           const uint8_t* packed, const Decoded& decoded, float* block) {
    const int64_t steps = CeilDivide(part.elements, kBlockSide);
    const bool add = element > 0;
    for (int64_t output = 0; output < part.outputs; output += kBlockSide) {
      for (int64_t row = 0; row < task.rows; row += kBlockSide, block += BlockSums(task)) {
        const Strip x = PackedStrip(problem, packed, task.row + row, element, steps);
        const bool whole = RowHalves(task, row) == 2;
        const int64_t tile_bytes = kTileSide * decoded.row_bytes;
        if (problem.input_gradient) {
          const Strip w{decoded.tiles + output * 4, decoded.row_bytes, tile_bytes, kTileRowBytes};
          (whole ? MultiplyBlockTiles<2, 2> : MultiplyBlockTiles<1, 2>)(x, w, steps, add, block);
        } else {
          const Strip w{decoded.tiles + output * decoded.row_bytes, decoded.row_bytes, kTileRowBytes, tile_bytes};
          (whole ? MultiplyBlockTiles<2, 2> : MultiplyBlockTiles<2, 1>)(w, x, steps, add, block);
        }
      }
    }
  }

  template <Dtype kWeight>
  static void MultiplyTask(const Problem& problem, const TaskRegion& task, const uint8_t* packed,
                           const Decoded& decoded, float* sums) {
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
          if (problem.input_gradient) {
            adapter ? FillInputGradient(problem, part, decoded)
                    : DecodeInputGradient<kWeight>(problem.weight, part, decoded);
          } else {
            adapter ? FillForward(problem, part, decoded) : DecodeForward<kWeight>(problem.weight, part, decoded);
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
    float* sums = reinterpret_cast<float*>(decoded.tiles + DecodedBytes(problem));
    const uint8_t* x = static_cast<const uint8_t*>(packed);

    // The thread is XLA's: its tiles are in use for this task alone.
    LoadTileConfig(FullTiles());
    switch (problem.weight_dtype) {
      case Dtype::kFloat32:
        MultiplyTask<Dtype::kFloat32>(problem, task, x, decoded, sums);
        break;
      case Dtype::kBfloat16:
        MultiplyTask<Dtype::kBfloat16>(problem, task, x, decoded, sums);
        break;
      case Dtype::kFloat16:
        MultiplyTask<Dtype::kFloat16>(problem, task, x, decoded, sums);
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
