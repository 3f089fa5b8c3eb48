// One contraction step on tensor cores, from a stage in shared memory.
//
// The weight is the A operand of mma.m16n8k16: its registers are filled by table look-ups from packed bytes, for w as
// stored, for w^T after merging two lanes' nibbles. Tokens are the product's columns, so sums hold y transposed.
#ifndef QLORA_JAX_CUDA_OPERANDS_CUH_
#define QLORA_JAX_CUDA_OPERANDS_CUH_

#include "step_copies.cuh"

namespace qlora_jax {

template <typename K>
using Sums = float[K::kStrips][K::kColumnTiles][4];

// Shared memory as a warp of a k-group sees it.
template <typename K>
struct WarpView {
  uint32_t table;   // of code pairs
  uint32_t scales;  // decoded, of the present step
  int warp, lane;   // the warp counts in its k-group

  // Codes of a byte of `word` as a pair of T: the low nibble's first.
  __device__ uint32_t CodePair(uint32_t word, int byte) const {
    const uint32_t shifted = byte == 0 ? word << 7 : word >> (8 * byte - 7);
    return LookUp(table + ((shifted & 0x7f80u) | lane * 4));  // one instruction for both
  }

  // Tokens of 16 contraction steps as the B operand: b[j] belongs to tokens 8j..8j+7.
  __device__ void LoadTokens(uint32_t activations, int step16, uint32_t (&b)[K::kColumnTiles][2]) const {
    const int chunk = 2 * step16 + (lane >> 3 & 1);
    if constexpr (K::kColumnTiles == 1) {
      const int row = lane & 7;
      LoadMatrices2(activations + row * (kTile * 2) + (chunk ^ row) * 16, b[0]);
    } else {
#pragma unroll
      for (int j = 0; j < K::kColumnTiles; j += 2) {
        const int row = 8 * j + (lane >> 4) * 8 + (lane & 7);
        LoadMatrices4(activations + row * (kTile * 2) + ((chunk ^ row) & 7) * 16, b[j], b[j + 1]);
      }
    }
  }

  __device__ void Multiply(uint32_t stage, Sums<K>& sums) const {
    if constexpr (K::kInputGradient) {
      MultiplyTransposed(stage, sums);
    } else if constexpr (K::kScaling == Scaling::kSums) {
      MultiplyScalingSums(stage, sums);
    } else {
      MultiplyScalingWeights(stage, sums);
    }
  }

  // This lane's bundle of the warp's strip s: a word for each 16 contraction steps.
  __device__ void LoadBundle(uint32_t stage, int s, uint32_t (&words)[4]) const {
    const uint4 bundle = LoadShared16(stage + (warp * K::kStrips + s) * 512 + BundleChunk(lane) * 16);
    words[0] = bundle.x, words[1] = bundle.y, words[2] = bundle.z, words[3] = bundle.w;
  }

  // Scales of this lane's rows g and g + 8 of the warp's strip s.
  __device__ void LoadRowScales(int s, uint32_t (&scale)[2]) const {
    const uint32_t place = scales + ((warp * K::kStrips + s) * 16 + lane / 4) * 4;
    scale[0] = LoadShared(place), scale[1] = LoadShared(place + 32);
  }

  __device__ void MultiplyScalingSums(uint32_t stage, Sums<K>& sums) const {
    uint32_t b[K::kSteps16][K::kColumnTiles][2];
#pragma unroll
    for (int k = 0; k < K::kSteps16; ++k) LoadTokens(stage + K::kActivations, k, b[k]);
#pragma unroll
    for (int s = 0; s < K::kStrips; ++s) {
      uint32_t words[K::kSteps16], scale[2];
      LoadBundle(stage, s, words);
      LoadRowScales(s, scale);
      float part[K::kColumnTiles][4] = {};
#pragma unroll
      for (int k = 0; k < K::kSteps16; ++k) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = CodePair(words[k], i);
#pragma unroll
        for (int j = 0; j < K::kColumnTiles; ++j) K::T::MultiplyAdd(part[j], a, b[k][j]);
      }
#pragma unroll
      for (int j = 0; j < K::kColumnTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][j][i] += __uint_as_float(scale[i / 2]) * part[j][i];
      }
    }
  }

  __device__ void MultiplyScalingWeights(uint32_t stage, Sums<K>& sums) const {
    uint32_t words[K::kStrips][K::kSteps16], scale[K::kStrips][2];
#pragma unroll
    for (int s = 0; s < K::kStrips; ++s) {
      LoadBundle(stage, s, words[s]);
      LoadRowScales(s, scale[s]);
    }
#pragma unroll
    for (int k = 0; k < K::kSteps16; ++k) {
      uint32_t b[K::kColumnTiles][2];
      LoadTokens(stage + K::kActivations, k, b);
#pragma unroll
      for (int s = 0; s < K::kStrips; ++s) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = K::T::MultiplyPairs(CodePair(words[s][k], i), scale[s][i & 1]);
#pragma unroll
        for (int j = 0; j < K::kColumnTiles; ++j) K::T::MultiplyAdd(sums[s][j], a, b[j]);
      }
    }
  }

  // w^T: rows of A are input features, the contraction runs over output features. Lane (g, t) needs output features 2t
  // and 2t + 1 of input feature g: nibbles of the bundles of lanes (2t, g / 2) and (2t + 1, g / 2), of equal parity.
  __device__ void MultiplyTransposed(uint32_t stage, Sums<K>& sums) const {
    const int even = lane % 4 * 8 + lane / 8;
    const int nibble = (lane >> 2 & 1) * 4;
    const int tile = warp * K::kStrips / K::kSteps16;
    const uint32_t even_place = stage + tile * kTileBytes + BundleChunk(even) * 16;
    const uint32_t odd_place = stage + tile * kTileBytes + BundleChunk(even + 4) * 16;
    const uint32_t scale = scales + tile * (kTile * 2) + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < K::kSteps16; ++k) {
      uint32_t evens[K::kStrips], odds[K::kStrips], b[K::kColumnTiles][2];
      LoadWords(even_place + k * 512, evens);
      LoadWords(odd_place + k * 512, odds);
      const uint32_t pair[2] = {LoadShared(scale + k * 32), LoadShared(scale + k * 32 + 16)};
      LoadTokens(stage + K::kActivations, k, b);
#pragma unroll
      for (int s = 0; s < K::kStrips; ++s) {
        const uint32_t word = SelectBits(0xf0f0f0f0u, odds[s] << (4 - nibble), evens[s] >> nibble);
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Bytes 1 and 2 change places in the transpose.
          a[i] = K::T::MultiplyPairs(CodePair(word, i / 2 + i % 2 * 2), pair[i / 2]);
        }
#pragma unroll
        for (int j = 0; j < K::kColumnTiles; ++j) K::T::MultiplyAdd(sums[s][j], a, b[j]);
      }
    }
  }

  // The words of a bundle that belong to this warp's strips of input features.
  __device__ void LoadWords(uint32_t place, uint32_t (&words)[K::kStrips]) const {
    if constexpr (K::kStrips == K::kSteps16) {
      const uint4 bundle = LoadShared16(place);
      words[0] = bundle.x, words[1] = bundle.y, words[2] = bundle.z, words[3] = bundle.w;
    } else {
      static_assert(K::kStrips == 2);
      const uint2 half = LoadShared8(place + warp % 2 * 8);
      words[0] = half.x, words[1] = half.y;
    }
  }
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_OPERANDS_CUH_
