// qlora_jax._lib._faults, in sanitized builds alone: a handler with faults, each of which has to end the process.
#include <pybind11/pybind11.h>

#include <climits>
#include <cstdint>
#include <memory>

#include "capsule.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace {

constexpr const char* kFaults[] = {"none",           "read past the end",    "read before the start",
                                   "write past the end", "write an argument", "read past the end of scratch",
                                   "load that the compiler does not see", "signed overflow", "misaligned load"};

// x and y are uint8 of one length, a multiple of 8.
ffi::Error Fault(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, int64_t fault) {
  // Volatile, so that nothing is known when this is compiled, and no access is left out.
  volatile uint8_t* const argument = x.typed_data<uint8_t>();
  volatile uint8_t* const result = y->typed_data<uint8_t>();
  const int64_t size = static_cast<int64_t>(x.size_bytes());
  for (int64_t i = 0; i < size; ++i) result[i] = argument[i];
  switch (fault) {
    case 1:
      result[0] = argument[size];
      break;
    case 2:
      result[0] = argument[-1];
      break;
    case 3:
      result[size] = 0;
      break;
    case 4:
      argument[0] = 0;
      break;
    case 5: {
      const std::unique_ptr<uint8_t[]> scratch(new uint8_t[static_cast<size_t>(size)]());
      result[0] = const_cast<volatile uint8_t*>(scratch.get())[size];
      break;
    }
    case 6: {
      const volatile uint8_t* const end = argument + size;
      uint8_t value;
#if defined(__x86_64__)
      asm volatile("movb (%1), %0" : "=q"(value) : "r"(end));
#elif defined(__aarch64__)
      asm volatile("ldrb %w0, [%1]" : "=r"(value) : "r"(end));
#else
#error "the instruction that loads a byte on this processor is missing"
#endif
      result[0] = value;
      break;
    }
    case 7: {
      volatile int number = INT_MAX;
      number = number + 1;
      break;
    }
    case 8:
      result[0] = static_cast<uint8_t>(*reinterpret_cast<const volatile uint32_t*>(argument + 1));
      break;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RunFault, Fault,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("fault"));

PYBIND11_MODULE(_faults, m) {
  m.doc() = "Faults on purpose: what a sanitized build must not survive.";
  m.def(
      "handler", [] { return qlora_jax::Capsule(RunFault); },
      "Capsule of a handler (x uint8, attribute `fault`: an index into names()) -> x.");
  m.def(
      "names",
      [] {
        py::list names;
        for (const char* name : kFaults) names.append(name);
        return names;
      },
      "The faults; the first is none.");
}
