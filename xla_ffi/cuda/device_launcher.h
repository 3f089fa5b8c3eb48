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

struct DeviceProperties {
  std::string error;  // why they are unknown; empty if they are known
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  int max_shared_bytes;  // that a block can ask for
};

DeviceProperties PropertiesOf(int ordinal);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_DEVICE_LAUNCHER_H_
