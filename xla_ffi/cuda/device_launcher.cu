#include "device_launcher.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "kernel_names.h"

// Only the kernels' addresses are taken here; what they take is said where they are defined.
#define QLORA_JAX_DECLARE(name) extern "C" __global__ void name();
QLORA_JAX_CUDA_KERNELS(QLORA_JAX_DECLARE)
#undef QLORA_JAX_DECLARE

namespace qlora_jax {
namespace {

// What a block gets without asking.
constexpr uint32_t kDefaultSharedBytes = 48 * 1024;
constexpr int kMaxDevices = 64;

struct Kernel {
  const char* name;
  const void* function;
  // Whether a device was told how much shared memory the kernel takes. A race between two threads that both find it
  // untold ends in telling it twice, which changes nothing.
  std::atomic<bool> told[kMaxDevices];
};

Kernel kKernels[] = {
#define QLORA_JAX_ENTRY(name) {#name, reinterpret_cast<const void*>(&::name), {}},
    QLORA_JAX_CUDA_KERNELS(QLORA_JAX_ENTRY)
#undef QLORA_JAX_ENTRY
};

Kernel* Find(const std::string& name) {
  for (Kernel& kernel : kKernels) {
    if (name == kernel.name) return &kernel;
  }
  return nullptr;
}

std::string Text(cudaError_t error) {
  return error == cudaSuccess ? "" : std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

std::string AllowSharedBytes(Kernel& kernel, uint32_t bytes) {
  if (bytes <= kDefaultSharedBytes) return "";
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Text(error);
  const bool remembered = device < kMaxDevices;
  if (remembered && kernel.told[device].load(std::memory_order_acquire)) return "";
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // the error is reported here, not by the next call of whomever
    return Text(error);
  }
  if (remembered) kernel.told[device].store(true, std::memory_order_release);
  return "";
}

}  // namespace

std::string DeviceLauncher::Put(const Launch& launch, void** arguments) {
  Kernel* kernel = Find(launch.kernel);
  if (kernel == nullptr) return "this library has no such kernel";
  const std::string refused = AllowSharedBytes(*kernel, launch.shared_bytes);
  if (!refused.empty()) return refused;
  const cudaError_t error =
      cudaLaunchKernel(kernel->function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
                       dim3(launch.block[0], launch.block[1], launch.block[2]), arguments, launch.shared_bytes,
                       static_cast<cudaStream_t>(stream_));
  const cudaError_t last = cudaGetLastError();
  return Text(error != cudaSuccess ? error : last);
}

std::string DeviceLauncher::Clear(void* data, int64_t bytes) {
  const cudaError_t error = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream_));
  const cudaError_t last = cudaGetLastError();
  return Text(error != cudaSuccess ? error : last);
}

}  // namespace qlora_jax
