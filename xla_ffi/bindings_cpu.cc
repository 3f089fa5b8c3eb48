// qlora_jax._lib._cpu: hands the CPU handlers to Python.
#include <pybind11/pybind11.h>

#include "capsule.h"
#include "cpu/attention_handler.h"
#include "cpu/dispatch.h"
#include "cpu/handlers.h"
#include "cpu/outer_product_handler.h"
#include "cpu/quantize_bindings.h"
#include "cpu/quantize_handler.h"
#include "nf4.h"

namespace py = pybind11;

namespace {

py::dict Registrations() {
  qlora_jax::BestInstructionSet();  // a wrong QLORA_JAX_ISA is reported here, not in the middle of a computation
  py::dict targets;
  targets["qlora_jax_nf4_matmul"] = qlora_jax::Capsule(qlora_jax::Nf4Matmul);
  targets["qlora_jax_nf4_matmul_dx"] = qlora_jax::Capsule(qlora_jax::Nf4MatmulDx);
  targets["qlora_jax_nf4_quantize"] = qlora_jax::Capsule(qlora_jax::Nf4Quantize);
  targets["qlora_jax_causal_attention"] = qlora_jax::Capsule(qlora_jax::CausalAttention);
  targets["qlora_jax_causal_attention_gradients"] = qlora_jax::Capsule(qlora_jax::CausalAttentionGradients);
  targets["qlora_jax_outer_product"] = qlora_jax::Capsule(qlora_jax::OuterProduct);
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
  m.doc() = "NF4 matrix products and 4-bit quantization on the CPU, as XLA FFI handlers.";
  qlora_jax::BindQuantize(m);
  m.def("registrations", &Registrations, "Target name -> capsule, for jax.ffi.register_ffi_target.");
  m.def(
      "instruction_set", [] { return qlora_jax::BestInstructionSet().name; },
      "Name of the instruction set whose kernels run.");
  m.def(
      "computes_in_tiles", [] { return qlora_jax::BestInstructionSet().attention != nullptr; },
      "Whether that instruction set has kernels in tiles of bfloat16: causal attention and outer products.");
  m.def("nf4_code", [] { return Values(qlora_jax::MakeNf4Code()); }, "The 16 NF4 values.");
  m.def("dynamic_map", [] { return Values(qlora_jax::MakeDynamicMap()); },
        "The 256 values of a double-quantized scale.");
}
