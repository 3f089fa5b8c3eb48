#include "quantize_bindings.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "quantize_weight.h"

namespace qlora_jax {
namespace {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of its own: XLA lends its pool to its own calls alone.
Parallel OnThreads(int64_t threads) {
  return [threads](int64_t tasks, const std::function<void(int64_t)>& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    };
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are do the work.
    }
    work();
    for (std::thread& other : others) other.join();
  };
}

void CheckSize(const char* name, int64_t size, int64_t needed) {
  if (size == needed) return;
  throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) + " elements, needs " +
                              std::to_string(needed));
}

// Returns (absmax_offset, the largest magnitude of all elements).
py::tuple Quantize(const Array<uint8_t>& elements, int kind, int64_t block_size, const Array<float>& thresholds,
                   const Array<uint8_t>& codes, Array<uint8_t> packed, py::array absmax,
                   Array<float> absmax_scale, int64_t threads) {
  QuantizeProblem p{};
  if (kind < 0 || kind > 3) throw std::invalid_argument("kind must be 0 to 3, got " + std::to_string(kind));
  p.kind = static_cast<Elements>(kind);
  p.block_shift = BlockShift(block_size);
  if (p.block_shift < 0) {
    throw std::invalid_argument("block_size must be 32, 64, ... 4096, got " + std::to_string(block_size));
  }
  const std::string wrong =
      MakeEncoding(thresholds.data(), thresholds.size(), codes.data(), codes.size(), &p.encoding);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
  p.elements = elements.data();
  p.in_features = elements.size() / BytesOf(p.kind);  // blocks are counted over all rows: one is as good
  p.out_features = 1;
  const bool quantized = py::isinstance<Array<uint8_t>>(absmax);
  if (!quantized && !py::isinstance<Array<float>>(absmax)) {
    throw std::invalid_argument("absmax must be a contiguous array of uint8 or float32");
  }
  const int64_t blocks = p.blocks();
  CheckSize("elements", elements.size(), p.size() * BytesOf(p.kind));
  CheckSize("packed", packed.size(), CeilDivide(p.size(), 2));
  CheckSize("absmax", absmax.size(), blocks);
  CheckSize("absmax_scale", absmax_scale.size(), quantized ? CeilDivide(blocks, 1 << kGroupShift) : 0);
  p.packed = packed.mutable_data();
  std::unique_ptr<float[]> scales;
  float offset = 0.0f;
  uint32_t largest = 0;  // as bits, in whose order NaN is above all
  p.offset = &offset;
  if (quantized) {
    scales.reset(new float[blocks]);
    p.absmax = scales.get();
    p.scale_codes = static_cast<uint8_t*>(absmax.mutable_data());
    p.group_scales = absmax_scale.mutable_data();
  } else {
    p.absmax = static_cast<float*>(absmax.mutable_data());
  }
  {
    const py::gil_scoped_release release;
    QuantizeWeight(p, OnThreads(threads));
    for (int64_t i = 0; i < blocks; ++i) largest = std::max(largest, FloatBits(p.absmax[i]));
  }
  return py::make_tuple(offset, FloatFromBits(largest));
}

}  // namespace

void BindQuantize(py::module_& m) {
  m.def("quantize", &Quantize, py::arg("elements").noconvert(), py::arg("kind"), py::arg("block_size"),
        py::arg("thresholds").noconvert(), py::arg("codes").noconvert(), py::arg("packed").noconvert(),
        py::arg("absmax").noconvert(), py::arg("absmax_scale").noconvert(), py::arg("threads"),
        "Quantizes the bytes of one weight [out, in] (kind 0: float32, 1: bfloat16, 2: float16, 3: float32 rounded to "
        "bfloat16 first) into packed, absmax (uint8 or float32) and absmax_scale; returns (absmax_offset, largest "
        "magnitude).");
}

}  // namespace qlora_jax
