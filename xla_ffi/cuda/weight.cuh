// A packed weight as the kernels see it: the layer that `where` names, block scales, the two byte layouts.
#ifndef QLORA_JAX_CUDA_WEIGHT_CUH_
#define QLORA_JAX_CUDA_WEIGHT_CUH_

#include <cstdint>

#include "../layout.h"
#include "../nf4.h"
#include "product_shape.h"

namespace qlora_jax {

// Read through shared memory: neighbouring lanes look up different entries, which constant memory would serialize.
__device__ const DynamicMap kDynamicMap = MakeDynamicMap();
__device__ const Nf4Code kNf4Code = MakeNf4Code();

// Every kernel's arguments that say what the weight is, in this order. Plain types, so that a launch is plain data.
#define QLORA_JAX_WEIGHT_PARAMETERS                                                                             \
  const uint8_t *packed, const void *absmax, const float *group_scales, const float *offsets, const int32_t *where, \
      int64_t layers, int64_t layer_groups, int64_t row_blocks, int32_t block_shift, int32_t double_quantized
#define QLORA_JAX_WEIGHT_ARGUMENTS \
  packed, absmax, group_scales, offsets, where, layers, layer_groups, row_blocks, block_shift, double_quantized

static_assert(kTile == kFragmentTile);

// The layer that `where` names, and where its scales end (the last word of codes may reach beyond them).
struct LayerWeight : Nf4Weight {
  const uint8_t* scale_codes_end;
};

template <Layout layout>
__device__ LayerWeight SelectLayer(QLORA_JAX_WEIGHT_PARAMETERS, int64_t in_features, int64_t out_features) {
  int64_t layer = where[0];
  layer = layer < 0 ? 0 : layer >= layers ? layers - 1 : layer;
  const int64_t blocks = (in_features * out_features + (int64_t{1} << block_shift) - 1) >> block_shift;
  LayerWeight w;
  w.packed = packed + layer * PackedBytes(layout, in_features, out_features);
  w.scale_codes = double_quantized ? static_cast<const uint8_t*>(absmax) + layer * blocks : nullptr;
  w.scale_codes_end = static_cast<const uint8_t*>(absmax) + layers * blocks;
  w.scales = double_quantized ? nullptr : static_cast<const float*>(absmax) + layer * blocks;
  w.group_scales = group_scales + layer * layer_groups;
  w.offset = double_quantized ? offsets[layer] : 0.0f;
  w.in_features = in_features;
  w.out_features = out_features;
  w.block_shift = block_shift;
  w.row_blocks = row_blocks;
  w.first_row = where[1];
  w.first_block = where[2];
  return w;
}

// Layout "fragments": 64x64 tiles [out / 64][in / 64] of four strips of 16 output features, 32 bundles of 16 bytes each.
// The bundle of lane 4g + t holds four words, one for each 16 input features; byte j of word b holds row g + 8 (j & 1),
// columns 16 b + 2 t + 8 (j >> 1) (low nibble) and the next (high nibble). Byte j is thus register j of the A operand of
// mma.m16n8k16. A lane's bundle lies at chunk `BundleChunk(lane)`: exchanging chunks within a row of eight keeps reads of
// shared memory free of bank conflicts in both directions, for whole and for half bundles.
__device__ inline int BundleChunk(int lane) { return lane ^ (lane >> 3 & 3) << 1; }

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_WEIGHT_CUH_
