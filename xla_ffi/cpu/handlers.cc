#include "handlers.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>

#include "../operands.h"
#include "dispatch.h"
#include "parallel.h"
#include "problem.h"
#include "workspace.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

// Checks every operand and reads `where`, which on a CPU is within reach.
ffi::ErrorOr<Problem> Decode(const ProductOperands& o, const ffi::AnyBuffer& u, const ffi::AnyBuffer& v) {
  const auto refuse = [](const std::string& message) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("nf4_matmul: " + message));
  };
  const ffi::ErrorOr<ProductShapes> product = CheckProduct(o);
  if (product.has_error()) return ffi::Unexpected(product.error());
  const int64_t rank = u.dimensions().size() == 2 ? u.dimensions()[1] : 0;
  if (!Has(u, o.x.element_type(), {product->rows, rank}) || !Has(v, o.x.element_type(), {product->outputs, rank})) {
    return refuse("an adapter's u " + Shape(u) + " and v " + Shape(v) + " do not fit " + Shapes(o) +
                  ": needs [rows, rank] and [outputs, rank] of the same dtype");
  }
  const WeightShape& shape = product->weight;
  const int32_t* where = o.weight.where.typed_data<int32_t>();
  const int64_t layer = std::clamp<int64_t>(where[0], 0, shape.layers - 1);

  Problem problem{};
  problem.input_gradient = o.input_gradient;
  problem.x = o.x.untyped_data();
  problem.y = o.y.untyped_data();
  problem.dtype = product->dtype;
  problem.rows = product->rows;
  problem.reduction = product->reduction;
  problem.outputs = product->outputs;
  problem.u = u.untyped_data();
  problem.v = v.untyped_data();
  problem.rank = rank;
  problem.weight_dtype = shape.dtype;
  Nf4Weight& w = problem.weight;
  w.in_features = shape.in_features;
  w.out_features = shape.out_features;
  w.block_shift = shape.block_shift;
  w.row_blocks = shape.row_blocks;
  w.packed = o.weight.packed.typed_data<uint8_t>() +
             layer * PackedBytes(shape.layout, shape.in_features, shape.out_features);
  if (!shape.double_quantized) {
    w.scales = o.weight.absmax.typed_data<float>() + layer * shape.blocks;
    return problem;
  }

  w.scale_codes = o.weight.absmax.typed_data<uint8_t>() + layer * shape.blocks;
  w.first_row = where[1];
  w.first_block = where[2];
  if (w.first_row < 0 || w.first_block < 0 || (w.row_blocks == 0 && (w.first_row > 0 || w.first_block > 0)) ||
      (w.row_blocks > 0 && w.first_block + shape.own_row_blocks() > w.row_blocks)) {
    return refuse("first row " + std::to_string(w.first_row) + " and first block " + std::to_string(w.first_block) +
                  " do not lie in a tensor of " + std::to_string(w.row_blocks) + " blocks a row");
  }
  const std::string missing = MissingGroups(o.weight, shape, shape.LastBlock(w.first_row, w.first_block));
  if (!missing.empty()) return refuse(missing);
  w.group_scales = o.weight.absmax_scale.typed_data<float>() + layer * shape.layer_groups;
  w.offset = o.weight.absmax_offset.typed_data<float>()[layer];
  return problem;
}

// Below this number of multiply-adds a call costs less than waking other threads.
constexpr int64_t kSerialWork = int64_t{1} << 18;

void Multiply(ffi::ThreadPool& pool, const Problem& problem) {
  const Method& method = BestInstructionSet().choose(problem);
  const bool serial = problem.rows * (problem.reduction + problem.rank) * problem.outputs < kSerialWork;
  const int64_t threads = serial ? 1 : std::max<int64_t>(1, pool.num_threads());
  const Plan plan = method.plan(problem, threads);

  const Workspace packed(plan.packed_bytes);
  ForEach(pool, plan.pack_tasks, threads, [&](int64_t task, int64_t) { method.pack(problem, task, packed.get()); });

  const int64_t workers = std::min(threads, plan.tasks);
  const Workspace workspace(workers, plan.workspace_bytes);
  ForEach(pool, plan.tasks, workers, [&](int64_t task, int64_t worker) {
    method.multiply(problem, plan, task, packed.get(), workspace.of(worker));
  });
}

ffi::Error Run(ffi::ThreadPool pool, const ProductOperands& operands, const ffi::AnyBuffer& u,
               const ffi::AnyBuffer& v) {
  ffi::ErrorOr<Problem> problem = Decode(operands, u, v);
  if (problem.has_error()) return problem.error();
  if (problem->rows == 0 || problem->outputs == 0) return ffi::Error::Success();
  if (problem->reduction + problem->rank == 0) {
    std::fill_n(static_cast<uint8_t*>(problem->y), operands.y.size_bytes(), uint8_t{0});
    return ffi::Error::Success();
  }
  try {
    Multiply(pool, *problem);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "nf4_matmul: no memory to pack activations " + Shape(operands.x));
  }
  return ffi::Error::Success();
}

template <bool kInputGradient>
ffi::Error Implementation(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer absmax,
                          ffi::AnyBuffer absmax_scale, ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where,
                          ffi::AnyBuffer u, ffi::AnyBuffer v, ffi::Result<ffi::AnyBuffer> y, int64_t row_blocks,
                          int64_t block_size, int64_t weight_dtype) {
  const WeightOperands weight{packed,     absmax,     absmax_scale, absmax_offset,                       where,
                              row_blocks, block_size, weight_dtype, static_cast<int64_t>(Layout::kRows)};
  return Run(pool, {x, *y, weight, kInputGradient}, u, v);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("row_blocks")
      .Attr<int64_t>("block_size")
      .Attr<int64_t>("weight_dtype");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4Matmul, Implementation<false>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4MatmulDx, Implementation<true>, Binding());

}  // namespace qlora_jax
