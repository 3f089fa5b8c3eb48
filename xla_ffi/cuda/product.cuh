// y = x @ w and dx = dy @ w^T from the same packed bytes.
//
// A block owns `rows` output features of `tokens` tokens and one part of the contraction (a split). Its k-groups take
// contraction steps of 64 in turn; packed weights, activations and scale codes of a step arrive by cp.async, several
// steps ahead. Sums of the k-groups, then of the splits, are added in a fixed order: results repeat bit for bit.
#ifndef QLORA_JAX_CUDA_PRODUCT_CUH_
#define QLORA_JAX_CUDA_PRODUCT_CUH_

#include "operands.cuh"

namespace qlora_jax {

// Waits for the threads that share a stage: one of several warps, or the whole block.
template <typename K>
__device__ void SynchronizeGroup() {
  static_assert(K::kGroupThreads == 32 || K::kGroups == 1);
  if constexpr (K::kGroupThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The 16 codes become 256 pairs for each lane; every lane's copies lie in its own bank.
template <typename K>
__device__ void FillTables(uint32_t table, uint32_t dynamic_map) {
  for (int i = threadIdx.x; i < 256; i += K::kThreads) {
    StoreShared(dynamic_map + i * 4, __float_as_uint(kDynamicMap.value[i]));
  }
  // A warp fills four entries at a time, eight lanes to an entry.
  for (int i = threadIdx.x; i < 256 * 8; i += K::kThreads) {
    const uint32_t pair = K::T::Pack(kNf4Code.value[i / 8 % 16], kNf4Code.value[i / 8 / 16]);
    StoreShared(table + i * 16, make_uint4(pair, pair, pair, pair));
  }
}

// Sums of the block through shared memory, in rows of output features, so that a thread stores four side by side.
template <typename K>
__device__ void StoreSums(const Work<K>& work, int group, int warp, int lane, float* buffer, const Sums<K>& sums) {
  constexpr int kPitch = K::kRows + 4;
  float* own = buffer + group * (K::kTokens * kPitch) + lane / 4;
#pragma unroll
  for (int s = 0; s < K::kStrips; ++s) {
#pragma unroll
    for (int j = 0; j < K::kColumnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own[(8 * j + lane % 4 * 2 + (i & 1)) * kPitch + (warp * K::kStrips + s) * 16 + i / 2 * 8] = sums[s][j][i];
      }
    }
  }
  __syncthreads();

  constexpr int kUnits = K::kRows / 4;
  const bool whole = work.outputs % 4 == 0;
  for (int i = threadIdx.x; i < K::kTokens * kUnits; i += K::kThreads) {
    const int64_t token = work.first_token + i / kUnits;
    const int64_t row = work.first_row + i % kUnits * 4;
    if (token >= work.tokens || row >= work.outputs) continue;
    const float* place = buffer + i / kUnits * kPitch + i % kUnits * 4;
    float4 sum = *reinterpret_cast<const float4*>(place);
#pragma unroll
    for (int g = 1; g < K::kGroups; ++g) {
      const float4 part = *reinterpret_cast<const float4*>(place + g * (K::kTokens * kPitch));
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    const int64_t index = token * work.outputs + row;
    float* part = work.partials + work.split * work.tokens * work.outputs + index;
    if (whole) {
      if (work.splits > 1) {
        StoreGlobal(part, sum);
      } else {
        StoreGlobal(work.y + index, make_uint2(K::T::Pack(sum.x, sum.y), K::T::Pack(sum.z, sum.w)));
      }
      continue;
    }
    const float value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (row + e >= work.outputs) continue;
      if (work.splits > 1) {
        part[e] = value[e];
      } else {
        work.y[index + e] = value[e];
      }
    }
  }
}

template <typename K>
__device__ void Product(const typename K::Storage* x, typename K::Storage* y, float* partials,
                        QLORA_JAX_WEIGHT_PARAMETERS, int64_t tokens, int64_t in_features, int64_t out_features,
                        int32_t splits) {
  extern __shared__ __align__(128) uint8_t shared[];
  Work<K> work;
  work.x = x;
  work.y = y;
  work.partials = partials;
  work.w = SelectLayer<Layout::kFragments>(QLORA_JAX_WEIGHT_ARGUMENTS, in_features, out_features);
  work.tokens = tokens;
  work.contraction = K::kInputGradient ? out_features : in_features;
  work.outputs = K::kInputGradient ? in_features : out_features;
  work.first_row = int64_t{blockIdx.x} * K::kRows;
  work.first_token = int64_t{blockIdx.z} * K::kTokens;
  work.split = blockIdx.y;
  work.splits = splits;

  const int group = threadIdx.x / K::kGroupThreads, thread = threadIdx.x % K::kGroupThreads;
  const uint32_t table = SharedAddress(shared);
  const uint32_t dynamic_map = table + kPairTableBytes;
  constexpr int kGroupBytes = K::kRows * 4 + K::kStages * K::kShape.stage_bytes();
  const uint32_t scales = dynamic_map + kDynamicMapBytes + group * kGroupBytes;
  const uint32_t stages = scales + K::kRows * 4;
  const StepCopies<K> copies(work, thread, dynamic_map, scales, stages);
  const WarpView<K> view{table, scales, thread / 32, static_cast<int>(threadIdx.x % 32)};

  const int64_t steps = FragmentTiles(work.contraction);
  const int begin = static_cast<int>(steps * work.split / splits) + group;
  const int end = static_cast<int>(steps * (work.split + 1) / splits);
#pragma unroll
  for (int i = 0; i < K::kStages - 1; ++i) {
    if (begin + i * K::kGroups < end) copies.Copy(begin + i * K::kGroups, i);
    CommitCopies();
  }
  FillTables<K>(table, dynamic_map);
  __syncthreads();

  Sums<K> sums = {};
  int slot = 0;
  for (int step = begin; step < end; step += K::kGroups) {
    WaitForCopies<K::kStages - 2>();
    // Everyone's copies of this step are there, and nobody reads the step before it any more.
    SynchronizeGroup<K>();
    copies.DecodeScales(step, slot);
    const int ahead = step + (K::kStages - 1) * K::kGroups;
    if (ahead < end) copies.Copy(ahead, slot == 0 ? K::kStages - 1 : slot - 1);
    CommitCopies();
    SynchronizeGroup<K>();
    view.Multiply(stages + slot * K::kShape.stage_bytes(), sums);
    slot = slot + 1 == K::kStages ? 0 : slot + 1;
  }
  WaitForCopies<0>();
  __syncthreads();
  StoreSums<K>(work, group, view.warp, view.lane, reinterpret_cast<float*>(shared), sums);
}

}  // namespace qlora_jax

#define QLORA_JAX_PRODUCT(NAME, T, INPUT_GRADIENT, TOKENS, SCALING)                                                  \
  extern "C" __global__ void __launch_bounds__(qlora_jax::ShapeForTokens(TOKENS).threads(), 2)                        \
      NAME(const qlora_jax::T::Storage* x, qlora_jax::T::Storage* y, float* partials, QLORA_JAX_WEIGHT_PARAMETERS,    \
           int64_t tokens, int64_t in_features, int64_t out_features, int32_t splits) {                               \
    using Kernel = qlora_jax::ProductKind<qlora_jax::T, INPUT_GRADIENT, TOKENS, qlora_jax::Scaling::SCALING>;       \
    qlora_jax::Product<Kernel>(x, y, partials, QLORA_JAX_WEIGHT_ARGUMENTS, tokens, in_features, out_features, splits); \
  }

#define QLORA_JAX_PRODUCTS(DTYPE, T)                                                    \
  QLORA_JAX_PRODUCT(nf4_skinny_forward_##DTYPE##_t8, T, false, 8, kSums)                 \
  QLORA_JAX_PRODUCT(nf4_skinny_forward_##DTYPE##_t16, T, false, 16, kSums)               \
  QLORA_JAX_PRODUCT(nf4_skinny_forward_##DTYPE##_t32, T, false, 32, kSums)               \
  QLORA_JAX_PRODUCT(nf4_skinny_forward_##DTYPE##_t64, T, false, 64, kSums)               \
  QLORA_JAX_PRODUCT(nf4_tile_forward_##DTYPE##_t128, T, false, 128, kWeights)            \
  QLORA_JAX_PRODUCT(nf4_skinny_dx_##DTYPE##_t8, T, true, 8, kWeights)                    \
  QLORA_JAX_PRODUCT(nf4_skinny_dx_##DTYPE##_t16, T, true, 16, kWeights)                  \
  QLORA_JAX_PRODUCT(nf4_skinny_dx_##DTYPE##_t32, T, true, 32, kWeights)                  \
  QLORA_JAX_PRODUCT(nf4_skinny_dx_##DTYPE##_t64, T, true, 64, kWeights)                  \
  QLORA_JAX_PRODUCT(nf4_tile_dx_##DTYPE##_t128, T, true, 128, kWeights)

#endif  // QLORA_JAX_CUDA_PRODUCT_CUH_
