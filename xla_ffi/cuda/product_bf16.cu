// The fused products for bfloat16 activations.
#include "product.cuh"

QLORA_JAX_PRODUCTS(bf16, Bfloat16)
