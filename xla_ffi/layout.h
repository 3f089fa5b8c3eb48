// Where the bytes of a packed weight lie. Plain code for host and device, no standard library.
#ifndef QLORA_JAX_LAYOUT_H_
#define QLORA_JAX_LAYOUT_H_

#include <cstdint>

#include "nf4.h"

namespace qlora_jax {

// Values match the attribute `layout` of the CUDA handlers. Rows: bitsandbytes' order. Fragments: 64x64 tiles in the
// order in which tensor cores take them, both sides padded to whole tiles.
enum class Layout { kRows, kFragments };

constexpr int64_t kFragmentTile = 64;

// Element counts up to this keep every byte count and offset within 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 56;

QLORA_JAX_HOST_DEVICE static constexpr int64_t FragmentTiles(int64_t features) {
  return (features + kFragmentTile - 1) / kFragmentTile;
}

// Bytes of one layer.
QLORA_JAX_HOST_DEVICE static constexpr int64_t PackedBytes(Layout layout, int64_t in_features, int64_t out_features) {
  return layout == Layout::kRows
             ? (in_features * out_features + 1) / 2
             : FragmentTiles(in_features) * FragmentTiles(out_features) * (kFragmentTile * kFragmentTile / 2);
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_LAYOUT_H_
