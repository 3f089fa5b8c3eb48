// Launches through the CUDA runtime.
#ifndef QLORA_JAX_CUDA_DEVICE_LAUNCHER_H_
#define QLORA_JAX_CUDA_DEVICE_LAUNCHER_H_

#include <cstdint>
#include <string>

#include "launcher.h"

namespace qlora_jax {

// On the current device, which XLA has made the stream's own.
class DeviceLauncher : public Launcher {
 public:
  explicit DeviceLauncher(void* stream) : stream_(stream) {}
  std::string Put(const Launch& launch, void** arguments) override;
  std::string Clear(void* data, int64_t bytes) override;

 private:
  void* stream_;  // cudaStream_t
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_DEVICE_LAUNCHER_H_
