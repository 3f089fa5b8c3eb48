#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace qlora_jax {
namespace {

// About 50 microseconds.
constexpr int kLooks = 1000;

void Pause() {
#ifdef QLORA_JAX_X86
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Shared with the pool: a thread may come to it after ForEach has returned, and then finds no task left.
struct Job {
  Job(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) : tasks(tasks), body(&body) {}

  void Work(int64_t worker) {
    int64_t finished = 0;
    for (int64_t task = next++; task < tasks; task = next++) {
      (*body)(task, worker);
      ++finished;
    }
    if (finished == 0) return;
    if ((done += finished) != tasks) return;
    std::lock_guard<std::mutex> lock(mutex);  // or the notice could come between the waiter's look and its sleep
    all_done.notify_one();
  }

  // Other threads have a part of a task left at most. Being woken takes as long as a small product, so at first it looks
  // again and again.
  void Wait() {
    for (int look = 0; look < kLooks; ++look) {
      if (done == tasks) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == tasks; });
  }

  const int64_t tasks;
  const std::function<void(int64_t, int64_t)>* const body;  // lives until the last task is done
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  std::atomic<int64_t> done{0};
};

}  // namespace

void ForEach(xla::ffi::ThreadPool& pool, int64_t tasks, int64_t workers,
             const std::function<void(int64_t task, int64_t worker)>& body) {
  workers = std::min(workers, tasks);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  const auto job = std::make_shared<Job>(tasks, body);
  for (int64_t worker = 1; worker < workers; ++worker) {
    pool.Schedule([job, worker] { job->Work(worker); });
  }
  job->Work(0);
  job->Wait();
}

}  // namespace qlora_jax
