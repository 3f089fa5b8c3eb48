#include "handlers.h"

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

// Addresses of a call's buffers, by the names that plans use.
struct Addresses {
  void* x = nullptr;
  void* y = nullptr;
  void* partials = nullptr;
  void* dense = nullptr;
  const WeightOperands* weight;

  void* Of(Buffer buffer) const {
    switch (buffer) {
      case Buffer::kX:
        return x;
      case Buffer::kY:
        return y;
      case Buffer::kPacked:
        return weight->packed.untyped_data();
      case Buffer::kAbsmax:
        return weight->absmax.untyped_data();
      case Buffer::kGroupScales:
        return weight->absmax_scale.untyped_data();
      case Buffer::kOffsets:
        return weight->absmax_offset.untyped_data();
      case Buffer::kWhere:
        return weight->where.untyped_data();
      case Buffer::kDense:
        return dense;
      case Buffer::kPartials:
        return partials;
    }
    return nullptr;
  }
};

std::string Text(const uint32_t (&extent)[3]) {
  return "(" + std::to_string(extent[0]) + ", " + std::to_string(extent[1]) + ", " + std::to_string(extent[2]) + ")";
}

std::string PutLaunch(Launcher& launcher, const Launch& launch, const Addresses& addresses) {
  // One word each; a 32-bit value lies in its first half, since every CUDA host is little-endian.
  std::vector<uint64_t> words;
  for (const Argument& argument : launch.arguments) {
    switch (argument.kind) {
      case Argument::Kind::kPointer:
        words.push_back(reinterpret_cast<uintptr_t>(addresses.Of(argument.buffer)) + argument.value);
        break;
      case Argument::Kind::kInt32:
      case Argument::Kind::kInt64:
        words.push_back(static_cast<uint64_t>(argument.value));
        break;
    }
  }
  std::vector<void*> arguments;
  for (uint64_t& word : words) arguments.push_back(&word);
  return launcher.Put(launch, arguments.data());
}

ffi::Error Execute(Launcher& launcher, const Plan& plan, const Addresses& addresses, const std::string& context) {
  if (!plan.error.empty()) return ffi::Error::InvalidArgument(context + ": " + plan.error);
  if (plan.zero_bytes > 0) {
    const std::string wrong = launcher.Clear(addresses.y, plan.zero_bytes);
    if (!wrong.empty()) return ffi::Error::Internal(context + ": clearing the result: " + wrong);
  }
  for (const Launch& launch : plan.launches) {
    const std::string wrong = PutLaunch(launcher, launch, addresses);
    if (!wrong.empty()) {
      return ffi::Error::Internal(context + ": " + launch.kernel + ", grid " + Text(launch.grid) + ", block " +
                                  Text(launch.block) + ", " + std::to_string(launch.shared_bytes) +
                                  " bytes of shared memory: " + wrong);
    }
  }
  return ffi::Error::Success();
}

CudaProblem Problem(const WeightShape& weight, Operation operation, Dtype dtype) {
  CudaProblem problem{};
  problem.operation = operation;
  problem.layout = weight.layout;
  problem.dtype = dtype;
  problem.weight_dtype = weight.dtype;
  problem.in_features = weight.in_features;
  problem.out_features = weight.out_features;
  problem.layers = weight.layers;
  problem.layer_groups = weight.layer_groups;
  problem.row_blocks = weight.row_blocks;
  problem.block_shift = weight.block_shift;
  problem.double_quantized = weight.double_quantized;
  return problem;
}

}  // namespace

ffi::Error RunProduct(Launcher& launcher, const ProductOperands& operands, ffi::RemainingRets partials,
                      int64_t route) {
  const ffi::ErrorOr<ProductShapes> product = CheckProduct(operands);
  if (product.has_error()) return product.error();
  const std::string context = "nf4_matmul: " + Shapes(operands);
  if (route < 0 || route > 1) {
    return ffi::Error::InvalidArgument(context + ": route must be 0 (skinny) or 1 (tile), got " +
                                       std::to_string(route));
  }
  CudaProblem problem =
      Problem(product->weight, operands.input_gradient ? Operation::kInputGradient : Operation::kForward,
              product->dtype);
  problem.route = static_cast<Route>(route);
  problem.tokens = product->rows;
  problem.splits = 1;
  Addresses addresses{operands.x.untyped_data(), operands.y.untyped_data(), nullptr, nullptr, &operands.weight};
  if (partials.size() > 0) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> result = partials.get<ffi::AnyBuffer>(0);
    if (result.has_error()) return result.error();
    const ffi::AnyBuffer& buffer = **result;
    problem.splits = buffer.dimensions().size() == 3 ? buffer.dimensions()[0] : 0;
    if (partials.size() > 1 || problem.splits < 1 ||
        !Has(buffer, ffi::DataType::F32, {problem.splits, product->rows, product->outputs})) {
      return ffi::Error::InvalidArgument(context + ": partials " + Shape(buffer) + " must be float32[splits, " +
                                         std::to_string(product->rows) + ", " + std::to_string(product->outputs) +
                                         "], the one result after it");
    }
    addresses.partials = buffer.untyped_data();
  }
  return Execute(launcher, MakePlan(problem), addresses, context);
}

ffi::Error RunDequantize(Launcher& launcher, const WeightOperands& operands, const ffi::AnyBuffer& dense) {
  const ffi::ErrorOr<DenseShape> shape = CheckDense(dense, operands);
  if (shape.has_error()) return shape.error();
  const CudaProblem problem = Problem(shape->weight, Operation::kDequantize, shape->dtype);
  const Addresses addresses{nullptr, nullptr, nullptr, dense.untyped_data(), &operands};
  return Execute(launcher, MakePlan(problem), addresses, "nf4_dequantize: dense " + Shape(dense));
}

}  // namespace qlora_jax
