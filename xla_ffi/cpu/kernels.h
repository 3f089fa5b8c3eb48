// The kernels, written once over the vector operations of an instruction set.
//
// A file that includes this header has defined QLORA_JAX_ISA, the namespace of its instruction set, included problem.h,
// and defined in that namespace:
//   Vector, Indices            kLanes float32 values; kLanes 32-bit integers with a 4-bit code in their low bits
//   Table                      16 float32 values that codes look up
//   kTileRows, kTileVectors    register tile: rows of x, vectors of outputs
//   Zero, Load, Store, Broadcast, Add, Multiply, MultiplyAdd(a, b, c) = a * b + c
//   Round<Dtype>               float32 values rounded to a dtype
//   LoadAs<Dtype>, StoreAs<Dtype>      kLanes activations, from and to float32 values
//   LoadTable(values), Scale(table, factor), Lookup(table, indices), ShiftRight(indices, bits)
//   RowCodes(bytes)            codes of kLanes consecutive weights
//   ColumnCodes(rows, out)     32 consecutive weights from each of kLanes rows: out[j] >> kCodeShift[i] holds weight
//                              8 * j + i of every row
// Everything here lies in that namespace, so that no two instruction sets share a function.
//
// Vectors run along the outputs, in both directions. Forward, outputs are rows of the stored matrix: a vector is a
// piece of a column. For the gradient of the input they are its columns: a vector is a piece of a row. So one packed
// copy serves both, neither weights nor activations are transposed, and x and y are walked row by row.

namespace qlora_jax::QLORA_JAX_ISA {

constexpr Nf4Code kNf4Code = MakeNf4Code();
constexpr DynamicMap kDynamicMap = MakeDynamicMap();

// Where the 8 codes lie in 32 bits of packed weights: the high nibble of a byte comes first.
constexpr int kCodeShift[8] = {4, 0, 12, 8, 20, 16, 28, 24};

// Consecutive weights that ColumnCodes takes from each row. The vector paths need them to share a scale.
constexpr int kRun = 32;

static inline int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <Dtype kDtype>
struct Stored {
  using Type = uint16_t;
};
template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
};

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

// Whether every run of kRun weights, counted from the start of its row, lies in whole bytes and under one scale.
static inline bool HasWholeRuns(const Nf4Weight& w) {
  return ((w.in_features | int64_t{1} << w.block_shift) & (kRun - 1)) == 0;
}

// Weights round first to the weight's dtype; where it is the activations' dtype, that one rounding is all.
template <Dtype kWeight, Dtype kActivation>
static inline Vector RoundFirst(Vector weights) {
  return kWeight == kActivation ? weights : Round<kWeight>(weights);
}

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

template <class Steps, Dtype kWeight, Dtype kActivation>
static void MultiplyTile(const Problem& problem, const uint32_t* packed, const Tile& tile, float* panel, float* sums) {
  constexpr int64_t chunk_elements = kChunkSteps * Steps::kElements;
  Region region;
  region.output = tile.panel * kPanelWidth;
  region.outputs = Smaller(kPanelWidth, problem.outputs - region.output);
  const int64_t vectors = (region.outputs + kLanes - 1) / kLanes;
  const int64_t rows = tile.row_end - tile.row_begin;
  for (region.reduction = 0; region.reduction < problem.reduction; region.reduction += chunk_elements) {
    region.elements = Smaller(chunk_elements, problem.reduction - region.reduction);
    Fill<Steps, kWeight, kActivation>(problem, region, panel);
    const int64_t steps = (region.elements + Steps::kElements - 1) / Steps::kElements;
    const uint32_t* x =
        packed + (region.reduction / chunk_elements * problem.rows + tile.row_begin) * int64_t{kChunkSteps};
    for (int64_t row = 0; row < rows; row += kTileRows) {
      for (int64_t i = 0; i < vectors; i += kTileVectors) {
        MultiplyAnyBlock<Steps, kTileRows, kTileVectors>(
            Smaller(kTileRows, rows - row), Smaller(kTileVectors, vectors - i), x + row * kChunkSteps,
            panel + i * kLanes, steps, region.reduction > 0, sums + row * kPanelWidth + i * kLanes);
      }
    }
  }
  StoreRows<kActivation>(problem, tile, region.outputs, sums);
}

// Copies rows of x chunk by chunk, as the words that steps take; an odd last pair is filled with 0.
template <class Steps, Dtype kActivation>
static void PackRows(const Problem& problem, int64_t row_begin, int64_t row_end, uint32_t* packed) {
  using T = typename Stored<kActivation>::Type;
  constexpr int64_t chunk_elements = kChunkSteps * Steps::kElements;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(problem.x) + row * problem.reduction;
    uint32_t* target = packed + row * kChunkSteps;
    for (int64_t first = 0; first < problem.reduction; first += chunk_elements) {
      const int64_t elements = Smaller(chunk_elements, problem.reduction - first);
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

// The kernels with `Bfloat16Steps` for bfloat16 activations and Float32Steps for the others.
template <class Bfloat16Steps>
struct Kernels {
  static int ElementsPerStep(Dtype dtype) {
    return dtype == Dtype::kBfloat16 ? Bfloat16Steps::kElements : Float32Steps::kElements;
  }

  static void Pack(const Problem& problem, int64_t row_begin, int64_t row_end, uint32_t* packed) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return PackRows<Float32Steps, Dtype::kFloat32>(problem, row_begin, row_end, packed);
      case Dtype::kBfloat16:
        return PackRows<Bfloat16Steps, Dtype::kBfloat16>(problem, row_begin, row_end, packed);
      case Dtype::kFloat16:
        return PackRows<Float32Steps, Dtype::kFloat16>(problem, row_begin, row_end, packed);
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

  static void Multiply(const Problem& problem, const uint32_t* packed, const Tile& tile, float* panel, float* sums) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return MultiplyAs<Float32Steps, Dtype::kFloat32>(problem, packed, tile, panel, sums);
      case Dtype::kBfloat16:
        return MultiplyAs<Bfloat16Steps, Dtype::kBfloat16>(problem, packed, tile, panel, sums);
      case Dtype::kFloat16:
        return MultiplyAs<Float32Steps, Dtype::kFloat16>(problem, packed, tile, panel, sums);
    }
  }

  static constexpr InstructionSet Named(const char* name) { return {name, ElementsPerStep, Pack, Multiply}; }
};

}  // namespace qlora_jax::QLORA_JAX_ISA
