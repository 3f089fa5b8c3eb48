// Products of tiles: blocks of 32 x 32 sums, four tiles of float32, from two tiles of 16 rows and two of 16 columns at
// every step of 32 reduction elements. A tile of columns holds pairs of reduction elements: its row r the elements 2r
// and 2r + 1 of 16 columns.
//
// Included after avx512_vectors.h and amx_instructions.h or amx_model.h.
#ifndef QLORA_JAX_CPU_AMX_BLOCKS_H_
#define QLORA_JAX_CPU_AMX_BLOCKS_H_

namespace qlora_jax::QLORA_JAX_ISA {

constexpr int kTileSide = 16;              // rows of a tile; columns of a tile of sums
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileSide * kTileRowBytes;
constexpr int kTileSums = kTileSide * kTileSide;
constexpr int kBlockSide = 2 * kTileSide;  // of a block of sums; also the reduction elements of a step

static inline int64_t RoundUpToBlock(int64_t size) { return CeilDivide(size, kBlockSide) * kBlockSide; }

// Tiles of 16 rows or columns each, one after the other along the reduction.
struct Strip {
  const uint8_t* tiles;
  int64_t row_bytes;   // between the rows of a tile
  int64_t step_bytes;  // to the tile of the next step
  int64_t half_bytes;  // to the next 16 rows or columns
};

// Tiles 0 to 3 are a block's sums, 4 and 5 rows, 6 and 7 columns. `kRows` and `kColumns`: how many halves of 16 the block
// has; its sums are kept as tiles [kRows][kColumns].
template <int kRows, int kColumns>
static inline void ZeroSums() {
  ZeroTile<0>();
  if constexpr (kColumns == 2) ZeroTile<1>();
  if constexpr (kRows == 2) ZeroTile<2>();
  if constexpr (kRows == 2 && kColumns == 2) ZeroTile<3>();
}

template <int kRows, int kColumns>
static inline void LoadSums(const float* sums) {
  const float* const second_row = sums + kColumns * kTileSums;
  LoadTile<0>(sums, kTileRowBytes);
  if constexpr (kColumns == 2) LoadTile<1>(sums + kTileSums, kTileRowBytes);
  if constexpr (kRows == 2) LoadTile<2>(second_row, kTileRowBytes);
  if constexpr (kRows == 2 && kColumns == 2) LoadTile<3>(second_row + kTileSums, kTileRowBytes);
}

template <int kRows, int kColumns>
static inline void StoreSums(float* sums) {
  float* const second_row = sums + kColumns * kTileSums;
  StoreTile<0>(sums, kTileRowBytes);
  if constexpr (kColumns == 2) StoreTile<1>(sums + kTileSums, kTileRowBytes);
  if constexpr (kRows == 2) StoreTile<2>(second_row, kTileRowBytes);
  if constexpr (kRows == 2 && kColumns == 2) StoreTile<3>(second_row + kTileSums, kTileRowBytes);
}

// The sums in the tiles += rows x columns.
template <int kRows, int kColumns>
static inline void AddToSums(const Strip& rows, const Strip& columns, int64_t steps) {
  const uint8_t* row_tiles = rows.tiles;
  const uint8_t* column_tiles = columns.tiles;
  for (int64_t step = 0; step < steps; ++step) {
    LoadTile<6>(column_tiles, columns.row_bytes);
    LoadTile<4>(row_tiles, rows.row_bytes);
    MultiplyTiles<0, 4, 6>();
    if constexpr (kColumns == 2) {
      LoadTile<7>(column_tiles + columns.half_bytes, columns.row_bytes);
      MultiplyTiles<1, 4, 7>();
    }
    if constexpr (kRows == 2) {
      LoadTile<5>(row_tiles + rows.half_bytes, rows.row_bytes);
      MultiplyTiles<2, 5, 6>();
    }
    if constexpr (kRows == 2 && kColumns == 2) MultiplyTiles<3, 5, 7>();
    row_tiles += rows.step_bytes;
    column_tiles += columns.step_bytes;
  }
}

// sums (+)= rows x columns.
template <int kRows, int kColumns>
static void MultiplyBlockTiles(const Strip& rows, const Strip& columns, int64_t steps, bool add, float* sums) {
  if (add) {
    LoadSums<kRows, kColumns>(sums);
  } else {
    ZeroSums<kRows, kColumns>();
  }
  AddToSums<kRows, kColumns>(rows, columns, steps);
  StoreSums<kRows, kColumns>(sums);
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

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_BLOCKS_H_
