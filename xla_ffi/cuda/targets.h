#ifndef QLORA_JAX_CUDA_TARGETS_H_
#define QLORA_JAX_CUDA_TARGETS_H_

#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

// XLA FFI handlers for CUDA (see handlers.h): launches on XLA's stream and nothing else, so that XLA may record them in
// a CUDA graph.
extern "C" XLA_FFI_Error* Nf4MatmulCuda(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* Nf4MatmulDxCuda(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* Nf4DequantizeCuda(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_TARGETS_H_
