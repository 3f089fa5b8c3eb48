// The fused products for float16 activations.
#include "product.cuh"

QLORA_JAX_PRODUCTS(f16, Float16)
