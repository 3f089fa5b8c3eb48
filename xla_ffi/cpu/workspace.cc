#include "workspace.h"

#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

namespace qlora_jax {
namespace {

// What is kept at most, in the process. Sanitizers see every call in fresh memory.
#ifdef QLORA_JAX_SANITIZE
constexpr int64_t kMaxKept = 0;
#else
constexpr int64_t kMaxKept = int64_t{128} << 20;
#endif
constexpr size_t kMaxBlocks = 64;
constexpr int64_t kLine = 64;
constexpr std::align_val_t kAlignment{kLine};

int64_t RoundUpToLine(int64_t size) { return (size + kLine - 1) / kLine * kLine; }

struct Block {
  uint8_t* data;
  int64_t size;
};

struct Kept {
  Kept() { blocks.reserve(kMaxBlocks); }  // so that giving a block back needs no memory

  std::mutex mutex;
  std::vector<Block> blocks;  // the first was given back first
  int64_t size = 0;
};

// Never destroyed: threads may still compute when the process ends.
Kept& kept() {
  static Kept& kept = *new Kept;
  return kept;
}

}  // namespace

Workspace::Workspace(int64_t size) : size_(size) {
  {
    Kept& k = kept();
    std::lock_guard<std::mutex> lock(k.mutex);
    // The smallest that is large enough, but none that would leave another call without.
    auto best = k.blocks.end();
    for (auto block = k.blocks.begin(); block != k.blocks.end(); ++block) {
      const bool fits = block->size >= size && block->size / 4 <= size;
      if (fits && (best == k.blocks.end() || block->size < best->size)) best = block;
    }
    if (best != k.blocks.end()) {
      data_ = best->data;
      size_ = best->size;
      k.size -= size_;
      k.blocks.erase(best);
      return;
    }
  }
  data_ = static_cast<uint8_t*>(::operator new[](size, kAlignment));
}

Workspace::Workspace(int64_t workers, int64_t size) : Workspace(workers * RoundUpToLine(size)) {
  stride_ = RoundUpToLine(size);
}

Workspace::~Workspace() {
  Kept& k = kept();
  std::lock_guard<std::mutex> lock(k.mutex);
  if (k.blocks.size() == kMaxBlocks || size_ > kMaxKept) {
    ::operator delete[](data_, kAlignment);
    return;
  }
  k.blocks.push_back({data_, size_});
  k.size += size_;
  while (k.size > kMaxKept) {
    ::operator delete[](k.blocks.front().data, kAlignment);
    k.size -= k.blocks.front().size;
    k.blocks.erase(k.blocks.begin());
  }
}

}  // namespace qlora_jax
