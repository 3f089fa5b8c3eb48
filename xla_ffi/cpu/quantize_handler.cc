#include "quantize_handler.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "../operands.h"
#include "parallel.h"
#include "quantize_weight.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

ffi::Error Refuse(const std::string& message) { return ffi::Error::InvalidArgument("nf4_quantize: " + message); }

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

ffi::Error Implementation(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer first_layer,
                          ffi::Result<ffi::AnyBuffer> packed, ffi::Result<ffi::AnyBuffer> absmax, ffi::Result<ffi::AnyBuffer> absmax_scale,
                          ffi::Result<ffi::AnyBuffer> absmax_offset, int64_t block_size, int64_t input_major,
                          ffi::Span<const float> thresholds, ffi::Span<const uint8_t> codes) {
  QuantizeProblem p{};
  switch (weights.element_type()) {
    case ffi::DataType::F32:
      p.kind = Elements::kFloat32;
      break;
    case ffi::DataType::BF16:
      p.kind = Elements::kBfloat16;
      break;
    case ffi::DataType::F16:
      p.kind = Elements::kFloat16;
      break;
    default:
      return Refuse("weights must be float32, bfloat16 or float16, got " + Shape(weights));
  }
  if (weights.dimensions().size() != 3) return Refuse("weights must be [L, out, in], got " + Shape(weights));
  p.input_major = input_major != 0;
  if (!Has(first_layer, ffi::DataType::S32, {1})) return Refuse("first_layer must be int32[1], got " + Shape(first_layer));
  const int64_t layers = packed->dimensions().size() == 2 ? packed->dimensions()[0] : 0;
  const int64_t first = first_layer.typed_data<int32_t>()[0];
  if (first < 0 || first + layers > weights.dimensions()[0]) {
    return Refuse(std::to_string(layers) + " layers from " + std::to_string(first) + " on do not lie in weights " +
                  Shape(weights));
  }
  p.in_features = weights.dimensions()[p.input_major ? 1 : 2];
  p.out_features = weights.dimensions()[p.input_major ? 2 : 1];
  if (p.out_features > 0 && p.in_features > kMaxElements / p.out_features) {
    return Refuse("the weights are too large: " + Shape(weights));
  }
  p.block_shift = BlockShift(block_size);
  if (p.block_shift < 0) return Refuse("block_size must be 32, 64, ... 4096, got " + std::to_string(block_size));
  if (p.input_major && p.in_features % block_size != 0) {
    return Refuse("input-major weights need whole blocks of " + std::to_string(block_size) + " in a row, got " +
                  Shape(weights));
  }
  const std::string wrong = MakeEncoding(thresholds.begin(), static_cast<int64_t>(thresholds.size()), codes.begin(),
                                         static_cast<int64_t>(codes.size()), &p.encoding);
  if (!wrong.empty()) return Refuse(wrong);

  const int64_t bytes = CeilDivide(p.size(), 2), blocks = p.blocks(), groups = CeilDivide(blocks, 1 << kGroupShift);
  const bool quantized = absmax->element_type() == ffi::DataType::U8;
  if (!Has(*packed, ffi::DataType::U8, {layers, bytes}) ||
      !Has(*absmax, quantized ? ffi::DataType::U8 : ffi::DataType::F32, {layers, blocks}) ||
      !Has(*absmax_scale, ffi::DataType::F32, {layers, quantized ? groups : 0}) ||
      !Has(*absmax_offset, ffi::DataType::F32, {quantized ? layers : 0})) {
    return Refuse("results packed " + Shape(*packed) + ", absmax " + Shape(*absmax) + ", absmax_scale " +
                  Shape(*absmax_scale) + ", absmax_offset " + Shape(*absmax_offset) + " do not fit weights " +
                  Shape(weights));
  }
  const Parallel parallel = [&pool](int64_t tasks, const std::function<void(int64_t)>& body) {
    ForEach(pool, tasks, std::max<int64_t>(1, pool.num_threads()), [&](int64_t task, int64_t) { body(task); });
  };
  try {
    const std::unique_ptr<float[]> scales(quantized ? new float[blocks] : nullptr);
    for (int64_t layer = 0; layer < layers; ++layer) {
      p.elements = static_cast<const char*>(weights.untyped_data()) + (first + layer) * p.size() * BytesOf(p.kind);
      p.packed = packed->typed_data<uint8_t>() + layer * bytes;
      if (quantized) {
        p.absmax = scales.get();
        p.scale_codes = absmax->typed_data<uint8_t>() + layer * blocks;
        p.group_scales = absmax_scale->typed_data<float>() + layer * groups;
        p.offset = absmax_offset->typed_data<float>() + layer;
      } else {
        p.absmax = absmax->typed_data<float>() + layer * blocks;
      }
      QuantizeWeight(p, parallel);
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "nf4_quantize: no memory for the scales of " + Shape(weights));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4Quantize, Implementation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("block_size")
                                  .Attr<int64_t>("input_major")
                                  .Attr<ffi::Span<const float>>("thresholds")
                                  .Attr<ffi::Span<const uint8_t>>("codes"));

}  // namespace qlora_jax
