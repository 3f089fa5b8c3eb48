// Generic addresses into three spaces, a dynamically indexed local array, and atomics.
#include <cuda_fp16.h>

#include <cstdint>

extern "C" __global__ void generic(const float* global, float* out, int which) {
  __shared__ float shared[128];
  float local[8];
  const int t = threadIdx.x;
  shared[t] = global[t] + 1000.0f;
  for (int i = 0; i < 8; ++i) local[i] = global[t] * i;
  __syncthreads();
  const float* source = which == 0 ? global + t : which == 1 ? shared + (127 - t) : local + (t & 7);
  if (t & 1) source = global + t;
  out[t] = *(const volatile float*)source;
}

extern "C" __global__ void atomics(int* ints, float* floats, unsigned long long* wide, __half2* halves, int* old) {
  const int t = threadIdx.x;
  old[t] = atomicAdd(ints, 3);
  atomicMax(ints + 1, t);
  atomicMin(ints + 2, -t);
  atomicXor(ints + 3, 1 << (t & 31));
  atomicCAS(ints + 4, 0, t + 1);
  atomicExch(ints + 5, 77);
  atomicInc((unsigned int*)ints + 6, 9u);
  atomicAdd(floats, 0.5f);
  atomicAdd(wide, 1ull << 33);
  atomicAdd(halves, __floats2half2_rn(1.0f, 2.0f));
}

extern "C" __global__ void sharedAtomics(int* out) {
  __shared__ int bins[8];
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[threadIdx.x & 7], (int)threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 8) out[threadIdx.x] = bins[threadIdx.x];
}
