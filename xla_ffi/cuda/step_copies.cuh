// One contraction step of a product in shared memory: packed weights, activations and scales, copied ahead of their use.
#ifndef QLORA_JAX_CUDA_STEP_COPIES_CUH_
#define QLORA_JAX_CUDA_STEP_COPIES_CUH_

#include "async.cuh"
#include "number.cuh"
#include "product_shape.h"
#include "weight.cuh"

namespace qlora_jax {

// Where scales meet the sums. With few tokens a float32 sum over 64 steps is scaled (exact, and fewer instructions);
// with many the weights are, in the tensor core's format. The input gradient sums over blocks and always scales weights.
enum class Scaling { kSums, kWeights };

// What a kernel is compiled for.
template <typename T_, bool kInputGradient_, int kTokens_, Scaling kScaling_>
struct ProductKind {
  using T = T_;
  using Storage = typename T::Storage;
  static constexpr bool kInputGradient = kInputGradient_;
  static constexpr Scaling kScaling = kScaling_;
  static constexpr ProductShape kShape = ShapeForTokens(kTokens_);
  static constexpr int kTokens = kTokens_;
  static constexpr int kRows = kShape.rows();
  static constexpr int kStrips = kShape.strips;
  static constexpr int kGroups = kShape.k_groups;
  static constexpr int kStages = kShape.stages;
  static constexpr int kGroupThreads = kShape.group_threads();
  static constexpr int kThreads = kShape.threads();
  static constexpr int kColumnTiles = kTokens / 8;
  static constexpr int kSteps16 = kTile / 16;  // tensor core steps in a contraction step
  static_assert(kShape.tokens == kTokens && kRows % kTile == 0 && !(kInputGradient && kScaling == Scaling::kSums));

  // A stage in shared memory.
  static constexpr int kActivations = kRows * kTile / 2;
  static constexpr int kCodes = kActivations + kTokens * kTile * 2;
  static constexpr int kGroupScales = kCodes + kRows * 4;
  static_assert(kGroupScales + kRows * 4 == kShape.stage_bytes());
};

// What one block works on.
template <typename K>
struct Work {
  const typename K::Storage* x;
  typename K::Storage* y;
  float* partials;
  LayerWeight w;
  int64_t tokens, contraction, outputs;
  int64_t first_row, first_token;
  int32_t split, splits;
};

// A thread's share of the copies of a k-group. Addresses are kept as a start and a term that depends on the step.
template <typename K>
class StepCopies {
 public:
  __device__ StepCopies(const Work<K>& work, int thread, uint32_t dynamic_map, uint32_t scales, uint32_t stages)
      : w_(work.w), thread_(thread), dynamic_map_(dynamic_map), scales_(scales), stages_(stages) {
    const int64_t tile_columns = FragmentTiles(w_.in_features);
    const int64_t first_tile = work.first_row / kTile;
    weights_ = w_.packed + (K::kInputGradient ? first_tile : first_tile * tile_columns) * kTileBytes + thread * 16;
    weights_step_ = (K::kInputGradient ? tile_columns : 1) * kTileBytes;
    weights_tile_ = (K::kInputGradient ? 1 : tile_columns) * kTileBytes;
    const int64_t tiles_left = FragmentTiles(work.outputs) - first_tile;
    tiles_ = tiles_left < K::kRows / kTile ? static_cast<int>(tiles_left) : K::kRows / kTile;

    x_ = work.x;
    contraction_ = work.contraction;
    aligned_ = contraction_ % 8 == 0 && reinterpret_cast<uintptr_t>(x_) % 16 == 0;
    activations_ = x_ + (work.first_token + thread / 8) * contraction_ + thread % 8 * 8;
    const int64_t tokens_left = work.tokens - work.first_token;
    tokens_ = (tokens_left < K::kTokens ? static_cast<int>(tokens_left) : K::kTokens) - thread / 8;

    row_blocks_ = w_.in_features >> w_.block_shift;
#pragma unroll
    for (int round = 0; round < kScaleRounds; ++round) {
      // A scale for each output feature of the block, or, for the input gradient, for each of the step's 64 output
      // features and each 64 of the block's input features.
      const int slot = round * K::kGroupThreads + thread;
      const int64_t out = K::kInputGradient ? slot % kTile : work.first_row + slot;
      const int64_t in = K::kInputGradient ? work.first_row + slot / kTile * kTile : 0;
      scale_exists_[round] = K::kInputGradient ? in < w_.in_features : out < w_.out_features;
      block_[round] = out * row_blocks_ + (in >> w_.block_shift);
      global_block_[round] = (w_.first_row + out) * w_.row_blocks + w_.first_block + (in >> w_.block_shift);
    }
  }

  // Begins the copies of a step; they are this thread's next group of copies.
  __device__ void Copy(int step, int slot) const {
    const uint32_t stage = stages_ + slot * K::kShape.stage_bytes();
    CopyWeights(step, stage);
    if (aligned_) {
      CopyActivations(step, stage + K::kActivations);
    } else {
      CopyElements(step, stage + K::kActivations);
    }
    CopyScales(step, stage);
  }

  // Decodes the scales that this thread copied, once they are there, for the whole group to use.
  __device__ void DecodeScales(int step, int slot) const {
    const uint32_t stage = stages_ + slot * K::kShape.stage_bytes();
#pragma unroll
    for (int round = 0; round < kScaleRounds; ++round) {
      const int i = round * K::kGroupThreads + thread_;
      const uint32_t word = LoadShared(stage + K::kCodes + i * 4);
      float scale = __uint_as_float(word);
      if (w_.scale_codes != nullptr) {
        const uint8_t* code = w_.scale_codes + block_[round] + BlocksBefore(step, row_blocks_);
        const uint32_t byte = word >> 8 * (reinterpret_cast<uintptr_t>(code) & 3) & 255;
        const float unit = __uint_as_float(LookUp(dynamic_map_ + byte * 4));
        const float group_scale = __uint_as_float(LoadShared(stage + K::kGroupScales + i * 4));
        scale = AddRounded(MultiplyRounded(unit, group_scale), w_.offset);
      }
      if constexpr (K::kScaling == Scaling::kSums) {
        StoreShared(scales_ + i * 4, __float_as_uint(scale));
      } else if constexpr (!K::kInputGradient) {
        StoreShared(scales_ + i * 4, K::T::Pack(scale, scale));
      } else {
        StoreShared(scales_ + i * 2, K::T::Bits(scale));
      }
    }
  }

 private:
  static constexpr int kScaleRounds = K::kRows / K::kGroupThreads;

  // Blocks between the first step's scales and this step's, in rows of `row_blocks`.
  __device__ int64_t BlocksBefore(int step, int64_t row_blocks) const {
    return K::kInputGradient ? step * kTile * row_blocks : int64_t{step} * kTile >> w_.block_shift;
  }

  __device__ void CopyWeights(int step, uint32_t stage) const {
    constexpr int kRounds = kTileBytes / 16 / K::kGroupThreads;  // of a tile
    const uint8_t* source = weights_ + step * weights_step_;
#pragma unroll
    for (int tile = 0; tile < K::kRows / kTile; ++tile) {
      const bool exists = tile < tiles_;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int offset = round * K::kGroupThreads * 16;
        CopyAsync16(stage + tile * kTileBytes + offset + thread_ * 16,
                    exists ? source + tile * weights_tile_ + offset : w_.packed, exists);
      }
    }
  }

  // [token][64], chunks of 8 exchanged by the token's number, so that eight tokens' chunks lie in different banks.
  __device__ uint32_t ChunkPlace(uint32_t activations, int round) const {
    const int row = round * (K::kGroupThreads / 8) + thread_ / 8;
    return activations + row * (kTile * 2) + ((thread_ ^ row) & 7) * 16;
  }

  __device__ void CopyActivations(int step, uint32_t activations) const {
    const typename K::Storage* source = activations_ + step * kTile;
    // Rows of packed weights hold whole steps: only the input gradient's contraction can end within one.
    const bool column_exists = !K::kInputGradient || step * int64_t{kTile} + thread_ % 8 * 8 < contraction_;
#pragma unroll
    for (int round = 0; round < K::kTokens * 8 / K::kGroupThreads; ++round) {
      const int row = round * (K::kGroupThreads / 8);
      const bool exists = row < tokens_ && column_exists;
      CopyAsync16(ChunkPlace(activations, round), exists ? source + row * contraction_ : x_, exists);
    }
  }

  // The same for rows of activations that do not begin at multiples of 16 bytes.
  __device__ void CopyElements(int step, uint32_t activations) const {
    const int64_t column = step * int64_t{kTile} + thread_ % 8 * 8;
#pragma unroll 1
    for (int round = 0; round < K::kTokens * 8 / K::kGroupThreads; ++round) {
      const int row = round * (K::kGroupThreads / 8);
      const auto* source = reinterpret_cast<const uint16_t*>(activations_ + row * contraction_ + step * kTile);
#pragma unroll 1
      for (int i = 0; i < 8; i += 2) {
        const bool first = row < tokens_ && column + i < contraction_, second = first && column + i + 1 < contraction_;
        StoreShared(ChunkPlace(activations, round) + i * 2,
                    (first ? uint32_t{source[i]} : 0) | (second ? uint32_t{source[i + 1]} << 16 : 0));
      }
    }
  }

  // The aligned word that holds a scale's code (or the float32 scale), and its second-level scale.
  __device__ void CopyScales(int step, uint32_t stage) const {
#pragma unroll
    for (int round = 0; round < kScaleRounds; ++round) {
      const int i = round * K::kGroupThreads + thread_;
      const bool exists =
          scale_exists_[round] && (!K::kInputGradient || step * int64_t{kTile} + i % kTile < w_.out_features);
      const int64_t block = exists ? block_[round] + BlocksBefore(step, row_blocks_) : 0;
      if (w_.scale_codes == nullptr) {
        CopyAsync4(stage + K::kCodes + i * 4, w_.scales + block, exists ? 4 : 0);
        continue;
      }
      const uint8_t* code = w_.scale_codes + block;
      const uint8_t* word = code - (reinterpret_cast<uintptr_t>(code) & 3);
      const int64_t left = w_.scale_codes_end - word;
      CopyAsync4(stage + K::kCodes + i * 4, word, !exists ? 0 : left < 4 ? static_cast<int>(left) : 4);
      const int64_t group = exists ? (global_block_[round] + BlocksBefore(step, w_.row_blocks)) >> kGroupShift : 0;
      CopyAsync4(stage + K::kGroupScales + i * 4, w_.group_scales + group, exists ? 4 : 0);
    }
  }

  const LayerWeight& w_;
  const typename K::Storage* x_;
  int thread_;
  uint32_t dynamic_map_, scales_, stages_;
  const uint8_t* weights_;
  int64_t weights_step_, weights_tile_;
  int tiles_;
  const typename K::Storage* activations_;
  int64_t contraction_;
  bool aligned_;
  int tokens_;
  int64_t row_blocks_;
  bool scale_exists_[kScaleRounds];
  int64_t block_[kScaleRounds], global_block_[kScaleRounds];
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_STEP_COPIES_CUH_
