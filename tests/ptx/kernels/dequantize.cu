// NF4 codes through a table of pairs in shared memory: n codes (high nibble first), one scale per 64.
// BUG_NO_SYNC leaves out the barrier between filling the table and reading it.
#include <cuda_bf16.h>

#include <cstdint>

extern "C" __global__ void dequantize(const uint8_t* packed, const float* absmax, const float* levels,
                                      __nv_bfloat16* out, int n) {
  __shared__ float2 pairs[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) pairs[i] = make_float2(levels[i >> 4], levels[i & 15]);
#ifndef BUG_NO_SYNC
  __syncthreads();
#endif
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  const uint32_t word = *reinterpret_cast<const uint32_t*>(packed + i / 2);
  const float scale = absmax[i >> 6];
  __nv_bfloat162 values[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = pairs[(word >> (8 * j)) & 255];
    values[j] = __floats2bfloat162_rn(pair.x * scale, pair.y * scale);
  }
  *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<uint4*>(values);
}
