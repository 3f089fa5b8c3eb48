// C[M, N] = A[M, K] B[N, K]^T, bfloat16 to float32: 64 x 64 x 32 tiles, two cp.async stages, ldmatrix, mma.sync.
// K % 8 == 0. One macro breaks it in one way:
//   BUG_NO_CLOSING_SYNC  the next stage overwrites what others still read
//   BUG_NO_WAIT          nobody waits for the copies of a stage
//   BUG_MISALIGNED       ldmatrix rows start at half a row of 16 bytes
//   BUG_WRONG_PATTERN    A is read with B's lane pattern: aligned, in bounds and wrong
//   BUG_NO_PADDING       rows of 64 bytes: right, with bank conflicts
#include <cuda_bf16.h>

#include <cstdint>

#ifdef BUG_NO_PADDING
constexpr int kRow = 32;
#else
constexpr int kRow = 32 + 8;
#endif

__device__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void CopyAsync(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)), "l"(global), "r"(bytes));
}

__device__ void LoadMatrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row)));
}

__device__ void Multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

extern "C" __global__ void __launch_bounds__(128)
    gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  __shared__ __align__(16) __nv_bfloat16 a_tile[2][64 * kRow], b_tile[2][64 * kRow];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first_row = blockIdx.y * 64, first_column = blockIdx.x * 64;
  const int warp_row = (warp & 1) * 32, warp_column = (warp >> 1) * 32;
  float sums[2][4][4] = {};

  auto load = [&](int stage, int first_k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (thread >> 2) + half * 32, column = (thread & 3) * 8, depth = first_k + column;
      const bool in_a = first_row + row < m && depth < k, in_b = first_column + row < n && depth < k;
      CopyAsync(&a_tile[stage][row * kRow + column], a + (in_a ? size_t(first_row + row) * k + depth : 0),
                in_a ? 16 : 0);
      CopyAsync(&b_tile[stage][row * kRow + column], b + (in_b ? size_t(first_column + row) * k + depth : 0),
                in_b ? 16 : 0);
    }
    asm volatile("cp.async.commit_group;");
  };

#if defined(BUG_WRONG_PATTERN)
  const int a_row = (lane & 7) + ((lane >> 4) << 3), a_column = ((lane >> 3) & 1) * 8;
#elif defined(BUG_MISALIGNED)
  const int a_row = lane & 15, a_column = (lane >> 4) * 4;
#else
  const int a_row = lane & 15, a_column = (lane >> 4) * 8;
#endif
  const int b_row = (lane & 7) + ((lane >> 4) << 3), b_column = ((lane >> 3) & 1) * 8;
  const int steps = (k + 31) / 32;
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    if (step + 1 < steps) {
      load(stage ^ 1, (step + 1) * 32);
#ifndef BUG_NO_WAIT
      asm volatile("cp.async.wait_group 1;");
#endif
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < 32; depth += 16) {
      uint32_t a_fragment[2][4], b_fragment[2][4];
      for (int i = 0; i < 2; ++i) {
        LoadMatrices(a_fragment[i], &a_tile[stage][(warp_row + i * 16 + a_row) * kRow + depth + a_column]);
        LoadMatrices(b_fragment[i], &b_tile[stage][(warp_column + i * 16 + b_row) * kRow + depth + b_column]);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) Multiply(sums[i][j], a_fragment[i], &b_fragment[j >> 1][(j & 1) * 2]);
      }
    }
#ifndef BUG_NO_CLOSING_SYNC
    __syncthreads();
#endif
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int h = 0; h < 4; ++h) {
        const int row = first_row + warp_row + i * 16 + (lane >> 2) + (h >> 1) * 8;
        const int column = first_column + warp_column + j * 8 + (lane & 3) * 2 + (h & 1);
        if (row < m && column < n) c[size_t(row) * n + column] = sums[i][j][h];
      }
    }
  }
}
