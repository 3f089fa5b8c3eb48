#ifndef QLORA_JAX_CPU_WORKSPACE_H_
#define QLORA_JAX_CPU_WORKSPACE_H_

#include <cstdint>

namespace qlora_jax {

// Memory of one call, aligned to 64 bytes, a line of the caches. Throws std::bad_alloc.
//
// Some of it is kept for later calls: the kernel hands out fresh memory page by page, zeroed, as it is touched, which
// takes a tenth of the time of a product of 2048 rows.
class Workspace {
 public:
  explicit Workspace(int64_t size);
  // `size` bytes for each worker, in lines of its own.
  Workspace(int64_t workers, int64_t size);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  uint8_t* get() const { return data_; }
  uint8_t* of(int64_t worker) const { return data_ + worker * stride_; }

 private:
  int64_t stride_ = 0;
  uint8_t* data_;
  int64_t size_;
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_WORKSPACE_H_
