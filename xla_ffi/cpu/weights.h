// What the kernels of every method share: the codes, runs of weights under one scale, roundings.
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
#ifndef QLORA_JAX_CPU_WEIGHTS_H_
#define QLORA_JAX_CPU_WEIGHTS_H_

namespace qlora_jax::QLORA_JAX_ISA {

constexpr Nf4Code kNf4Code = MakeNf4Code();
constexpr DynamicMap kDynamicMap = MakeDynamicMap();

// Consecutive weights that are decoded at once. The vector paths need them to share a scale.
constexpr int kRun = 32;

template <Dtype kDtype>
struct Stored {
  using Type = uint16_t;
};
template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
};

template <Dtype kDtype>
static inline float ToFloat(typename Stored<kDtype>::Type value) {
  if constexpr (kDtype == Dtype::kFloat32) return value;
  if constexpr (kDtype == Dtype::kFloat16) return FromFloat16Bits(value);
  if constexpr (kDtype == Dtype::kBfloat16) return FromBfloat16Bits(value);
}

static inline int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t Larger(int64_t a, int64_t b) { return a < b ? b : a; }
static inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every run of kRun weights, counted from the start of its row, lies in whole bytes and under one scale.
static inline bool HasWholeRuns(const Nf4Weight& w) {
  return ((w.in_features | int64_t{1} << w.block_shift) & (kRun - 1)) == 0;
}

// Weights round first to the weight's dtype; where it is the activations' dtype, that one rounding is all.
template <Dtype kWeight, Dtype kActivation>
static inline Vector RoundFirst(Vector weights) {
  return kWeight == kActivation ? weights : Round<kWeight>(weights);
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_WEIGHTS_H_
