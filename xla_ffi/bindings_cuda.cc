// qlora_jax._lib._cuda: hands the CUDA handlers to Python. Importing it needs neither a GPU nor its driver.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "capsule.h"
#include "cuda/device_launcher.h"
#include "cuda/targets.h"

namespace py = pybind11;

namespace {

py::dict Registrations() {
  py::dict targets;
  targets["qlora_jax_nf4_matmul"] = qlora_jax::Capsule(qlora_jax::Nf4MatmulCuda);
  targets["qlora_jax_nf4_matmul_dx"] = qlora_jax::Capsule(qlora_jax::Nf4MatmulDxCuda);
  targets["qlora_jax_nf4_dequantize"] = qlora_jax::Capsule(qlora_jax::Nf4DequantizeCuda);
  return targets;
}

py::dict Properties(int ordinal) {
  const qlora_jax::DeviceProperties found = qlora_jax::PropertiesOf(ordinal);
  if (!found.error.empty()) throw std::runtime_error(found.error);
  py::dict properties;
  properties["name"] = found.name;
  properties["compute_capability"] = py::make_tuple(found.major, found.minor);
  properties["multiprocessors"] = found.multiprocessors;
  properties["max_shared_bytes"] = found.max_shared_bytes;
  return properties;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "NF4 matrix products and dequantization on NVIDIA GPUs, as XLA FFI handlers.";
  m.def("registrations", &Registrations, "Target name -> capsule, for jax.ffi.register_ffi_target.");
  m.def("device_properties", &Properties, py::arg("ordinal") = 0,
        "Name, compute_capability, multiprocessors and max_shared_bytes of a GPU; RuntimeError without one.");
  m.def(
      "architectures", [] { return QLORA_JAX_CUDA_ARCHITECTURES; },
      "The GPU architectures whose machine code is inside, separated by commas.");
}
