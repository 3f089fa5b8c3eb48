// The entry points of every kernel, once: launch plans name them, the launcher finds their functions.
#ifndef QLORA_JAX_CUDA_KERNEL_NAMES_H_
#define QLORA_JAX_CUDA_KERNEL_NAMES_H_

#define QLORA_JAX_CUDA_PRODUCT_KERNELS(X, DIRECTION, DTYPE) \
  X(nf4_skinny_##DIRECTION##_##DTYPE##_t8)                  \
  X(nf4_skinny_##DIRECTION##_##DTYPE##_t16)                 \
  X(nf4_skinny_##DIRECTION##_##DTYPE##_t32)                 \
  X(nf4_skinny_##DIRECTION##_##DTYPE##_t64)                 \
  X(nf4_tile_##DIRECTION##_##DTYPE##_t128)

#define QLORA_JAX_CUDA_KERNELS(X)                  \
  X(nf4_dequantize_rows_bf16)                      \
  X(nf4_dequantize_rows_f16)                       \
  X(nf4_dequantize_rows_f32)                       \
  X(nf4_dequantize_fragments_bf16)                 \
  X(nf4_dequantize_fragments_f16)                  \
  X(nf4_dequantize_fragments_f32)                  \
  X(nf4_sum_splits_bf16)                           \
  X(nf4_sum_splits_f16)                            \
  QLORA_JAX_CUDA_PRODUCT_KERNELS(X, forward, bf16) \
  QLORA_JAX_CUDA_PRODUCT_KERNELS(X, forward, f16)  \
  QLORA_JAX_CUDA_PRODUCT_KERNELS(X, dx, bf16)      \
  QLORA_JAX_CUDA_PRODUCT_KERNELS(X, dx, f16)

#endif  // QLORA_JAX_CUDA_KERNEL_NAMES_H_
