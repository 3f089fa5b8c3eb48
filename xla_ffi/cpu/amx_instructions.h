// The tile instructions of AMX-BF16, one function each. amx_model.h has the same functions in plain code.
//
// Inline assembly, not the compiler's intrinsics: GCC 12's tell the compiler neither that tiles are read from memory nor
// that a configuration has 64 bytes, so it may move or drop the stores before them.
#ifndef QLORA_JAX_CPU_AMX_INSTRUCTIONS_H_
#define QLORA_JAX_CPU_AMX_INSTRUCTIONS_H_

namespace qlora_jax::QLORA_JAX_ISA {

static inline void LoadTileConfig(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Returns the tiles to their initial state, in which they cost nothing when threads are switched.
static inline void ReleaseTiles() { asm volatile("tilerelease"); }

template <int kTile>
static inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "n"(kTile));
}

// Rows of a tile lie `stride` bytes apart.
template <int kTile>
static inline void LoadTile(const void* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride), "n"(kTile) : "memory");
}

template <int kTile>
static inline void StoreTile(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(stride), "n"(kTile) : "memory");
}

// sum[i][j] += over the pairs p of a row: a[i][2p] * b[p][2j] + a[i][2p + 1] * b[p][2j + 1]
template <int kSum, int kA, int kB>
static inline void MultiplyTiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(kSum), "n"(kA), "n"(kB));
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_INSTRUCTIONS_H_
