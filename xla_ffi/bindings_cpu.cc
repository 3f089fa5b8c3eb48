// qlora_jax._lib._cpu: hands the CPU handlers to Python.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/handlers.h"
#include "nf4.h"
#include "xla/ffi/api/c_api.h"

namespace py = pybind11;

namespace {

template <typename Handler>
py::capsule Capsule(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>, "an XLA FFI handler is needed");
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict Registrations() {
  qlora_jax::BestInstructionSet();  // a wrong QLORA_JAX_ISA is reported here, not in the middle of a computation
  py::dict targets;
  targets["qlora_jax_nf4_matmul"] = Capsule(qlora_jax::Nf4Matmul);
  targets["qlora_jax_nf4_matmul_dx"] = Capsule(qlora_jax::Nf4MatmulDx);
  return targets;
}

template <typename Table>
py::list Values(const Table& table) {
  py::list values;
  for (const float value : table.value) values.append(value);
  return values;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "NF4 matrix products on the CPU, as XLA FFI handlers.";
  m.def("registrations", &Registrations, "Target name -> capsule, for jax.ffi.register_ffi_target.");
  m.def(
      "instruction_set", [] { return qlora_jax::BestInstructionSet().name; },
      "Name of the instruction set whose kernels run.");
  m.def("nf4_code", [] { return Values(qlora_jax::MakeNf4Code()); }, "The 16 NF4 values.");
  m.def("dynamic_map", [] { return Values(qlora_jax::MakeDynamicMap()); },
        "The 256 values of a double-quantized scale.");
}
