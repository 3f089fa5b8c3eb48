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
// A task dequantizes its weights for one chunk of the reduction and multiplies by all its rows of x before the next;
// sums wait in between. Every sum takes its steps in order, so no cut of the work shows in the result.
//
// Included after avx512_vectors.h and amx_instructions.h or amx_model.h.
#ifndef QLORA_JAX_CPU_AMX_TILES_H_
#define QLORA_JAX_CPU_AMX_TILES_H_

#include "weights.h"

#include "avx512_runs.h"
#include "avx512_transpose.h"

namespace qlora_jax::QLORA_JAX_ISA {

constexpr int kTileSide = 16;             // rows of a tile; columns of a tile of sums
constexpr int kTileBytes = 1024;          // of every tile: 16 rows of 64 bytes
constexpr int kTileRowBytes = 64;
constexpr int kBlockSide = 2 * kTileSide;  // of a block of sums; also the reduction elements of a step
constexpr int kStepBytes = 2 * kTileBytes;  // two tiles: 32 rows or columns, one step
constexpr int kBlockSums = kBlockSide * kBlockSide;

// Reduction steps of one chunk, and the largest tile of the result that a task computes. Dequantized weights (256 KiB),
// sums (512 KiB) and a chunk of x (512 KiB) stay in a second-level cache of 2 MiB.
constexpr int64_t kChunkTileSteps = 16;
constexpr int64_t kMaxTaskRows = 512;
constexpr int64_t kMaxTaskOutputs = 256;
// With few rows of x, which stay in the cache as a whole, the weights of 32 outputs fit the first-level cache.
constexpr int64_t kFewRows = 128;
constexpr int64_t kFewRowsTaskOutputs = 64;

static inline int64_t RoundUpToBlock(int64_t size) { return CeilDivide(size, kBlockSide) * kBlockSide; }

// Tiles 0 to 3 are a block's sums, [half of its rows][half of its columns]; 4 and 5 rows, 6 and 7 columns.
// `kRows` and `kColumns`: how many halves the block has.
template <int kRows, int kColumns>
static void MultiplyBlockTiles(const uint8_t* rows, const uint8_t* columns, int64_t steps, bool add, float* sums) {
  constexpr int kTileSums = kTileSide * kTileSide;
  if (add) {
    LoadTile<0>(sums, kTileRowBytes);
    if constexpr (kColumns == 2) LoadTile<1>(sums + kTileSums, kTileRowBytes);
    if constexpr (kRows == 2) LoadTile<2>(sums + 2 * kTileSums, kTileRowBytes);
    if constexpr (kRows == 2 && kColumns == 2) LoadTile<3>(sums + 3 * kTileSums, kTileRowBytes);
  } else {
    ZeroTile<0>();
    if constexpr (kColumns == 2) ZeroTile<1>();
    if constexpr (kRows == 2) ZeroTile<2>();
    if constexpr (kRows == 2 && kColumns == 2) ZeroTile<3>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    LoadTile<6>(columns, kTileRowBytes);
    LoadTile<4>(rows, kTileRowBytes);
    MultiplyTiles<0, 4, 6>();
    if constexpr (kColumns == 2) {
      LoadTile<7>(columns + kTileBytes, kTileRowBytes);
      MultiplyTiles<1, 4, 7>();
    }
    if constexpr (kRows == 2) {
      LoadTile<5>(rows + kTileBytes, kTileRowBytes);
      MultiplyTiles<2, 5, 6>();
    }
    if constexpr (kRows == 2 && kColumns == 2) MultiplyTiles<3, 5, 7>();
    rows += kStepBytes;
    columns += kStepBytes;
  }
  StoreTile<0>(sums, kTileRowBytes);
  if constexpr (kColumns == 2) StoreTile<1>(sums + kTileSums, kTileRowBytes);
  if constexpr (kRows == 2) StoreTile<2>(sums + 2 * kTileSums, kTileRowBytes);
  if constexpr (kRows == 2 && kColumns == 2) StoreTile<3>(sums + 3 * kTileSums, kTileRowBytes);
}

// The part of the result that a task computes.
struct TaskRegion {
  int64_t row, rows;  // of x
  int64_t output, outputs;
};

// Packed activations: [32 rows][step][2 tiles], zeros past the last row and the last element.
static inline int64_t PackedGroupBytes(const Problem& problem) {
  return CeilDivide(problem.reduction, kBlockSide) * kStepBytes;
}

static void PackGroup(const Problem& problem, int64_t group, void* packed) {
  uint8_t* target = static_cast<uint8_t*>(packed) + group * PackedGroupBytes(problem);
  for (int64_t element = 0; element < problem.reduction; element += kBlockSide, target += kStepBytes) {
    const int64_t elements = Smaller(kBlockSide, problem.reduction - element);
    const __mmask32 valid = static_cast<__mmask32>((uint64_t{1} << elements) - 1);
    for (int half = 0; half < 2; ++half) {
      __m512i rows[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {
        const int64_t row = group * kBlockSide + half * kTileSide + i;
        const uint16_t* x = static_cast<const uint16_t*>(problem.x) + row * problem.reduction + element;
        rows[i] = row < problem.rows ? _mm512_maskz_loadu_epi16(valid, x) : _mm512_setzero_si512();
      }
      if (!problem.input_gradient) {
        for (__m512i& row : rows) row = InRunOrder(row);
        Transpose(rows);
      }
      for (int i = 0; i < kTileSide; ++i) _mm512_store_si512(target + half * kTileBytes + i * kTileRowBytes, rows[i]);
    }
  }
}

// Weights of one chunk: [32 outputs][step][2 tiles]. Lines that follow are asked for early: rows of the stored matrix
// lie too far apart for the hardware to guess.
constexpr int64_t kRowsAhead = 4;

static inline void PrefetchRow(const Nf4Weight& w, int64_t out, int64_t in, int64_t count) {
  if (out >= w.out_features) return;
  const uint8_t* bytes = w.packed + (out * w.in_features + in) / 2;
  for (int64_t i = 0; i < count / 2; i += 64) __builtin_prefetch(bytes + i);
}

template <Dtype kWeight>
static void FillRowTiles(const Nf4Weight& w, const TaskRegion& task, int64_t element, int64_t elements,
                         uint8_t* tiles) {
  const Table codes = LoadTable(kNf4Code.value);
  const int64_t steps = elements / kBlockSide;
  for (int64_t i = 0; i < RoundUpToBlock(task.outputs); ++i) {
    uint8_t* target = tiles + i / kBlockSide * steps * kStepBytes + i % kBlockSide * kTileRowBytes;
    if (i >= task.outputs) {
      for (int64_t step = 0; step < steps; ++step) {
        _mm512_store_si512(target + step * kStepBytes, _mm512_setzero_si512());
      }
      continue;
    }
    PrefetchRow(w, task.output + i + kRowsAhead, element, elements);
    RowReader<kWeight> row(w, task.output + i);
    for (int64_t step = 0; step < steps; ++step) {
      _mm512_store_si512(target + step * kStepBytes, row.Run(codes, element + step * kBlockSide, step == 0));
    }
  }
}

template <Dtype kWeight>
static void FillColumnTiles(const Nf4Weight& w, const TaskRegion& task, int64_t element, int64_t elements,
                            uint8_t* tiles) {
  const Table codes = LoadTable(kNf4Code.value);
  const int64_t steps = CeilDivide(elements, kBlockSide);
  for (int64_t pair = 0; pair < steps * kTileSide; ++pair) {
    uint8_t* target = tiles + pair / kTileSide * kStepBytes + pair % kTileSide * kTileRowBytes;
    const int64_t out = element + 2 * pair;
    const int64_t exist = Smaller(2, element + elements - out);  // rows past the end are 0
    for (int i = 0; i < 2; ++i) PrefetchRow(w, out + kRowsAhead + i, task.output, task.outputs);
    RowReader<kWeight> first_row(w, out), second_row(w, out + 1);
    for (int64_t column = 0; column < task.outputs; column += kRun, target += steps * kStepBytes) {
      const int64_t in = task.output + column;
      const __m512i first = exist > 0 ? first_row.Run(codes, in, column == 0) : _mm512_setzero_si512();
      const __m512i second = exist > 1 ? second_row.Run(codes, in, column == 0) : _mm512_setzero_si512();
      // 128 bits q of a run hold weights q, 4 + q, 8 + q and so on: the lower tile takes 0 to 15, the upper 16 to 31.
      _mm512_store_si512(target, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(target + kTileBytes, _mm512_unpackhi_epi16(first, second));
    }
  }
}

// Blocks of the forward hold y^T: 32 outputs by 32 rows.
static void StoreForward(const Problem& problem, const TaskRegion& task, const float* sums) {
  const int64_t row_groups = CeilDivide(task.rows, kBlockSide);
  for (int64_t group = 0; group < row_groups; ++group) {
    for (int64_t output = 0; output < task.outputs; output += kBlockSide) {
      const float* block = sums + (output / kBlockSide * row_groups + group) * kBlockSums;
      const int64_t outputs = Smaller(kBlockSide, task.outputs - output);
      const __mmask32 valid = static_cast<__mmask32>((uint64_t{1} << outputs) - 1);
      for (int half = 0; half < 2; ++half) {
        const int64_t first = group * kBlockSide + half * kTileSide;
        const int64_t rows = Smaller(kTileSide, task.rows - first);
        if (rows <= 0) break;
        __m512i low[kTileSide], high[kTileSide];
        for (int i = 0; i < kTileSide; ++i) {
          low[i] = _mm512_load_si512(block + (half * kTileSide + i) * kTileSide);
          high[i] = _mm512_load_si512(block + ((2 + half) * kTileSide + i) * kTileSide);
        }
        Transpose(low);
        Transpose(high);
        uint16_t* y = static_cast<uint16_t*>(problem.y) + (task.row + first) * problem.outputs + task.output + output;
        for (int64_t i = 0; i < rows; ++i, y += problem.outputs) {
          const __m256i halves[2] = {Bfloat16Halves(_mm512_castsi512_ps(low[i])),
                                     Bfloat16Halves(_mm512_castsi512_ps(high[i]))};
          _mm512_mask_storeu_epi16(y, valid, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
        }
      }
    }
  }
}

// Blocks of dx hold 32 rows by 32 columns; column 4q + t of a tile is column 4t + q of the result.
static void StoreInputGradient(const Problem& problem, const TaskRegion& task, const float* sums) {
  const int64_t row_groups = CeilDivide(task.rows, kBlockSide);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t row = 0; row < task.rows; ++row) {
    uint16_t* dx = static_cast<uint16_t*>(problem.y) + (task.row + row) * problem.outputs + task.output;
    for (int64_t output = 0; output < task.outputs; output += kBlockSide) {
      const float* block = sums + (output / kBlockSide * row_groups + row / kBlockSide) * kBlockSums;
      const float* tiles = block + (row % kBlockSide / kTileSide * 2 * kTileSide + row % kTileSide) * kTileSide;
      for (int half = 0; half < 2; ++half) {
        const __m512 values = _mm512_load_ps(tiles + half * kTileSide * kTileSide);
        StoreAs<Dtype::kBfloat16>(dx + output + half * kTileSide, _mm512_permutexvar_ps(order, values));
      }
    }
  }
}

static TileConfig FullTiles() {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kTileRowBytes;
    config.rows[i] = kTileSide;
  }
  return config;
}

struct Tiles {
  static bool Takes(const Problem& problem) {
    return problem.dtype == Dtype::kBfloat16 && HasWholeRuns(problem.weight);
  }

  static Plan MakePlan(const Problem& problem, int64_t threads) {
    const int64_t row_groups = CeilDivide(problem.rows, kBlockSide);
    const int64_t output_groups = CeilDivide(problem.outputs, kBlockSide);
    const int64_t row_parts = CeilDivide(problem.rows, kMaxTaskRows);
    // Four tasks a thread balance the load.
    const int64_t output_parts = CeilDivide(4 * threads, row_parts);
    const int64_t most = problem.rows <= kFewRows ? kFewRowsTaskOutputs : kMaxTaskOutputs;
    Plan plan;
    plan.packed_bytes = row_groups * PackedGroupBytes(problem);
    plan.pack_tasks = row_groups;
    plan.tile_rows = CeilDivide(row_groups, row_parts) * kBlockSide;
    plan.tile_outputs = Smaller(CeilDivide(output_groups, output_parts) * kBlockSide, most);
    plan.tasks = CeilDivide(problem.rows, plan.tile_rows) * CeilDivide(problem.outputs, plan.tile_outputs);
    plan.workspace_bytes = plan.tile_outputs * kChunkTileSteps * kTileRowBytes +
                           plan.tile_outputs * plan.tile_rows * int64_t{sizeof(float)};
    return plan;
  }

  template <Dtype kWeight>
  static void MultiplyTask(const Problem& problem, const TaskRegion& task, const uint8_t* packed, uint8_t* weights,
                           float* sums) {
    const int64_t row_groups = CeilDivide(task.rows, kBlockSide);
    const int64_t output_groups = CeilDivide(task.outputs, kBlockSide);
    const int64_t group_bytes = PackedGroupBytes(problem);
    for (int64_t element = 0; element < problem.reduction; element += kChunkTileSteps * kBlockSide) {
      const int64_t elements = Smaller(kChunkTileSteps * kBlockSide, problem.reduction - element);
      const int64_t steps = CeilDivide(elements, kBlockSide);
      if (problem.input_gradient) {
        FillColumnTiles<kWeight>(problem.weight, task, element, elements, weights);
      } else {
        FillRowTiles<kWeight>(problem.weight, task, element, elements, weights);
      }
      const uint8_t* x = packed + task.row / kBlockSide * group_bytes + element / kBlockSide * kStepBytes;
      for (int64_t output_group = 0; output_group < output_groups; ++output_group) {
        const uint8_t* w = weights + output_group * steps * kStepBytes;
        for (int64_t row_group = 0; row_group < row_groups; ++row_group) {
          const bool whole = task.rows - row_group * kBlockSide > kTileSide;
          float* block = sums + (output_group * row_groups + row_group) * kBlockSums;
          const uint8_t* a = x + row_group * group_bytes;
          const auto multiply = problem.input_gradient ? (whole ? MultiplyBlockTiles<2, 2> : MultiplyBlockTiles<1, 2>)
                                                       : (whole ? MultiplyBlockTiles<2, 2> : MultiplyBlockTiles<2, 1>);
          multiply(problem.input_gradient ? a : w, problem.input_gradient ? w : a, steps, element > 0, block);
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
    uint8_t* weights = static_cast<uint8_t*>(workspace);
    float* sums = reinterpret_cast<float*>(weights + plan.tile_outputs * kChunkTileSteps * kTileRowBytes);
    const uint8_t* x = static_cast<const uint8_t*>(packed);

    // The thread is XLA's: its tiles are in use for this task alone.
    LoadTileConfig(FullTiles());
    switch (problem.weight_dtype) {
      case Dtype::kFloat32:
        MultiplyTask<Dtype::kFloat32>(problem, task, x, weights, sums);
        break;
      case Dtype::kBfloat16:
        MultiplyTask<Dtype::kBfloat16>(problem, task, x, weights, sums);
        break;
      case Dtype::kFloat16:
        MultiplyTask<Dtype::kFloat16>(problem, task, x, weights, sums);
        break;
    }
    ReleaseTiles();
    if (problem.input_gradient) {
      StoreInputGradient(problem, task, sums);
    } else {
      StoreForward(problem, task, sums);
    }
  }

  static constexpr Method kMethod = {MakePlan, PackGroup, Multiply};
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_TILES_H_
