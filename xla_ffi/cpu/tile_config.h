#ifndef QLORA_JAX_CPU_TILE_CONFIG_H_
#define QLORA_JAX_CPU_TILE_CONFIG_H_

#include <cstdint>

namespace qlora_jax {

// The operand of LDTILECFG, byte for byte (Intel's manual, volume 1, section 18.2). Palette 1 has 8 tiles of up to 16
// rows of up to 64 bytes.
struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_TILE_CONFIG_H_
