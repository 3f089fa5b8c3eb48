#include "outer_product_handler.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>

#include "../operands.h"
#include "dispatch.h"
#include "outer_product.h"
#include "parallel.h"
#include "workspace.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

ffi::Error Implementation(ffi::ThreadPool pool, ffi::AnyBuffer narrow, ffi::AnyBuffer wide,
                          ffi::Result<ffi::AnyBuffer> sums, int64_t features_first) {
  const auto refuse = [](const std::string& message) {
    return ffi::Error::InvalidArgument("outer_product: " + message);
  };
  const OuterProductKernels* kernels = BestInstructionSet().outer_product;
  if (kernels == nullptr) {
    return refuse(std::string("there is no kernel for the instruction set ") + BestInstructionSet().name);
  }
  if (narrow.dimensions().size() != 2 || wide.dimensions().size() != 2) {
    return refuse("narrow " + Shape(narrow) + " and wide " + Shape(wide) + " must be matrices");
  }
  OuterProductProblem p{};
  p.tokens = narrow.dimensions()[0];
  p.rank = narrow.dimensions()[1];
  p.features = wide.dimensions()[1];
  p.features_first = features_first != 0;
  const bool fits = p.features_first ? Has(*sums, ffi::DataType::F32, {p.features, p.rank})
                                     : Has(*sums, ffi::DataType::F32, {p.rank, p.features});
  if (!fits || !Has(narrow, ffi::DataType::BF16, {p.tokens, p.rank}) ||
      !Has(wide, ffi::DataType::BF16, {p.tokens, p.features})) {
    return refuse("narrow " + Shape(narrow) + ", wide " + Shape(wide) + " and the result " + Shape(*sums) +
                  " do not fit each other");
  }
  p.narrow = static_cast<const uint16_t*>(narrow.untyped_data());
  p.wide = static_cast<const uint16_t*>(wide.untyped_data());
  p.sums = sums->typed_data<float>();
  if (p.rank == 0 || p.features == 0) return ffi::Error::Success();
  if (p.tokens == 0) {
    std::fill_n(p.sums, p.rank * p.features, 0.0f);
    return ffi::Error::Success();
  }
  try {
    const Workspace packed(kernels->packed_bytes(p));
    kernels->pack(p, packed.get());
    const int64_t tasks = (p.features + kernels->feature_step - 1) / kernels->feature_step;
    const int64_t workers = std::min<int64_t>(std::max<int64_t>(1, pool.num_threads()), tasks);
    const Workspace workspace(workers, kernels->workspace_bytes(p));
    ForEach(pool, tasks, workers, [&](int64_t task, int64_t worker) {
      kernels->multiply(p, task * kernels->feature_step, packed.get(), workspace.of(worker));
    });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "outer_product: no memory to pack " + Shape(narrow));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OuterProduct, Implementation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("features_first"));

}  // namespace qlora_jax
