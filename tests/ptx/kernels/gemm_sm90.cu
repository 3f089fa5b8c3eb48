// y[64, 64] = w[64, k] x[64, k]^T on one Hopper warpgroup; w comes from registers. One macro breaks it in one way:
//   BUG_NO_FULL_WAIT   the consumer does not wait for a stage to be full
//   BUG_NO_WGMMA_WAIT  nobody waits for the products
//   BUG_NO_PROXY_FENCE plain stores are not fenced for the asynchronous proxy
//   BUG_LATE_CLEAR     the sums are cleared behind wgmma.fence
//   BUG_WRONG_PARITY   the producer waits for the wrong phase of an empty stage
//   BUG_SHORT_EXPECT   fewer bytes are expected than are copied
//   BUG_COUNT          one arrival too many is asked of the consumers
#include "hopper.cuh"

constexpr int kStageBytes = 64 * 64 * 2;

// Warp-specialised: warpgroup 0 copies stages of x, which the host has laid out in 8 x 16-byte core matrices
// [k / 64][8 columns][64 rows][8]; warpgroup 1 multiplies.
extern "C" __global__ void __launch_bounds__(256)
    gemm_bulk(const __nv_bfloat16* w, const __nv_bfloat16* x_tiles, float* y, int k) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared), full = base + 2 * kStageBytes, empty = full + 16;
  const int steps = k / 64;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      InitBarrier(full + 8 * stage, 1);
#ifdef BUG_COUNT
      InitBarrier(empty + 8 * stage, 129);
#else
      InitBarrier(empty + 8 * stage, 128);
#endif
    }
    FenceProxyAsync();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < 32 && Elected()) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step & 1;
#ifdef BUG_WRONG_PARITY
        if (step >= 2) Wait(empty + 8 * stage, (step >> 1) & 1);
#else
        if (step >= 2) Wait(empty + 8 * stage, ((step >> 1) - 1) & 1);
#endif
#ifdef BUG_SHORT_EXPECT
        ArriveAndExpect(full + 8 * stage, kStageBytes - 16);
#else
        ArriveAndExpect(full + 8 * stage, kStageBytes);
#endif
        BulkCopy(base + stage * kStageBytes, x_tiles + step * 4096, kStageBytes, full + 8 * stage);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float sums[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    uint32_t a[16];
    LoadFragments(a, w, k, step * 64);
#ifndef BUG_NO_FULL_WAIT
    Wait(full + 8 * stage, (step >> 1) & 1);
#endif
    WgmmaFence();
    for (int i = 0; i < 4; ++i) Wgmma(sums, a + 4 * i, Descriptor(base + stage * kStageBytes + i * 2048, 1024, 128, 0));
    WgmmaCommit();
#ifndef BUG_NO_WGMMA_WAIT
    WgmmaWait();
#endif
    Arrive(empty + 8 * stage);
  }
  StoreSums(y, sums);
}

// One warpgroup; x tiles by plain stores in the 128-byte swizzle.
extern "C" __global__ void __launch_bounds__(128)
    gemm_swizzled(const __nv_bfloat16* w, const __nv_bfloat16* x, float* y, int k) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  float sums[32];
#ifndef BUG_LATE_CLEAR
  for (int i = 0; i < 32; ++i) sums[i] = 0.0f;
#endif
  for (int first_k = 0; first_k < k; first_k += 64) {
    uint32_t a[16];
    LoadFragments(a, w, k, first_k);
    for (int i = threadIdx.x; i < 512; i += 128) {
      const int row = i >> 3, chunk = i & 7;
      const uint4 values = *reinterpret_cast<const uint4*>(x + row * k + first_k + chunk * 8);
      *reinterpret_cast<uint4*>(shared + row * 128 + ((chunk ^ (row & 7)) << 4)) = values;
    }
#ifndef BUG_NO_PROXY_FENCE
    FenceProxyAsync();
#endif
    __syncthreads();
    WgmmaFence();
#ifdef BUG_LATE_CLEAR
    if (first_k == 0) {
      for (int i = 0; i < 32; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sums[i]));
    }
#endif
    for (int i = 0; i < 4; ++i) Wgmma(sums, a + 4 * i, Descriptor(base + i * 32, 16, 1024, 1));
    WgmmaCommit();
    WgmmaWait();
    __syncthreads();
  }
  StoreSums(y, sums);
}
