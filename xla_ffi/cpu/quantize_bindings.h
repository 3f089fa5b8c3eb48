#ifndef QLORA_JAX_CPU_QUANTIZE_BINDINGS_H_
#define QLORA_JAX_CPU_QUANTIZE_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace qlora_jax {

// Adds `quantize` to the module: a weight straight from its bytes in memory or in a mapped file, without XLA.
void BindQuantize(pybind11::module_& m);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_QUANTIZE_BINDINGS_H_
