// Who carries out a launch: the CUDA runtime, or a test that writes it down.
#ifndef QLORA_JAX_CUDA_LAUNCHER_H_
#define QLORA_JAX_CUDA_LAUNCHER_H_

#include <cstdint>
#include <string>

#include "plan.h"

namespace qlora_jax {

// Both functions put work on a stream and do not wait for it. They return what went wrong, or an empty string.
class Launcher {
 public:
  virtual ~Launcher() = default;
  // `arguments` point to the values of launch.arguments, each of its own size, as cudaLaunchKernel takes them.
  virtual std::string Put(const Launch& launch, void** arguments) = 0;
  virtual std::string Clear(void* data, int64_t bytes) = 0;
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_LAUNCHER_H_
