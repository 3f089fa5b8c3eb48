// Under sanitizers a handler sees copies of its buffers that end where accessible memory ends.
//
// The address sanitizer checks the accesses that the compiler can follow: not masked loads and stores, gathers, AMX
// tiles or assembly. The processor checks all of them at the border of a page. And XLA allocates an array on its own
// with its size rounded up, or as a piece of a larger allocation, where no check knows its end.
#ifndef QLORA_JAX_TESTS_SANITIZE_GUARDED_H_
#define QLORA_JAX_TESTS_SANITIZE_GUARDED_H_

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace qlora_jax {

// Memory of `size` bytes between two pages that nothing may touch. Its last byte is the last of a page, so its start
// has the alignment of its elements and no more; the bytes before it are poisoned for the address sanitizer.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inside_ = (size + page - 1) / page * page;
    whole_ = inside_ + 2 * page;
    void* start = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) std::abort();
    start_ = static_cast<uint8_t*>(start);
    first_ = start_ + page;
    if (inside_ > 0 && mprotect(first_, inside_, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = first_ + (inside_ - size);
    ASAN_POISON_MEMORY_REGION(first_, inside_ - size);
  }
  GuardedMemory(GuardedMemory&& other)
      : start_(std::exchange(other.start_, nullptr)),
        first_(other.first_),
        data_(other.data_),
        inside_(other.inside_),
        whole_(other.whole_) {}
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() {
    if (start_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(first_, inside_);
    munmap(start_, whole_);
  }

  uint8_t* data() const { return data_; }
  void ForbidWriting() const {
    if (inside_ > 0 && mprotect(first_, inside_, PROT_READ) != 0) std::abort();
  }

 private:
  uint8_t* start_;
  uint8_t* first_;  // behind the first forbidden page
  uint8_t* data_;
  size_t inside_, whole_;
};

// A call frame like another, with guarded copies of its buffers: arguments cannot be written, results hold 0xff, which
// is NaN as a float, until they are. After the call they lie in memory that is gone.
class GuardedCall {
 public:
  explicit GuardedCall(const XLA_FFI_CallFrame& frame)
      : frame_(frame),
        arguments_(frame.args.args, frame.args.args + frame.args.size),
        results_(frame.rets.rets, frame.rets.rets + frame.rets.size) {
    buffers_.reserve(arguments_.size() + results_.size());
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (frame.args.types[i] != XLA_FFI_ArgType_BUFFER) continue;
      const size_t size = Replace(&arguments_[i]);
      if (size > 0) std::memcpy(memory_.back().data(), originals_.back()->data, size);
      memory_.back().ForbidWriting();
    }
    first_result_ = memory_.size();
    for (size_t i = 0; i < results_.size(); ++i) {
      if (frame.rets.types[i] != XLA_FFI_RetType_BUFFER) continue;
      const size_t size = Replace(&results_[i]);
      if (size > 0) std::memset(memory_.back().data(), 0xff, size);
    }
    frame_.args.args = arguments_.data();
    frame_.rets.rets = results_.data();
  }

  XLA_FFI_CallFrame* frame() { return &frame_; }

  void CopyResults() const {
    for (size_t i = first_result_; i < memory_.size(); ++i) {
      const size_t size = Size(*originals_[i]);
      if (size > 0) std::memcpy(originals_[i]->data, memory_[i].data(), size);
    }
  }

 private:
  static size_t Size(const XLA_FFI_Buffer& buffer) {
    size_t size = xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(buffer.dtype));
    for (int64_t i = 0; i < buffer.rank; ++i) size *= static_cast<size_t>(buffer.dims[i]);
    return size;
  }

  size_t Replace(void** buffer) {
    const XLA_FFI_Buffer* const original = static_cast<XLA_FFI_Buffer*>(*buffer);
    originals_.push_back(original);
    memory_.emplace_back(Size(*original));
    buffers_.push_back(*original);
    buffers_.back().data = memory_.back().data();
    *buffer = &buffers_.back();
    return Size(*original);
  }

  XLA_FFI_CallFrame frame_;
  std::vector<void*> arguments_, results_;
  std::vector<XLA_FFI_Buffer> buffers_;
  std::vector<const XLA_FFI_Buffer*> originals_;
  std::vector<GuardedMemory> memory_;
  size_t first_result_ = 0;
};

using HandlerPointer = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

// Handlers are functions without state: each gets one of these to stand for it.
inline std::array<HandlerPointer, 16> guarded_handlers{};

template <size_t kSlot>
XLA_FFI_Error* CallGuarded(XLA_FFI_CallFrame* frame) {
  GuardedCall call(*frame);
  XLA_FFI_Error* const error = guarded_handlers[kSlot](call.frame());
  frame->future = call.frame()->future;
  if (error == nullptr) call.CopyResults();
  return error;
}

template <size_t... kSlots>
HandlerPointer Slot(size_t slot, std::index_sequence<kSlots...>) {
  static constexpr HandlerPointer calls[] = {CallGuarded<kSlots>...};
  return calls[slot];
}

// The handler that runs `handler` on guarded buffers.
inline HandlerPointer Guarded(HandlerPointer handler) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t slot = 0; slot < guarded_handlers.size(); ++slot) {
    if (guarded_handlers[slot] == nullptr) guarded_handlers[slot] = handler;
    if (guarded_handlers[slot] == handler) {
      return Slot(slot, std::make_index_sequence<std::tuple_size_v<decltype(guarded_handlers)>>());
    }
  }
  std::abort();
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_TESTS_SANITIZE_GUARDED_H_
