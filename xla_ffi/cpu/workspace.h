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
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  uint8_t* get() const { return data_; }

 private:
  uint8_t* data_;
  int64_t size_;
};

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_WORKSPACE_H_
