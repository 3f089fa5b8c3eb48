// How handlers reach Python: as the capsules that jax.ffi.register_ffi_target takes.
#ifndef QLORA_JAX_CAPSULE_H_
#define QLORA_JAX_CAPSULE_H_

#include <pybind11/pybind11.h>

#include <type_traits>

#include "xla/ffi/api/c_api.h"
#ifdef QLORA_JAX_SANITIZE
#include "guarded.h"
#endif

namespace qlora_jax {

template <typename Handler>
pybind11::capsule Capsule(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>, "an XLA FFI handler is needed");
#ifdef QLORA_JAX_SANITIZE
  handler = Guarded(handler);
#endif
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_CAPSULE_H_
