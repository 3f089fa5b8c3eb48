#ifndef QLORA_JAX_CPU_QUANTIZE_HANDLER_H_
#define QLORA_JAX_CPU_QUANTIZE_HANDLER_H_

#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

// XLA FFI handler. weights [layers, out, in], or [layers, in, out] with input_major, float32 | bfloat16 | float16;
//   first_layer int32 [1], from which L layers are taken  ->
//   packed uint8 [L, bytes];  absmax uint8 | float32 [L, blocks];  absmax_scale float32 [L, groups];
//   absmax_offset float32 [L].
// float32 absmax is not quantized: absmax_scale and absmax_offset are then [L, 0] and [0].
// Attributes: block_size int64; input_major int64, 0 or 1, which needs whole blocks in a row; thresholds float32 [15]
// and codes uint8 [16], or [7] and [8] for a type of sign and magnitude (see Encoding).
extern "C" XLA_FFI_Error* Nf4Quantize(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_QUANTIZE_HANDLER_H_
