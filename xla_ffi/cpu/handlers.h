#ifndef QLORA_JAX_CPU_HANDLERS_H_
#define QLORA_JAX_CPU_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

// XLA FFI handlers. Operands, every stack of layers with its dimension L:
//   x [M, in] (dy [M, out]) float32 | bfloat16 | float16;  packed uint8 [L, bytes];
//   absmax uint8 | float32 [L, blocks];  absmax_scale float32 [L, groups];  absmax_offset float32 [L];
//   where int32 [3] = (layer, first row, first block of a row);
//   u [M, rank], v [out, rank] (v [in, rank]) in x's dtype, an adapter that adds u @ v^T to the same sums; rank may be 0
//   ->  y [M, out] (dx [M, in]) in x's dtype.
// Attributes: row_blocks int64, blocks in a row of the whole tensor, 0 where blocks may straddle rows; block_size int64;
// weight_dtype int64 (Dtype). float32 absmax is not quantized: absmax_scale and absmax_offset are not read then.
extern "C" XLA_FFI_Error* Nf4Matmul(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* Nf4MatmulDx(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_HANDLERS_H_
