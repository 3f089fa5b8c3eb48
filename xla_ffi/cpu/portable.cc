// Any machine: vectors of 4 lanes as GCC and Clang spell them, which become SSE2 or NEON; scalar lookups and roundings.
#define QLORA_JAX_ISA portable

#include "problem.h"

namespace qlora_jax::portable {

constexpr int kLanes = 4;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;

typedef float Vector __attribute__((vector_size(16)));
typedef uint32_t Indices __attribute__((vector_size(16)));
struct Table {
  float value[16];
};

static inline Vector Splat(float value) { return Vector{value, value, value, value}; }

static inline Vector Zero() { return Splat(0.0f); }
static inline Vector Load(const float* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}
static inline void Store(float* target, Vector value) { __builtin_memcpy(target, &value, sizeof value); }
static inline Vector Broadcast(const uint32_t* word) { return Splat(FloatFromBits(*word)); }
static inline Vector Add(Vector a, Vector b) { return a + b; }
static inline Vector Multiply(Vector a, Vector b) { return a * b; }
static inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return a * b + c; }

template <Dtype kDtype>
static inline Vector Round(Vector value) {
  if constexpr (kDtype == Dtype::kFloat32) return value;
  for (int i = 0; i < kLanes; ++i) value[i] = RoundTo(kDtype, value[i]);
  return value;
}

template <Dtype kDtype>
static inline Vector LoadAs(const void* source) {
  if constexpr (kDtype == Dtype::kFloat32) return Load(static_cast<const float*>(source));
  const uint16_t* halves = static_cast<const uint16_t*>(source);
  Vector value;
  for (int i = 0; i < kLanes; ++i) {
    value[i] = kDtype == Dtype::kFloat16 ? FromFloat16Bits(halves[i]) : FromBfloat16Bits(halves[i]);
  }
  return value;
}

template <Dtype kDtype>
static inline void StoreAs(void* target, Vector value) {
  if constexpr (kDtype == Dtype::kFloat32) return Store(static_cast<float*>(target), value);
  uint16_t* halves = static_cast<uint16_t*>(target);
  for (int i = 0; i < kLanes; ++i) {
    halves[i] = kDtype == Dtype::kFloat16 ? Float16Bits(value[i]) : Bfloat16Bits(value[i]);
  }
}

static inline Table LoadTable(const float* values) {
  Table table;
  __builtin_memcpy(&table, values, sizeof table);
  return table;
}
static inline Table Scale(Table table, float factor) {
  for (float& value : table.value) value *= factor;
  return table;
}
static inline Vector Lookup(const Table& table, Indices indices) {
  return Vector{table.value[indices[0] & 15], table.value[indices[1] & 15], table.value[indices[2] & 15],
                table.value[indices[3] & 15]};
}
static inline Indices ShiftRight(Indices indices, int bits) { return indices >> static_cast<uint32_t>(bits); }

static inline Indices RowCodes(const uint8_t* bytes) {
  return Indices{static_cast<uint32_t>(bytes[0] >> 4), bytes[0], static_cast<uint32_t>(bytes[1] >> 4), bytes[1]};
}

static inline uint32_t LittleEndianWord(const uint8_t* bytes) {
  return bytes[0] | static_cast<uint32_t>(bytes[1]) << 8 | static_cast<uint32_t>(bytes[2]) << 16 |
         static_cast<uint32_t>(bytes[3]) << 24;
}

static inline void ColumnCodes(const uint8_t* const rows[kLanes], Indices columns[4]) {
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < kLanes; ++i) columns[j][i] = LittleEndianWord(rows[i] + 4 * j);
  }
}

}  // namespace qlora_jax::portable

#include "panels.h"

namespace qlora_jax {

const InstructionSet& Portable() {
  static constexpr InstructionSet set = {"portable", [](const Problem&) -> const Method& {
    return portable::Panels<portable::Float32Steps>::kMethod;
  }};
  return set;
}

}  // namespace qlora_jax
