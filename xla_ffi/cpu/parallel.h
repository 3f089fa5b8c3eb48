#ifndef QLORA_JAX_CPU_PARALLEL_H_
#define QLORA_JAX_CPU_PARALLEL_H_

#include <cstdint>
#include <functional>

#include "xla/ffi/api/ffi.h"

namespace qlora_jax {

// Calls body(task, worker) for every task in [0, tasks), 0 <= worker < workers, on XLA's threads and the caller's; no
// two calls with the same worker overlap. Returns when all calls have.
//
// The caller takes tasks too and waits only for tasks that a running thread has taken, so it cannot hang where the
// pool has no thread to give, as when every thread of it runs a handler. `body` must not throw.
void ForEach(xla::ffi::ThreadPool& pool, int64_t tasks, int64_t workers,
             const std::function<void(int64_t task, int64_t worker)>& body);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CPU_PARALLEL_H_
