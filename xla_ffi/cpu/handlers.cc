#include "handlers.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

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

bool Has(const ffi::AnyBuffer& buffer, ffi::DataType dtype, std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  return buffer.element_type() == dtype && std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Operands {
  ffi::AnyBuffer x, packed, absmax, absmax_scale, absmax_offset, where, y;
  int64_t row_blocks, block_size, weight_dtype;
  bool input_gradient;
};

// Checks every operand against the others and reads `where`.
ffi::ErrorOr<Problem> Decode(const Operands& o) {
  const auto refuse = [](const std::string& message) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("nf4_matmul: " + message));
  };
  const char* x_name = o.input_gradient ? "dy" : "x";
  const char* y_name = o.input_gradient ? "dx" : "y";
  const auto both = [&] { return std::string(x_name) + " " + Shape(o.x) + ", " + y_name + " " + Shape(o.y); };

  Problem problem{};
  problem.input_gradient = o.input_gradient;
  switch (o.x.element_type()) {
    case ffi::DataType::F32:
      problem.dtype = Dtype::kFloat32;
      break;
    case ffi::DataType::BF16:
      problem.dtype = Dtype::kBfloat16;
      break;
    case ffi::DataType::F16:
      problem.dtype = Dtype::kFloat16;
      break;
    default:
      return refuse("activations must be float32, bfloat16 or float16: " + both());
  }
  if (o.x.dimensions().size() != 2 || o.y.dimensions().size() != 2 || o.x.dimensions()[0] != o.y.dimensions()[0] ||
      o.x.element_type() != o.y.element_type()) {
    return refuse("operand and result must be matrices of equal dtype and number of rows: " + both());
  }
  problem.x = o.x.untyped_data();
  problem.y = o.y.untyped_data();
  problem.rows = o.x.dimensions()[0];
  problem.reduction = o.x.dimensions()[1];
  problem.outputs = o.y.dimensions()[1];
  if (o.weight_dtype < 0 || o.weight_dtype > 2) {
    return refuse("weight_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                  std::to_string(o.weight_dtype));
  }
  problem.weight_dtype = static_cast<Dtype>(o.weight_dtype);
  if (o.block_size < 2 || (o.block_size & (o.block_size - 1)) != 0) {
    return refuse("block_size must be a power of two, got " + std::to_string(o.block_size));
  }

  Nf4Weight& w = problem.weight;
  w.in_features = o.input_gradient ? problem.outputs : problem.reduction;
  w.out_features = o.input_gradient ? problem.reduction : problem.outputs;
  while (int64_t{1} << w.block_shift < o.block_size) ++w.block_shift;
  w.row_blocks = o.row_blocks;
  const int64_t own_row_blocks = w.in_features / o.block_size;
  if (w.row_blocks != 0 && (w.in_features % o.block_size != 0 || own_row_blocks > w.row_blocks)) {
    return refuse("rows of " + std::to_string(w.in_features) + " weights do not lie in " +
                  std::to_string(w.row_blocks) + " blocks of " + std::to_string(o.block_size) + ": " + both());
  }

  const int64_t size = w.in_features * w.out_features;
  const int64_t blocks = CeilDivide(size, o.block_size);
  if (o.packed.dimensions().size() != 2) return refuse("packed must be uint8 [L, bytes], got " + Shape(o.packed));
  const int64_t layers = o.packed.dimensions()[0];
  if (layers < 1 || !Has(o.packed, ffi::DataType::U8, {layers, CeilDivide(size, 2)})) {
    return refuse("packed " + Shape(o.packed) + " does not fit " + both() + ": needs uint8[L, " +
                  std::to_string(CeilDivide(size, 2)) + "]");
  }
  const bool double_quantized = Has(o.absmax, ffi::DataType::U8, {layers, blocks});
  if (!double_quantized && !Has(o.absmax, ffi::DataType::F32, {layers, blocks})) {
    return refuse("absmax " + Shape(o.absmax) + " does not fit " + both() + ", packed " + Shape(o.packed) +
                  ": needs uint8 or float32[" + std::to_string(layers) + ", " + std::to_string(blocks) + "]");
  }
  if (!Has(o.where, ffi::DataType::S32, {3})) return refuse("where must be int32[3], got " + Shape(o.where));
  const int32_t* where = o.where.typed_data<int32_t>();
  const int64_t layer = std::clamp<int64_t>(where[0], 0, layers - 1);
  w.packed = o.packed.typed_data<uint8_t>() + layer * CeilDivide(size, 2);
  if (!double_quantized) {
    w.scales = o.absmax.typed_data<float>() + layer * blocks;
    return problem;
  }

  w.scale_codes = o.absmax.typed_data<uint8_t>() + layer * blocks;
  w.first_row = where[1];
  w.first_block = where[2];
  if (w.first_row < 0 || w.first_block < 0 || (w.row_blocks == 0 && (w.first_row > 0 || w.first_block > 0)) ||
      (w.row_blocks > 0 && w.first_block + own_row_blocks > w.row_blocks)) {
    return refuse("first row " + std::to_string(w.first_row) + " and first block " + std::to_string(w.first_block) +
                  " do not lie in a tensor of " + std::to_string(w.row_blocks) + " blocks a row");
  }
  const int64_t last_block =
      w.row_blocks == 0
          ? blocks - 1
          : (w.first_row + w.out_features - 1) * w.row_blocks + w.first_block + own_row_blocks - 1;
  const int64_t groups = o.absmax_scale.dimensions().size() == 2 ? o.absmax_scale.dimensions()[1] : 0;
  if (!Has(o.absmax_scale, ffi::DataType::F32, {layers, groups}) || (size > 0 && last_block >> kGroupShift >= groups)) {
    return refuse("absmax_scale " + Shape(o.absmax_scale) + " does not reach block " + std::to_string(last_block) +
                  " of absmax " + Shape(o.absmax) + ": needs float32[" + std::to_string(layers) + ", " +
                  std::to_string((last_block >> kGroupShift) + 1) + "] or more");
  }
  if (!Has(o.absmax_offset, ffi::DataType::F32, {layers})) {
    return refuse("absmax_offset " + Shape(o.absmax_offset) + " does not fit packed " + Shape(o.packed) +
                  ": needs float32[" + std::to_string(layers) + "]");
  }
  w.group_scales = o.absmax_scale.typed_data<float>() + layer * groups;
  w.offset = o.absmax_offset.typed_data<float>()[layer];
  return problem;
}

template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size)
      : data_(static_cast<T*>(::operator new[](sizeof(T) * size, std::align_val_t{64}))) {}
  ~AlignedArray() { ::operator delete[](data_, std::align_val_t{64}); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Below this number of multiply-adds a call costs less than waking other threads.
constexpr int64_t kSerialWork = int64_t{1} << 18;
// Rows of a tile: dequantizing a panel costs as much as multiplying it by about 8 rows.
constexpr int64_t kMinTileRows = 96;
constexpr int64_t kMaxTileRows = 768;
constexpr int64_t kPackRows = 16;

void Multiply(ffi::ThreadPool& pool, const Problem& problem) {
  const InstructionSet& set = BestInstructionSet();
  const bool serial = problem.rows * problem.reduction * problem.outputs < kSerialWork;
  const int64_t threads = serial ? 1 : std::max<int64_t>(1, pool.num_threads());

  const int64_t chunk_elements = int64_t{kChunkSteps} * set.elements_per_step(problem.dtype);
  const int64_t chunks = CeilDivide(problem.reduction, chunk_elements);
  const AlignedArray<uint32_t> packed(chunks * problem.rows * kChunkSteps);
  const int64_t pack_tasks = CeilDivide(problem.rows, kPackRows);
  ForEach(pool, pack_tasks, threads, [&](int64_t task, int64_t) {
    const int64_t row = task * kPackRows;
    set.pack_rows(problem, row, std::min(row + kPackRows, problem.rows), packed.get());
  });

  // Four tiles a thread balance the load; the shape of the tiles leaves no trace in the result.
  const int64_t panels = CeilDivide(problem.outputs, kPanelWidth);
  const int64_t row_parts = CeilDivide(4 * threads, panels);
  const int64_t tile_rows = std::clamp(CeilDivide(problem.rows, row_parts), kMinTileRows, kMaxTileRows);
  const int64_t row_tiles = CeilDivide(problem.rows, tile_rows);
  const int64_t workers = std::min(threads, panels * row_tiles);
  const int64_t panel_floats = int64_t{kChunkSteps} * kPanelWidth;
  const int64_t sum_floats = std::min(tile_rows, problem.rows) * kPanelWidth;
  const AlignedArray<float> workspace(workers * (panel_floats + sum_floats));
  ForEach(pool, panels * row_tiles, workers, [&](int64_t task, int64_t worker) {
    const int64_t row = task % row_tiles * tile_rows;
    const Tile tile{task / row_tiles, row, std::min(row + tile_rows, problem.rows)};
    float* panel = workspace.get() + worker * (panel_floats + sum_floats);
    set.multiply(problem, packed.get(), tile, panel, panel + panel_floats);
  });
}

ffi::Error Run(ffi::ThreadPool pool, const Operands& operands) {
  ffi::ErrorOr<Problem> problem = Decode(operands);
  if (problem.has_error()) return problem.error();
  if (problem->rows == 0 || problem->outputs == 0) return ffi::Error::Success();
  if (problem->reduction == 0) {
    std::fill_n(static_cast<uint8_t*>(problem->y), operands.y.size_bytes(), uint8_t{0});
    return ffi::Error::Success();
  }
  try {
    Multiply(pool, *problem);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "nf4_matmul: no memory to pack activations " + Shape(operands.x));
  }
  return ffi::Error::Success();
}

template <bool kInputGradient>
ffi::Error Implementation(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer absmax,
                          ffi::AnyBuffer absmax_scale, ffi::AnyBuffer absmax_offset, ffi::AnyBuffer where,
                          ffi::Result<ffi::AnyBuffer> y, int64_t row_blocks, int64_t block_size,
                          int64_t weight_dtype) {
  return Run(pool, {x, packed, absmax, absmax_scale, absmax_offset, where, *y, row_blocks, block_size, weight_dtype,
                    kInputGradient});
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("row_blocks")
      .Attr<int64_t>("block_size")
      .Attr<int64_t>("weight_dtype");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4Matmul, Implementation<false>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Nf4MatmulDx, Implementation<true>, Binding());

}  // namespace qlora_jax
