// qlora_jax._lib._plan: the launch plans of the CUDA kernels as data, and their handlers with a recorder in place of a
// GPU. Host code, built everywhere: tests replay it, and the split of a contraction is chosen here at trace time.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "capsule.h"
#include "cuda/kernel_names.h"
#include "cuda/plan.h"
#include "cuda/product_shape.h"
#include "cuda/recorder.h"

namespace py = pybind11;

namespace {

using qlora_jax::Argument;
using qlora_jax::Buffer;
using qlora_jax::CudaProblem;
using qlora_jax::Dtype;
using qlora_jax::Launch;
using qlora_jax::Layout;
using qlora_jax::Operation;
using qlora_jax::Plan;
using qlora_jax::ProductShape;
using qlora_jax::Route;

template <typename Value, size_t kSize>
Value Named(const char* what, const std::string& name, const char* const (&names)[kSize]) {
  std::string all;
  for (size_t i = 0; i < kSize; ++i) {
    if (name == names[i]) return static_cast<Value>(i);
    all += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + all + ", got " + name);
}

// In the order of the enumerations.
constexpr const char* kOperations[] = {"forward", "dx", "dequantize"};
constexpr const char* kRoutes[] = {"skinny", "tile"};
constexpr const char* kLayouts[] = {"rows", "fragments"};
constexpr const char* kDtypes[] = {"float32", "bfloat16", "float16"};
constexpr const char* kBuffers[] = {"x",     "y",     "packed", "absmax",  "group_scales",
                                    "offsets", "where", "dense",  "partials"};

int BlockShift(int64_t block_size) {
  int shift = 0;
  while (shift < 62 && int64_t{1} << shift < block_size) ++shift;
  if (int64_t{1} << shift != block_size) throw std::invalid_argument("block_size must be a power of two");
  return shift;
}

py::tuple ToPython(const Argument& argument) {
  switch (argument.kind) {
    case Argument::Kind::kPointer:
      return py::make_tuple("pointer", kBuffers[static_cast<int>(argument.buffer)], argument.value);
    case Argument::Kind::kInt32:
      return py::make_tuple("int32", argument.value);
    case Argument::Kind::kInt64:
      break;
  }
  return py::make_tuple("int64", argument.value);
}

py::dict ToPython(const Launch& launch) {
  py::dict result;
  result["kernel"] = launch.kernel;
  result["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  result["block"] = py::make_tuple(launch.block[0], launch.block[1], launch.block[2]);
  result["shared_bytes"] = launch.shared_bytes;
  py::list arguments;
  for (const Argument& argument : launch.arguments) arguments.append(ToPython(argument));
  result["arguments"] = arguments;
  return result;
}

py::dict MakePlan(const std::string& operation, const std::string& route, const std::string& layout,
                  const std::string& dtype, const std::string& weight_dtype, int64_t tokens, int64_t in_features,
                  int64_t out_features, int64_t layers, int64_t layer_groups, int64_t row_blocks, int64_t block_size,
                  bool double_quantized, int64_t splits) {
  const Plan plan = qlora_jax::MakePlan({Named<Operation>("operation", operation, kOperations),
                                         Named<Route>("route", route, kRoutes),
                                         Named<Layout>("layout", layout, kLayouts),
                                         Named<Dtype>("dtype", dtype, kDtypes),
                                         Named<Dtype>("weight_dtype", weight_dtype, kDtypes), tokens, in_features,
                                         out_features, layers, layer_groups, row_blocks, BlockShift(block_size),
                                         double_quantized, splits});
  if (!plan.error.empty()) throw std::invalid_argument(plan.error);
  py::dict result;
  py::list launches;
  for (const Launch& launch : plan.launches) launches.append(ToPython(launch));
  result["launches"] = launches;
  result["partials_bytes"] = plan.partials_bytes;
  result["zero_bytes"] = plan.zero_bytes;
  return result;
}

int64_t ChooseSplits(const std::string& operation, const std::string& route, int64_t tokens, int64_t in_features,
                     int64_t out_features, int64_t multiprocessors) {
  CudaProblem problem{};
  problem.operation = Named<Operation>("operation", operation, kOperations);
  problem.route = Named<Route>("route", route, kRoutes);
  problem.tokens = tokens;
  problem.in_features = in_features;
  problem.out_features = out_features;
  return qlora_jax::ChooseSplits(problem, multiprocessors);
}

py::list ProductShapes() {
  py::list shapes;
  for (const ProductShape& shape : qlora_jax::kProductShapes) {
    py::dict result;
    result["tokens"] = shape.tokens;
    result["rows"] = shape.rows();
    result["threads"] = shape.threads();
    result["k_groups"] = shape.k_groups;
    result["stages"] = shape.stages;
    result["shared_bytes"] = shape.shared_bytes();
    shapes.append(result);
  }
  return shapes;
}

py::list KernelNames() {
  py::list names;
#define QLORA_JAX_APPEND(name) names.append(#name);
  QLORA_JAX_CUDA_KERNELS(QLORA_JAX_APPEND)
#undef QLORA_JAX_APPEND
  return names;
}

py::dict RecordingHandlers() {
  py::dict targets;
  targets["qlora_jax_nf4_matmul"] = qlora_jax::Capsule(qlora_jax::RecordNf4Matmul);
  targets["qlora_jax_nf4_matmul_dx"] = qlora_jax::Capsule(qlora_jax::RecordNf4MatmulDx);
  targets["qlora_jax_nf4_dequantize"] = qlora_jax::Capsule(qlora_jax::RecordNf4Dequantize);
  return targets;
}

py::list TakeRecord() {
  py::list launches;
  for (const qlora_jax::RecordedLaunch& recorded : qlora_jax::TakeRecord()) {
    py::dict launch = ToPython(recorded.launch);
    py::list seen;
    for (const int64_t value : recorded.seen) seen.append(value);
    launch["seen"] = seen;
    launches.append(launch);
  }
  return launches;
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Launch plans of the CUDA kernels as data.";
  m.def("plan", &MakePlan, py::arg("operation"), py::kw_only(), py::arg("route") = "skinny",
        py::arg("layout") = "fragments", py::arg("dtype") = "bfloat16", py::arg("weight_dtype") = "bfloat16",
        py::arg("tokens") = 0, py::arg("in_features"), py::arg("out_features"), py::arg("layers") = 1,
        py::arg("layer_groups") = 0, py::arg("row_blocks") = 0, py::arg("block_size") = 64,
        py::arg("double_quantized") = true, py::arg("splits") = 1,
        "What a CUDA handler launches for operation \"forward\", \"dx\" or \"dequantize\": {launches, partials_bytes, "
        "zero_bytes}, a launch {kernel, grid, block, shared_bytes, arguments}, an argument (\"pointer\", buffer, byte "
        "offset), (\"int32\", value) or (\"int64\", value). ValueError with the shape where no kernel serves.");
  m.def("splits", &ChooseSplits, py::arg("operation"), py::kw_only(), py::arg("route"), py::arg("tokens"),
        py::arg("in_features"), py::arg("out_features"), py::arg("multiprocessors"),
        "In how many parts a product's contraction is best split on a GPU with that many multiprocessors.");
  m.def("product_shapes", &ProductShapes, "Sizes of the fused kernels, one dict for each tile of tokens.");
  m.def("kernel_names", &KernelNames, "Entry points of all CUDA kernels.");
  m.def(
      "cuda_build", [] { return QLORA_JAX_CUDA_BUILD; }, "Whether this build has CUDA kernels, or why not.");
  m.def("recording_handlers", &RecordingHandlers,
        "Target name -> capsule of the CUDA handlers for platform \"cpu\": they record launches and make none.");
  m.def("take_record", &TakeRecord, "The launches recorded since the last call, each with what its arguments hold.");
  m.def("fail_next_launch", &qlora_jax::FailNextLaunch, "Makes the next recorded launch report a failure.");
}
