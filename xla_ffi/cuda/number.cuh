// The 16-bit number formats of the kernels: conversions, packed pairs, the tensor core's product.
#ifndef QLORA_JAX_CUDA_NUMBER_CUH_
#define QLORA_JAX_CUDA_NUMBER_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlora_jax {

struct Bfloat16 {
  using Storage = __nv_bfloat16;
  __device__ static uint16_t Bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  // low | high << 16
  __device__ static uint32_t Pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
  __device__ static uint32_t MultiplyPairs(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 %0, %1, %2, zero; }" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  // d += a [16, 16] b [16, 8], float32 sums.
  __device__ static void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Float16 {
  using Storage = __half;
  __device__ static uint16_t Bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
  __device__ static uint32_t Pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
  __device__ static uint32_t MultiplyPairs(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  __device__ static void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Float32 {
  using Storage = float;
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_NUMBER_CUH_
