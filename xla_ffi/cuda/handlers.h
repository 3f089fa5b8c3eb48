// The CUDA targets' handlers but for the stream: operands are checked, a plan is made, a launcher executes it.
//
// Targets qlora_jax_nf4_matmul and qlora_jax_nf4_matmul_dx:
//   x (dy), packed, absmax, absmax_scale, absmax_offset, where  ->  y (dx) [, partials float32 [splits, M, outputs]]
// Target qlora_jax_nf4_dequantize:
//   packed, absmax, absmax_scale, absmax_offset, where  ->  dense [out, in], float32 | bfloat16 | float16
// with the operands and attributes of WeightOperands, and `route` (Route) for the products.
//
// The caller splits the contraction by asking for `partials`, whose size is its own choice (ChooseSplits). It is a
// result, and not scratch memory of the call: a call recorded in a CUDA graph is replayed without the handler, when
// scratch memory would long be another's.
//
// `where` lies in the device's memory, so the host checks it nowhere: kernels clamp the layer; that a shard's first row
// and block lie in the tensor is the caller's promise.
#ifndef QLORA_JAX_CUDA_HANDLERS_H_
#define QLORA_JAX_CUDA_HANDLERS_H_

#include <cstdint>
#include <utility>

#include "../operands.h"
#include "launcher.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {

xla::ffi::Error RunProduct(Launcher& launcher, const ProductOperands& operands, xla::ffi::RemainingRets partials,
                           int64_t route);
xla::ffi::Error RunDequantize(Launcher& launcher, const WeightOperands& operands, const xla::ffi::AnyBuffer& dense);

// What a handler takes after its platform's context.
template <typename Binding>
auto BindWeight(Binding&& binding) {
  using xla::ffi::AnyBuffer;
  return std::forward<Binding>(binding)
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>();
}

template <typename Binding>
auto BindAttributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<int64_t>("row_blocks")
      .template Attr<int64_t>("block_size")
      .template Attr<int64_t>("weight_dtype")
      .template Attr<int64_t>("layout");
}

template <typename Binding>
auto BindProduct(Binding&& binding) {
  using xla::ffi::AnyBuffer;
  return BindAttributes(BindWeight(std::forward<Binding>(binding).template Arg<AnyBuffer>())
                            .template Ret<AnyBuffer>()
                            .RemainingRets())
      .template Attr<int64_t>("route");
}

template <typename Binding>
auto BindDequantize(Binding&& binding) {
  using xla::ffi::AnyBuffer;
  return BindAttributes(BindWeight(std::forward<Binding>(binding)).template Ret<AnyBuffer>());
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_HANDLERS_H_
