// Instructions that C++ has no words for: asynchronous copies, shared memory by address, wide stores, ldmatrix, bit selection.
#ifndef QLORA_JAX_CUDA_ASYNC_CUH_
#define QLORA_JAX_CUDA_ASYNC_CUH_

#include <cstdint>

namespace qlora_jax {

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past the first-level cache; zeros where the source does not exist.
__device__ inline void CopyAsync16(uint32_t target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(exists ? 16 : 0) : "memory");
}

// The first `size` bytes of a word, zeros behind them. Cached: the next steps read the same sectors.
__device__ inline void CopyAsync4(uint32_t target, const void* source, int size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(size) : "memory");
}

__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's committed groups of copies are under way.
template <int kPending>
__device__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline uint32_t LoadShared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ inline uint2 LoadShared8(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address) : "memory");
  return words;
}

__device__ inline uint4 LoadShared16(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// An entry of a table that never changes: free to be moved and shared by the compiler, unlike the loads above.
__device__ inline uint32_t LookUp(uint32_t address) {
  uint32_t word;
  asm("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

__device__ inline void StoreShared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

__device__ inline void StoreShared(uint32_t address, uint16_t half) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(half) : "memory");
}

__device__ inline void StoreShared(uint32_t address, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// In one instruction; left to itself the compiler stores the four words one by one.
__device__ inline void StoreGlobal(void* target, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

__device__ inline void StoreGlobal(void* target, float4 values) {
  StoreGlobal(target, make_uint4(__float_as_uint(values.x), __float_as_uint(values.y), __float_as_uint(values.z),
                                 __float_as_uint(values.w)));
}

__device__ inline void StoreGlobal(void* target, uint2 words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(words.x), "r"(words.y) : "memory");
}

// 8x8 matrices of 16-bit numbers; lane 8i + r names row r of matrix i.
__device__ inline void LoadMatrices2(uint32_t address, uint32_t (&a)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(address) : "memory");
}

__device__ inline void LoadMatrices4(uint32_t address, uint32_t (&a)[2], uint32_t (&b)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1])
               : "r"(address)
               : "memory");
}

// Bits of `chosen` where the mask is set, of `other` elsewhere.
__device__ inline uint32_t SelectBits(uint32_t mask, uint32_t chosen, uint32_t other) {
  uint32_t word;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(word) : "r"(mask), "r"(chosen), "r"(other));
  return word;
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_ASYNC_CUH_
