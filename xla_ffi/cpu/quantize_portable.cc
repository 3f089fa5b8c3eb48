// Any machine: vectors of 4 lanes, which become SSE2 or NEON.
#define QLORA_JAX_ISA quantize_portable

#include "quantize.h"

#ifdef QLORA_JAX_X86
#include <immintrin.h>
#endif

namespace qlora_jax::quantize_portable {

constexpr int kLanes = 4;
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

static inline void PackCodes(Words codes, uint8_t* packed) {
  packed[0] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
  packed[1] = static_cast<uint8_t>(codes[2] << 4 | codes[3]);
}

}  // namespace qlora_jax::quantize_portable

#include "quantize_kernels.h"

namespace qlora_jax {

const QuantizeKernels& QuantizePortable() {
  static constexpr QuantizeKernels kernels = quantize_portable::NamedQuantize("portable");
  return kernels;
}

}  // namespace qlora_jax
