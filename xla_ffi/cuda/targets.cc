#include "targets.h"

#include <cstdint>

#include "device_launcher.h"
#include "handlers.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

template <bool kInputGradient>
ffi::Error Product(void* stream, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer absmax,
                   ffi::AnyBuffer absmax_scale, ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where,
                   ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets partials, int64_t row_blocks, int64_t block_size,
                   int64_t weight_dtype, int64_t layout, int64_t route) {
  DeviceLauncher launcher(stream);
  const WeightOperands weight{packed,     absmax,     absmax_scale, absmax_offset, where,
                              row_blocks, block_size, weight_dtype, layout};
  return RunProduct(launcher, {x, *y, weight, kInputGradient}, partials, route);
}

ffi::Error Dequantize(void* stream, ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer absmax_scale,
                      ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where, ffi::Result<ffi::AnyBuffer> dense,
                      int64_t row_blocks, int64_t block_size, int64_t weight_dtype, int64_t layout) {
  DeviceLauncher launcher(stream);
  return RunDequantize(launcher,
                       {packed, absmax, absmax_scale, absmax_offset, where, row_blocks, block_size, weight_dtype,
                        layout},
                       *dense);
}

// cudaStream_t is a pointer; what it points to is the launcher's concern.
auto OnStream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4MatmulCuda, Product<false>, BindProduct(OnStream()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4MatmulDxCuda, Product<true>, BindProduct(OnStream()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4DequantizeCuda, Dequantize, BindDequantize(OnStream()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace qlora_jax
