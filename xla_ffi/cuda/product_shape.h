// Sizes of the fused product kernels: what the kernels are compiled for and what the launch plans ask for.
// Plain constants for host and device code, no standard library.
#ifndef QLORA_JAX_CUDA_PRODUCT_SHAPE_H_
#define QLORA_JAX_CUDA_PRODUCT_SHAPE_H_

namespace qlora_jax {

// Weights of one contraction step, and the side of the square tile in which packed weights are stored.
constexpr int kTile = 64;
constexpr int kTileBytes = kTile * kTile / 2;
// 256 pairs of codes, one copy for each lane, so that no two lanes of a warp meet in a bank.
constexpr int kPairTableBytes = 256 * 32 * 4;
constexpr int kDynamicMapBytes = 256 * 4;

// One block multiplies `tokens` rows of activations by `rows` output features. Its warps form `k_groups` groups that
// take every k_groups-th contraction step; in a group, `row_warps` warps divide the output features.
struct ProductShape {
  int tokens;
  int row_warps;
  int strips;  // of 16 output features, in a warp
  int k_groups;
  int stages;  // contraction steps in flight

  constexpr int rows() const { return row_warps * strips * 16; }
  constexpr int group_threads() const { return row_warps * 32; }
  constexpr int threads() const { return k_groups * group_threads(); }
  // Packed weights, activations, scale codes and second-level scales (a word each) of one step of one group.
  constexpr int stage_bytes() const { return rows() * kTile / 2 + tokens * kTile * 2 + rows() * 8; }
  constexpr int pipeline_bytes() const {
    return kPairTableBytes + kDynamicMapBytes + k_groups * (rows() * 4 + stages * stage_bytes());
  }
  // Sums of every group as float32; rows are padded by 16 bytes against bank conflicts.
  constexpr int epilogue_bytes() const { return k_groups * tokens * (rows() + 4) * 4; }
  constexpr int shared_bytes() const {
    return pipeline_bytes() > epilogue_bytes() ? pipeline_bytes() : epilogue_bytes();
  }
};

// At most 99 KB each, which every GPU from sm_80 on can give to a block. Few tokens: warps divide the contraction, each
// streams its own weights. Many: warps divide the output features and share the activations.
constexpr ProductShape kProductShapes[] = {
    {8, 1, 4, 4, 4}, {16, 1, 4, 4, 3}, {32, 4, 2, 1, 5}, {64, 4, 2, 1, 4}, {128, 4, 2, 1, 3},
};

constexpr ProductShape ShapeForTokens(int tokens) {
  for (const ProductShape& shape : kProductShapes) {
    if (shape.tokens == tokens) return shape;
  }
  return {};
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_PRODUCT_SHAPE_H_
