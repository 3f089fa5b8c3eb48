// The second half of an ordered split: partial products added in the order of the splits, so that results repeat.
#include "async.cuh"
#include "number.cuh"

namespace qlora_jax {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ void SumSplits(const float* partials, typename T::Storage* y, int64_t count, int32_t splits) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (first >= count) return;
  if (count % 4 == 0) {
    float4 sum = *reinterpret_cast<const float4*>(partials + first);
    for (int split = 1; split < splits; ++split) {
      const float4 part = *reinterpret_cast<const float4*>(partials + split * count + first);
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    StoreGlobal(y + first, make_uint2(T::Pack(sum.x, sum.y), T::Pack(sum.z, sum.w)));
    return;
  }
  for (int64_t i = first; i < first + 4 && i < count; ++i) {
    float sum = partials[i];
    for (int split = 1; split < splits; ++split) sum += partials[split * count + i];
    y[i] = sum;
  }
}

}  // namespace
}  // namespace qlora_jax

extern "C" __global__ void __launch_bounds__(qlora_jax::kThreads)
    nf4_sum_splits_bf16(const float* partials, __nv_bfloat16* y, int64_t count, int32_t splits) {
  qlora_jax::SumSplits<qlora_jax::Bfloat16>(partials, y, count, splits);
}

extern "C" __global__ void __launch_bounds__(qlora_jax::kThreads)
    nf4_sum_splits_f16(const float* partials, __half* y, int64_t count, int32_t splits) {
  qlora_jax::SumSplits<qlora_jax::Float16>(partials, y, count, splits);
}
