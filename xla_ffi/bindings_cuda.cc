// qlora_jax._lib._cuda: hands the CUDA handlers to Python. Importing it needs neither a GPU nor its driver.
#include <pybind11/pybind11.h>

#include "capsule.h"
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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "NF4 matrix products and dequantization on NVIDIA GPUs, as XLA FFI handlers.";
  m.def("registrations", &Registrations, "Target name -> capsule, for jax.ffi.register_ffi_target.");
  m.def(
      "architectures", [] { return QLORA_JAX_CUDA_ARCHITECTURES; },
      "The GPU architectures whose machine code is inside, separated by commas.");
}
