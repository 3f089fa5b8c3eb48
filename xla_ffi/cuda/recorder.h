// The CUDA handlers on a machine without a GPU: operands in host memory, launches written down instead of made.
#ifndef QLORA_JAX_CUDA_RECORDER_H_
#define QLORA_JAX_CUDA_RECORDER_H_

#include <cstdint>
#include <vector>

#include "plan.h"
#include "xla/ffi/api/c_api.h"

namespace qlora_jax {

struct RecordedLaunch {
  Launch launch;
  // For each argument what a kernel would find: a number, or the first byte behind a pointer (-1: nothing to read).
  std::vector<int64_t> seen;
};

// The launches since the last call of this function, in order.
std::vector<RecordedLaunch> TakeRecord();

// Makes the next launch fail as a device would.
void FailNextLaunch();

// The handlers of targets.h for the platform "cpu". A launch sets the first byte of what it would write (y, dense,
// partials) to 1 + its place in the call.
extern "C" XLA_FFI_Error* RecordNf4Matmul(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* RecordNf4MatmulDx(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* RecordNf4Dequantize(XLA_FFI_CallFrame* call_frame);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_RECORDER_H_
