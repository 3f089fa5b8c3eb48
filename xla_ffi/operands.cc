#include "operands.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

std::optional<Dtype> ActivationDtype(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return Dtype::kFloat32;
    case ffi::DataType::BF16:
      return Dtype::kBfloat16;
    case ffi::DataType::F16:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

// Checks a weight of the given extents; `context` names the buffers that they were read from. Returns what is wrong,
// or an empty string and fills `weight`.
std::string CheckWeight(const WeightOperands& o, int64_t in_features, int64_t out_features, const std::string& context,
                        WeightShape* weight) {
  WeightShape& w = *weight;
  w = {};
  if (o.weight_dtype < 0 || o.weight_dtype > 2) {
    return "weight_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(o.weight_dtype);
  }
  w.dtype = static_cast<Dtype>(o.weight_dtype);
  if (o.layout < 0 || o.layout > 1) {
    return "layout must be 0 (rows) or 1 (fragments), got " + std::to_string(o.layout);
  }
  w.layout = static_cast<Layout>(o.layout);
  if (o.block_size < 2 || (o.block_size & (o.block_size - 1)) != 0) {
    return "block_size must be a power of two, got " + std::to_string(o.block_size);
  }
  while (int64_t{1} << w.block_shift < o.block_size) ++w.block_shift;

  w.in_features = in_features;
  w.out_features = out_features;
  if (out_features > 0 && in_features > kMaxElements / out_features) return "the weight is too large: " + context;
  w.row_blocks = o.row_blocks;
  if (w.row_blocks < 0) return "row_blocks must not be negative, got " + std::to_string(w.row_blocks);
  if (w.row_blocks != 0 && (in_features % o.block_size != 0 || w.own_row_blocks() > w.row_blocks)) {
    return "rows of " + std::to_string(in_features) + " weights do not lie in " + std::to_string(w.row_blocks) +
           " blocks of " + std::to_string(o.block_size) + ": " + context;
  }
  if (w.layout == Layout::kFragments && in_features % o.block_size != 0) {
    return "layout fragments needs whole blocks in a row, got rows of " + std::to_string(in_features) +
           " weights and blocks of " + std::to_string(o.block_size) + ": " + context;
  }

  const int64_t bytes = PackedBytes(w.layout, in_features, out_features);
  w.blocks = (w.size() + o.block_size - 1) / o.block_size;
  if (o.packed.dimensions().size() != 2) return "packed must be uint8 [L, bytes], got " + Shape(o.packed);
  w.layers = o.packed.dimensions()[0];
  if (w.layers < 1 || !Has(o.packed, ffi::DataType::U8, {w.layers, bytes})) {
    return "packed " + Shape(o.packed) + " does not fit " + context + ": needs uint8[L, " + std::to_string(bytes) + "]";
  }
  w.double_quantized = Has(o.absmax, ffi::DataType::U8, {w.layers, w.blocks});
  if (!w.double_quantized && !Has(o.absmax, ffi::DataType::F32, {w.layers, w.blocks})) {
    return "absmax " + Shape(o.absmax) + " does not fit " + context + ", packed " + Shape(o.packed) +
           ": needs uint8 or float32[" + std::to_string(w.layers) + ", " + std::to_string(w.blocks) + "]";
  }
  if (!Has(o.where, ffi::DataType::S32, {3})) return "where must be int32[3], got " + Shape(o.where);
  if (!w.double_quantized) return "";

  w.layer_groups = o.absmax_scale.dimensions().size() == 2 ? o.absmax_scale.dimensions()[1] : 0;
  const std::string missing = MissingGroups(o, w, w.LastBlock(0, 0));
  if (!missing.empty()) return missing;
  if (!Has(o.absmax_offset, ffi::DataType::F32, {w.layers})) {
    return "absmax_offset " + Shape(o.absmax_offset) + " does not fit packed " + Shape(o.packed) + ": needs float32[" +
           std::to_string(w.layers) + "]";
  }
  return "";
}

}  // namespace

int64_t WeightShape::LastBlock(int64_t first_row, int64_t first_block) const {
  if (size() == 0) return -1;
  return row_blocks == 0 ? blocks - 1
                         : (first_row + out_features - 1) * row_blocks + first_block + own_row_blocks() - 1;
}

std::string Shape(const ffi::AnyBuffer& buffer) {
  std::string text;
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      text = "float32";
      break;
    case ffi::DataType::BF16:
      text = "bfloat16";
      break;
    case ffi::DataType::F16:
      text = "float16";
      break;
    case ffi::DataType::U8:
      text = "uint8";
      break;
    case ffi::DataType::S32:
      text = "int32";
      break;
    default:
      text = "dtype " + std::to_string(static_cast<int>(buffer.element_type()));
  }
  text += "[";
  for (const int64_t size : buffer.dimensions()) {
    if (text.back() != '[') text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

std::string Shapes(const ProductOperands& operands) {
  return (operands.input_gradient ? "dy " : "x ") + Shape(operands.x) + (operands.input_gradient ? ", dx " : ", y ") +
         Shape(operands.y);
}

bool Has(const ffi::AnyBuffer& buffer, ffi::DataType dtype, std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  return buffer.element_type() == dtype && std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

std::string MissingGroups(const WeightOperands& operands, const WeightShape& weight, int64_t last_block) {
  const int64_t needed = last_block < 0 ? 0 : (last_block >> kGroupShift) + 1;
  if (Has(operands.absmax_scale, ffi::DataType::F32, {weight.layers, weight.layer_groups}) &&
      needed <= weight.layer_groups) {
    return "";
  }
  return "absmax_scale " + Shape(operands.absmax_scale) + " does not reach block " + std::to_string(last_block) +
         " of absmax " + Shape(operands.absmax) + ": needs float32[" + std::to_string(weight.layers) + ", " +
         std::to_string(needed) + "] or more";
}

ffi::ErrorOr<ProductShapes> CheckProduct(const ProductOperands& o) {
  const auto refuse = [](const std::string& message) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("nf4_matmul: " + message));
  };
  const std::optional<Dtype> dtype = ActivationDtype(o.x.element_type());
  if (!dtype) return refuse("activations must be float32, bfloat16 or float16: " + Shapes(o));
  if (o.x.dimensions().size() != 2 || o.y.dimensions().size() != 2 || o.x.dimensions()[0] != o.y.dimensions()[0] ||
      o.x.element_type() != o.y.element_type()) {
    return refuse("operand and result must be matrices of equal dtype and number of rows: " + Shapes(o));
  }
  ProductShapes product{*dtype, o.x.dimensions()[0], o.x.dimensions()[1], o.y.dimensions()[1], {}};
  const int64_t in_features = o.input_gradient ? product.outputs : product.reduction;
  const int64_t out_features = o.input_gradient ? product.reduction : product.outputs;
  const std::string wrong = CheckWeight(o.weight, in_features, out_features, Shapes(o), &product.weight);
  if (!wrong.empty()) return refuse(wrong);
  return product;
}

ffi::ErrorOr<DenseShape> CheckDense(const ffi::AnyBuffer& dense, const WeightOperands& weight) {
  const auto refuse = [](const std::string& message) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("nf4_dequantize: " + message));
  };
  const std::string context = "dense " + Shape(dense);
  const std::optional<Dtype> dtype = ActivationDtype(dense.element_type());
  if (!dtype || dense.dimensions().size() != 2) {
    return refuse("the result must be a float32, bfloat16 or float16 matrix [out, in]: " + context);
  }
  DenseShape shape{*dtype, {}};
  const std::string wrong =
      CheckWeight(weight, dense.dimensions()[1], dense.dimensions()[0], context, &shape.weight);
  if (!wrong.empty()) return refuse(wrong);
  return shape;
}

}  // namespace qlora_jax
