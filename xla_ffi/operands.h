// The operands that every handler takes, checked against each other: shapes, dtypes, attributes.
#ifndef QLORA_JAX_OPERANDS_H_
#define QLORA_JAX_OPERANDS_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "layout.h"
#include "nf4.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {

// A weight as a handler receives it, every stack of layers with its dimension L:
//   packed uint8 [L, bytes];  absmax uint8 | float32 [L, blocks];  absmax_scale float32 [L, groups];
//   absmax_offset float32 [L];  where int32 [3] = (layer, first row, first block of a row).
// Attributes: row_blocks, blocks in a row of the whole tensor, 0 where blocks may straddle rows; block_size;
// weight_dtype (Dtype); layout (Layout). float32 absmax is not quantized: absmax_scale and absmax_offset are not read.
struct WeightOperands {
  xla::ffi::AnyBuffer packed, absmax, absmax_scale, absmax_offset, where;
  int64_t row_blocks, block_size, weight_dtype, layout;
};

// x [M, in] times a weight -> y [M, out], or, for the input's gradient, dy [M, out] -> dx [M, in].
struct ProductOperands {
  xla::ffi::AnyBuffer x, y;
  WeightOperands weight;
  bool input_gradient;
};

// A weight whose operands fit each other. What `where` says is not part of it: on a GPU the host cannot read it.
struct WeightShape {
  Layout layout;
  Dtype dtype;
  int64_t in_features;
  int64_t out_features;
  int64_t layers;
  int64_t blocks;        // of a layer
  int64_t layer_groups;  // second-level scales of a layer
  int64_t row_blocks;
  int block_shift;
  bool double_quantized;

  int64_t size() const { return in_features * out_features; }
  int64_t own_row_blocks() const { return in_features >> block_shift; }
  // In the whole tensor, for a shard that begins at the given row and block; -1 for an empty weight.
  int64_t LastBlock(int64_t first_row, int64_t first_block) const;
};

struct ProductShapes {
  Dtype dtype;  // of x and y
  int64_t rows;
  int64_t reduction;
  int64_t outputs;
  WeightShape weight;
};

struct DenseShape {
  Dtype dtype;  // of the dense matrix [out, in]
  WeightShape weight;
};

// InvalidArgument errors name what was seen. Second-level scales are checked for a shard that begins at 0.
xla::ffi::ErrorOr<ProductShapes> CheckProduct(const ProductOperands& operands);
xla::ffi::ErrorOr<DenseShape> CheckDense(const xla::ffi::AnyBuffer& dense, const WeightOperands& weight);

// "float32[2, 64]"
std::string Shape(const xla::ffi::AnyBuffer& buffer);
// "x float32[2, 64], y float32[2, 3]", with the names that the direction has.
std::string Shapes(const ProductOperands& operands);

bool Has(const xla::ffi::AnyBuffer& buffer, xla::ffi::DataType dtype, std::initializer_list<int64_t> shape);

// What absmax_scale of `weight` lacks to reach `last_block`; empty if it reaches.
std::string MissingGroups(const WeightOperands& operands, const WeightShape& weight, int64_t last_block);

}  // namespace qlora_jax

#endif  // QLORA_JAX_OPERANDS_H_
