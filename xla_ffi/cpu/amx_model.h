// The tile instructions of AMX-BF16 in AVX-512 code, for machines without them: the functions of amx_instructions.h,
// as Intel's manual (volume 2) defines the instructions. What faults there stops the process here.
#ifndef QLORA_JAX_CPU_AMX_MODEL_H_
#define QLORA_JAX_CPU_AMX_MODEL_H_

namespace qlora_jax::QLORA_JAX_ISA {

constexpr int kTiles = 8;
constexpr int kMaxTileRows = 16;
constexpr int kMaxRowBytes = 64;

struct TileState {
  TileConfig config;  // of palette 0: initial, no tile may be touched
  alignas(64) uint8_t tile[kTiles][kMaxTileRows][kMaxRowBytes];
};
static thread_local TileState tile_state;

static inline void FaultUnless(bool condition) {
  if (!condition) __builtin_trap();
}

static inline void LoadTileConfig(const TileConfig& config) {
  FaultUnless(config.palette == 1 && config.start_row == 0);
  for (const uint8_t reserved : config.reserved) FaultUnless(reserved == 0);
  for (int i = 0; i < 16; ++i) {
    FaultUnless(config.row_bytes[i] <= (i < kTiles ? kMaxRowBytes : 0));
    FaultUnless(config.rows[i] <= (i < kTiles ? kMaxTileRows : 0));
    FaultUnless((config.row_bytes[i] == 0) == (config.rows[i] == 0));
  }
  tile_state = TileState{};
  tile_state.config = config;
}

static inline void ReleaseTiles() { tile_state = TileState{}; }

// A tile that may be used: its rows and the bytes of a row are not 0.
static inline void FaultUnlessConfigured(int tile) {
  FaultUnless(tile_state.config.palette == 1 && tile_state.config.rows[tile] != 0);
}

template <int kTile>
static inline void ZeroTile() {
  FaultUnlessConfigured(kTile);
  __builtin_memset(tile_state.tile[kTile], 0, sizeof tile_state.tile[kTile]);
}

template <int kTile>
static inline void LoadTile(const void* source, int64_t stride) {
  ZeroTile<kTile>();
  for (int row = 0; row < tile_state.config.rows[kTile]; ++row) {
    __builtin_memcpy(tile_state.tile[kTile][row], static_cast<const uint8_t*>(source) + row * stride,
                     tile_state.config.row_bytes[kTile]);
  }
}

template <int kTile>
static inline void StoreTile(void* target, int64_t stride) {
  FaultUnlessConfigured(kTile);
  for (int row = 0; row < tile_state.config.rows[kTile]; ++row) {
    __builtin_memcpy(static_cast<uint8_t*>(target) + row * stride, tile_state.tile[kTile][row],
                     tile_state.config.row_bytes[kTile]);
  }
}

// The first and the second elements of all pairs are summed apart, each with fused multiply-adds from 0 on; their sum
// is added to the tile. Subnormal operands and results count as 0, roundings are to the nearest, nothing is raised.
template <int kSum, int kA, int kB>
static inline void MultiplyTiles() {
  const TileConfig& config = tile_state.config;
  FaultUnlessConfigured(kSum);
  FaultUnlessConfigured(kA);
  FaultUnlessConfigured(kB);
  FaultUnless(kSum != kA && kSum != kB && kA != kB);
  FaultUnless(config.rows[kSum] == config.rows[kA] && config.row_bytes[kSum] == config.row_bytes[kB] &&
              config.row_bytes[kA] == 4 * config.rows[kB] && config.row_bytes[kSum] % 4 == 0);

  constexpr unsigned kFlushSubnormalsMaskAll = 0x8000 | 0x0040 | 0x1f80;  // MXCSR: FTZ, DAZ, exceptions masked
  const unsigned caller_mode = _mm_getcsr();
  _mm_setcsr(kFlushSubnormalsMaskAll);
  asm volatile("" : : : "memory");  // keeps the arithmetic between the two changes of mode
  for (int row = 0; row < config.rows[kSum]; ++row) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int pair = 0; pair < config.rows[kB]; ++pair) {
      int a;
      __builtin_memcpy(&a, tile_state.tile[kA][row] + 4 * pair, sizeof a);
      const __m512i a_pair = _mm512_set1_epi32(a);
      const __m512i b_pairs = _mm512_load_si512(tile_state.tile[kB][pair]);
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a_pair, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(b_pairs, 16)), first);
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a_pair, upper)),
                               _mm512_castsi512_ps(_mm512_and_si512(b_pairs, upper)), second);
    }
    float* sum = reinterpret_cast<float*>(tile_state.tile[kSum][row]);
    const __mmask16 columns = static_cast<__mmask16>((1u << config.row_bytes[kSum] / 4) - 1);
    const __m512 total = _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(first, second));
    _mm512_store_ps(sum, _mm512_maskz_mov_ps(columns, total));
  }
  // Rows past the end of a tile are 0 already: loading and zeroing clear them.
  asm volatile("" : : : "memory");
  _mm_setcsr(caller_mode);
}

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_MODEL_H_
