#include "recorder.h"

#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "handlers.h"
#include "launcher.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

std::mutex record_mutex;
std::vector<RecordedLaunch> record;
bool fail_next = false;

class Recorder : public Launcher {
 public:
  std::string Put(const Launch& launch, void** arguments) override {
    ++launches_;
    RecordedLaunch recorded{launch, {}};
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
      recorded.seen.push_back(See(launch.arguments[i], arguments[i]));
    }
    const std::lock_guard<std::mutex> lock(record_mutex);
    if (std::exchange(fail_next, false)) return "a failure that was asked for";
    record.push_back(std::move(recorded));
    return "";
  }

  std::string Clear(void* data, int64_t bytes) override {
    std::memset(data, 0, static_cast<size_t>(bytes));
    return "";
  }

 private:
  int64_t See(const Argument& argument, const void* value) const {
    switch (argument.kind) {
      case Argument::Kind::kInt32:
        return *static_cast<const int32_t*>(value);
      case Argument::Kind::kInt64:
        return *static_cast<const int64_t*>(value);
      case Argument::Kind::kPointer:
        break;
    }
    uint8_t* const pointer = *static_cast<uint8_t* const*>(value);
    if (pointer == nullptr) return -1;
    const Buffer buffer = argument.buffer;
    if (buffer == Buffer::kY || buffer == Buffer::kDense || buffer == Buffer::kPartials) *pointer = launches_;
    return *pointer;
  }

  uint8_t launches_ = 0;
};

template <bool kInputGradient>
ffi::Error Product(ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer absmax_scale,
                   ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where, ffi::Result<ffi::AnyBuffer> y,
                   ffi::RemainingRets partials, int64_t row_blocks, int64_t block_size, int64_t weight_dtype,
                   int64_t layout, int64_t route) {
  Recorder recorder;
  const WeightOperands weight{packed,     absmax,     absmax_scale, absmax_offset, where,
                              row_blocks, block_size, weight_dtype, layout};
  return RunProduct(recorder, {x, *y, weight, kInputGradient}, partials, route);
}

ffi::Error Dequantize(ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer absmax_scale,
                      ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where, ffi::Result<ffi::AnyBuffer> dense,
                      int64_t row_blocks, int64_t block_size, int64_t weight_dtype, int64_t layout) {
  Recorder recorder;
  return RunDequantize(recorder,
                       {packed, absmax, absmax_scale, absmax_offset, where, row_blocks, block_size, weight_dtype,
                        layout},
                       *dense);
}

}  // namespace

std::vector<RecordedLaunch> TakeRecord() {
  const std::lock_guard<std::mutex> lock(record_mutex);
  return std::exchange(record, {});
}

void FailNextLaunch() {
  const std::lock_guard<std::mutex> lock(record_mutex);
  fail_next = true;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(RecordNf4Matmul, Product<false>, BindProduct(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(RecordNf4MatmulDx, Product<true>, BindProduct(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(RecordNf4Dequantize, Dequantize, BindDequantize(ffi::Ffi::Bind()));

}  // namespace qlora_jax
