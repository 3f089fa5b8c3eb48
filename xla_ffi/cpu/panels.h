// Panels: the method for any number of rows of x. Weights are dequantized into panels of outputs, which stay in the
// cache while rows of x are multiplied by them.
//
// Vectors run along the outputs, in both directions. Forward, outputs are rows of the stored matrix: a vector is a
// piece of a column. For the gradient of the input they are its columns: a vector is a piece of a row. So one packed
// copy serves both, neither weights nor activations are transposed, and x and y are walked row by row.
//
// Activations are packed once per call, as 32-bit words [chunk][row][kChunkSteps]: a word is what one multiply-add
// step takes, one float32 or a pair of bfloat16. Chunks depend on the reduction alone. An adapter is a few more
// elements of the reduction, of which v is the weight.
#ifndef QLORA_JAX_CPU_PANELS_H_
#define QLORA_JAX_CPU_PANELS_H_

#include "weights.h"

namespace qlora_jax::QLORA_JAX_ISA {

// Output features of one panel of dequantized weights, and reduction steps of one chunk: 32 KiB of float32, which
// stays in the first-level cache beside the activations of one register tile.
constexpr int kPanelWidth = 64;
constexpr int kChunkSteps = 128;

// A thread dequantizes a panel once for each tile of rows: tiles of 96 rows and more make that a small part of the
// work, as it costs as much as the products of about 8 rows.
constexpr int64_t kMinTileRows = 96;
constexpr int64_t kMaxTileRows = 768;
constexpr int64_t kPackRows = 16;

// Where the 8 codes lie in 32 bits of packed weights: the high nibble of a byte comes first.
constexpr int kCodeShift[8] = {4, 0, 12, 8, 20, 16, 28, 24};

// A step multiplies one float32 weight by one activation. Other kinds of step take more elements at once.
struct Float32Steps {
  static constexpr int kElements = 1;

  static inline Vector Accumulate(Vector sum, Vector weights, Vector x) { return MultiplyAdd(weights, x, sum); }

  // Puts weights of reduction elements `element` (even) and `element + 1`, of kLanes outputs from `lane` on.
  template <Dtype kActivation>
  static inline void Put(float* panel, int64_t element, int64_t lane, Vector first, Vector second) {
    float* target = panel + element * kPanelWidth + lane;
    Store(target, Round<kActivation>(first));
    Store(target + kPanelWidth, Round<kActivation>(second));
  }

  static inline void PutOne(float* panel, int64_t element, int64_t lane, float weight) {
    panel[element * kPanelWidth + lane] = weight;
  }
};

// The part of a weight that a panel holds for one chunk of the reduction.
struct Region {
  int64_t output;  // first
  int64_t outputs;
  int64_t reduction;  // first
  int64_t elements;
};

// Rows [row_begin, row_end) of one panel of outputs.
struct Tile {
  int64_t panel;
  int64_t row_begin;
  int64_t row_end;
};

template <class Steps, Dtype kWeight, Dtype kActivation>
static void FillForward(const Nf4Weight& w, const Region& region, float* panel) {
  const Table codes = LoadTable(kNf4Code.value);
  const int64_t block_mask = (int64_t{1} << w.block_shift) - 1;
  const bool aligned_blocks = (w.in_features & block_mask) == 0;
  for (int64_t lane = 0; lane < region.outputs; lane += kLanes) {
    alignas(64) float scales[kLanes];
    const uint8_t* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      // Lanes past the end repeat the last row under a scale of 0.
      const int64_t out = region.output + Smaller(lane + i, region.outputs - 1);
      rows[i] = w.packed + (out * w.in_features + region.reduction) / 2;
      scales[i] = 0.0f;
    }
    for (int64_t element = 0; element < region.elements; element += kRun) {
      const int64_t in = region.reduction + element;
      if (element == 0 || !aligned_blocks || (in & block_mask) == 0) {
        const int64_t valid = Smaller(kLanes, region.outputs - lane);
        for (int64_t i = 0; i < valid; ++i) {
          scales[i] = BlockScale(w, kDynamicMap.value, region.output + lane + i, in);
        }
      }
      const Vector scale = Load(scales);
      Indices runs[kRun / 8];
      ColumnCodes(rows, runs);
      for (int j = 0; j < kRun / 8; ++j) {
        for (int i = 0; i < 8; i += 2) {
          const Vector first = Multiply(Lookup(codes, ShiftRight(runs[j], kCodeShift[i])), scale);
          const Vector second = Multiply(Lookup(codes, ShiftRight(runs[j], kCodeShift[i + 1])), scale);
          Steps::template Put<kActivation>(panel, element + 8 * j + i, lane, RoundFirst<kWeight, kActivation>(first),
                                           RoundFirst<kWeight, kActivation>(second));
        }
      }
      for (int i = 0; i < kLanes; ++i) rows[i] += kRun / 2;
    }
  }
}

template <class Steps, Dtype kWeight, Dtype kActivation>
static void FillInputGradient(const Nf4Weight& w, const Region& region, float* panel) {
  const Table codes = LoadTable(kNf4Code.value);
  const int64_t block_mask = (int64_t{1} << w.block_shift) - 1;
  for (int64_t element = 0; element < region.elements; element += 2) {
    Table tables[2] = {codes, codes};
    for (int64_t lane = 0; lane < region.outputs; lane += kLanes) {
      Vector weights[2];
      for (int i = 0; i < 2; ++i) {
        // An odd reduction ends in a row of zeros.
        const bool exists = element + i < region.elements;
        const int64_t out = region.reduction + Smaller(element + i, region.elements - 1);
        const int64_t in = region.output + lane;
        if (lane == 0 || ((out * w.in_features + in) & block_mask) == 0) {
          tables[i] = Scale(codes, exists ? BlockScale(w, kDynamicMap.value, out, in) : 0.0f);
        }
        weights[i] = Lookup(tables[i], RowCodes(w.packed + (out * w.in_features + in) / 2));
      }
      Steps::template Put<kActivation>(panel, element, lane, RoundFirst<kWeight, kActivation>(weights[0]),
                                       RoundFirst<kWeight, kActivation>(weights[1]));
    }
  }
}

// Any shape: rows may begin in the middle of a byte, and blocks in the middle of a row.
template <class Steps, Dtype kWeight, Dtype kActivation>
static void FillOneByOne(const Problem& problem, const Region& region, float* panel) {
  const Nf4Weight& w = problem.weight;
  const int64_t block_mask = (int64_t{1} << w.block_shift) - 1;
  const int64_t first_out = problem.input_gradient ? region.reduction : region.output;
  const int64_t first_in = problem.input_gradient ? region.output : region.reduction;
  const int64_t outs = problem.input_gradient ? region.elements : region.outputs;
  const int64_t ins = problem.input_gradient ? region.outputs : region.elements;
  __builtin_memset(panel, 0, sizeof(float) * kChunkSteps * kPanelWidth);
  for (int64_t i = 0; i < outs; ++i) {
    float scale = 0.0f;
    for (int64_t j = 0; j < ins; ++j) {
      const int64_t weight = (first_out + i) * w.in_features + first_in + j;
      if (j == 0 || (weight & block_mask) == 0) scale = BlockScale(w, kDynamicMap.value, first_out + i, first_in + j);
      const float product = MultiplyRounded(kNf4Code.value[Code(w.packed, weight)], scale);
      const float rounded = RoundTo(kActivation, RoundTo(kWeight, product));
      if (problem.input_gradient) {
        Steps::PutOne(panel, i, j, rounded);
      } else {
        Steps::PutOne(panel, j, i, rounded);
      }
    }
  }
}

template <class Steps, Dtype kWeight, Dtype kActivation>
static void Fill(const Problem& problem, const Region& region, float* panel) {
  if (!HasWholeRuns(problem.weight)) {
    FillOneByOne<Steps, kWeight, kActivation>(problem, region, panel);
  } else if (problem.input_gradient) {
    FillInputGradient<Steps, kWeight, kActivation>(problem.weight, region, panel);
  } else {
    FillForward<Steps, kWeight, kActivation>(problem.weight, region, panel);
  }
}

// sums[row][output] (+)= sum over the steps of x[row][step] * panel[step][output], the new part summed in registers.
template <class Steps, int kRows, int kVectors>
static void MultiplyBlock(const uint32_t* x, const float* panel, int64_t steps, bool add, float* sums) {
  Vector parts[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) parts[row][i] = Zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vector weights[kVectors];
    for (int i = 0; i < kVectors; ++i) weights[i] = Load(panel + step * kPanelWidth + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Vector broadcast = Broadcast(x + row * kChunkSteps + step);
      for (int i = 0; i < kVectors; ++i) parts[row][i] = Steps::Accumulate(parts[row][i], weights[i], broadcast);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) {
      float* target = sums + row * kPanelWidth + i * kLanes;
      Store(target, add ? Add(Load(target), parts[row][i]) : parts[row][i]);
    }
  }
}

// Chooses the block of `rows` <= kRows and `vectors` <= kVectors.
template <class Steps, int kRows, int kVectors>
static inline void MultiplyAnyBlock(int64_t rows, int64_t vectors, const uint32_t* x, const float* panel,
                                    int64_t steps, bool add, float* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return MultiplyAnyBlock<Steps, kRows - 1, kVectors>(rows, vectors, x, panel, steps, add, sums);
  }
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return MultiplyAnyBlock<Steps, kRows, kVectors - 1>(rows, vectors, x, panel, steps, add, sums);
    }
  }
  MultiplyBlock<Steps, kRows, kVectors>(x, panel, steps, add, sums);
}

template <Dtype kActivation>
static void StoreRows(const Problem& problem, const Tile& tile, int64_t outputs, const float* sums) {
  using T = typename Stored<kActivation>::Type;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row, sums += kPanelWidth) {
    T* y = static_cast<T*>(problem.y) + row * problem.outputs + tile.panel * kPanelWidth;
    int64_t i = 0;
    for (; i + kLanes <= outputs; i += kLanes) StoreAs<kActivation>(y + i, Load(sums + i));
    if (i < outputs) {
      T rest[kLanes];
      StoreAs<kActivation>(rest, Load(sums + i));
      __builtin_memcpy(y + i, rest, sizeof(T) * (outputs - i));
    }
  }
}

// The part of v^T that a panel holds for one chunk of the rank, as if it were a part of the weight.
template <class Steps, Dtype kActivation>
static void FillAdapter(const Problem& problem, const Region& region, float* panel) {
  using T = typename Stored<kActivation>::Type;
  __builtin_memset(panel, 0, sizeof(float) * kChunkSteps * kPanelWidth);
  for (int64_t i = 0; i < region.outputs; ++i) {
    const T* v = static_cast<const T*>(problem.v) + (region.output + i) * problem.rank + region.reduction;
    for (int64_t j = 0; j < region.elements; ++j) Steps::PutOne(panel, j, i, ToFloat<kActivation>(v[j]));
  }
}

// Elements of x and then of u, in chunks; chunks of u begin anew.
template <class Steps>
static int64_t Chunks(int64_t elements) {
  return CeilDivide(elements, int64_t{kChunkSteps} * Steps::kElements);
}

template <class Steps, Dtype kWeight, Dtype kActivation>
static void MultiplyTile(const Problem& problem, const uint32_t* packed, const Tile& tile, float* panel, float* sums) {
  constexpr int64_t chunk_elements = kChunkSteps * Steps::kElements;
  Region region;
  region.output = tile.panel * kPanelWidth;
  region.outputs = Smaller(kPanelWidth, problem.outputs - region.output);
  const int64_t vectors = (region.outputs + kLanes - 1) / kLanes;
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t own_chunks = Chunks<Steps>(problem.reduction);
  for (int64_t chunk = 0; chunk < own_chunks + Chunks<Steps>(problem.rank); ++chunk) {
    const bool adapter = chunk >= own_chunks;
    region.reduction = (adapter ? chunk - own_chunks : chunk) * chunk_elements;
    region.elements = Smaller(chunk_elements, (adapter ? problem.rank : problem.reduction) - region.reduction);
    if (adapter) {
      FillAdapter<Steps, kActivation>(problem, region, panel);
    } else {
      Fill<Steps, kWeight, kActivation>(problem, region, panel);
    }
    const int64_t steps = CeilDivide(region.elements, Steps::kElements);
    const uint32_t* x = packed + (chunk * problem.rows + tile.row_begin) * int64_t{kChunkSteps};
    for (int64_t row = 0; row < rows; row += kTileRows) {
      for (int64_t i = 0; i < vectors; i += kTileVectors) {
        MultiplyAnyBlock<Steps, kTileRows, kTileVectors>(
            Smaller(kTileRows, rows - row), Smaller(kTileVectors, vectors - i), x + row * kChunkSteps,
            panel + i * kLanes, steps, chunk > 0, sums + row * kPanelWidth + i * kLanes);
      }
    }
  }
  StoreRows<kActivation>(problem, tile, region.outputs, sums);
}

// Copies rows of a matrix of `columns` chunk by chunk, as the words that steps take; an odd last pair is filled with 0.
template <class Steps, Dtype kActivation>
static void PackMatrix(const Problem& problem, const void* matrix, int64_t columns, int64_t row_begin, int64_t row_end,
                       uint32_t* packed) {
  using T = typename Stored<kActivation>::Type;
  constexpr int64_t chunk_elements = kChunkSteps * Steps::kElements;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(matrix) + row * columns;
    uint32_t* target = packed + row * kChunkSteps;
    for (int64_t first = 0; first < columns; first += chunk_elements) {
      const int64_t elements = Smaller(chunk_elements, columns - first);
      if constexpr (Steps::kElements == 2) {
        if (elements % 2 != 0) target[elements / 2] = 0;
        __builtin_memcpy(target, x + first, sizeof(T) * elements);
      } else {
        float* words = reinterpret_cast<float*>(target);
        int64_t i = 0;
        for (; i + kLanes <= elements; i += kLanes) Store(words + i, LoadAs<kActivation>(x + first + i));
        if (i < elements) {
          T rest[kLanes] = {};
          __builtin_memcpy(rest, x + first + i, sizeof(T) * (elements - i));
          Store(words + i, LoadAs<kActivation>(rest));
        }
      }
      target += problem.rows * kChunkSteps;
    }
  }
}

template <class Steps, Dtype kActivation>
static void PackRows(const Problem& problem, int64_t row_begin, int64_t row_end, uint32_t* packed) {
  PackMatrix<Steps, kActivation>(problem, problem.x, problem.reduction, row_begin, row_end, packed);
  packed += Chunks<Steps>(problem.reduction) * problem.rows * kChunkSteps;
  PackMatrix<Steps, kActivation>(problem, problem.u, problem.rank, row_begin, row_end, packed);
}

// Multiplies bfloat16 activations by `Bfloat16Steps` and the others by Float32Steps.
template <class Bfloat16Steps>
struct Panels {
  static int64_t AllChunks(const Problem& problem) {
    return problem.dtype == Dtype::kBfloat16
               ? Chunks<Bfloat16Steps>(problem.reduction) + Chunks<Bfloat16Steps>(problem.rank)
               : Chunks<Float32Steps>(problem.reduction) + Chunks<Float32Steps>(problem.rank);
  }

  static Plan MakePlan(const Problem& problem, int64_t threads) {
    const int64_t panels = CeilDivide(problem.outputs, kPanelWidth);
    // Four tiles a thread balance the load.
    const int64_t row_parts = CeilDivide(4 * threads, panels);
    Plan plan;
    plan.packed_bytes = AllChunks(problem) * problem.rows * kChunkSteps * int64_t{sizeof(uint32_t)};
    plan.pack_tasks = CeilDivide(problem.rows, kPackRows);
    plan.tile_rows = Smaller(Larger(CeilDivide(problem.rows, row_parts), kMinTileRows), kMaxTileRows);
    plan.tile_rows = Smaller(plan.tile_rows, problem.rows);
    plan.tile_outputs = kPanelWidth;
    plan.tasks = panels * CeilDivide(problem.rows, plan.tile_rows);
    plan.workspace_bytes = (kChunkSteps + plan.tile_rows) * kPanelWidth * int64_t{sizeof(float)};
    return plan;
  }

  static void Pack(const Problem& problem, int64_t task, void* packed) {
    const int64_t begin = task * kPackRows;
    const int64_t end = Smaller(begin + kPackRows, problem.rows);
    uint32_t* words = static_cast<uint32_t*>(packed);
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return PackRows<Float32Steps, Dtype::kFloat32>(problem, begin, end, words);
      case Dtype::kBfloat16:
        return PackRows<Bfloat16Steps, Dtype::kBfloat16>(problem, begin, end, words);
      case Dtype::kFloat16:
        return PackRows<Float32Steps, Dtype::kFloat16>(problem, begin, end, words);
    }
  }

  template <class Steps, Dtype kActivation>
  static void MultiplyAs(const Problem& problem, const uint32_t* packed, const Tile& tile, float* panel, float* sums) {
    switch (problem.weight_dtype) {
      case Dtype::kFloat32:
        return MultiplyTile<Steps, Dtype::kFloat32, kActivation>(problem, packed, tile, panel, sums);
      case Dtype::kBfloat16:
        return MultiplyTile<Steps, Dtype::kBfloat16, kActivation>(problem, packed, tile, panel, sums);
      case Dtype::kFloat16:
        return MultiplyTile<Steps, Dtype::kFloat16, kActivation>(problem, packed, tile, panel, sums);
    }
  }

  static void Multiply(const Problem& problem, const Plan& plan, int64_t task, const void* packed, void* workspace) {
    const int64_t row_tiles = CeilDivide(problem.rows, plan.tile_rows);
    const int64_t row = task % row_tiles * plan.tile_rows;
    const Tile tile{task / row_tiles, row, Smaller(row + plan.tile_rows, problem.rows)};
    const uint32_t* words = static_cast<const uint32_t*>(packed);
    float* panel = static_cast<float*>(workspace);
    float* sums = panel + int64_t{kChunkSteps} * kPanelWidth;
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return MultiplyAs<Float32Steps, Dtype::kFloat32>(problem, words, tile, panel, sums);
      case Dtype::kBfloat16:
        return MultiplyAs<Bfloat16Steps, Dtype::kBfloat16>(problem, words, tile, panel, sums);
      case Dtype::kFloat16:
        return MultiplyAs<Float32Steps, Dtype::kFloat16>(problem, words, tile, panel, sums);
    }
  }

  static constexpr Method kMethod = {MakePlan, Pack, Multiply};
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_PANELS_H_
