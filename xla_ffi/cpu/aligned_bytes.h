#ifndef QLORA_JAX_CPU_ALIGNED_BYTES_H_
#define QLORA_JAX_CPU_ALIGNED_BYTES_H_

#include <cstdint>
#include <new>

namespace qlora_jax {

// Memory aligned to 64 bytes, a line of the caches. Throws std::bad_alloc.
class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t size) : data_(static_cast<uint8_t*>(::operator new[](size, std::align_val_t{64}))) {}
  ~AlignedBytes() { ::operator delete[](data_, std::align_val_t{64}); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  uint8_t* get() const { return data_; }

 private:
  uint8_t* data_;
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_ALIGNED_BYTES_H_
