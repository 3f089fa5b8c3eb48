#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "product_shape.h"

namespace qlora_jax {
namespace {

// CUDA's limits, the same for every device that the kernels are built for.
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridYZ = 65535;

// Contraction steps and their first element are 32-bit numbers in the kernels.
constexpr int64_t kMaxContraction = (int64_t{1} << 31) - kTile;

constexpr int kElementwiseThreads = 256;
// What a block of the elementwise kernels handles: weights in rows, 64x64 tiles in fragments, sums of splits.
constexpr int64_t kRowWeightsPerBlock = 8 * 4 * kElementwiseThreads;
constexpr int64_t kFragmentTilesPerBlock = kElementwiseThreads / 32;
constexpr int64_t kSumsPerBlock = 4 * kElementwiseThreads;

// What ChooseSplits weighs, in clocks of an H100: predicted from instructions counted in machine code, not measured. A block's tables and
// ends; a contraction step of a block; one more launch; partial sums written and read again at 2.8 TB/s. A block alone
// on a multiprocessor has too few warps to hide latencies and is taken for 1.6 of them.
constexpr int64_t kBlockClocks = 1000;
constexpr int64_t kStepClocks = 350;
constexpr int64_t kStepClocksPerToken = 4;
constexpr int64_t kSumClocks = 1800;
constexpr int64_t kSumsPerClock = 200;
constexpr int64_t kMaxSplits = 64;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Argument Pointer(Buffer buffer, int64_t offset = 0) { return {Argument::Kind::kPointer, buffer, offset}; }
Argument Int32(int64_t value) { return {Argument::Kind::kInt32, {}, value}; }
Argument Int64(int64_t value) { return {Argument::Kind::kInt64, {}, value}; }

const char* Name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "f32";
    case Dtype::kBfloat16:
      return "bf16";
    case Dtype::kFloat16:
      return "f16";
  }
  return "";
}

std::string Extents(const CudaProblem& p) {
  const std::string weight =
      "weight [in=" + std::to_string(p.in_features) + ", out=" + std::to_string(p.out_features) + "]";
  return p.operation == Operation::kDequantize ? weight : std::to_string(p.tokens) + " rows, " + weight;
}

Plan Refuse(const std::string& reason, const CudaProblem& p) {
  Plan plan;
  plan.error = reason + ": " + Extents(p);
  return plan;
}

bool TooLarge(int64_t a, int64_t b) { return b > 0 && a > kMaxElements / b; }

int64_t Outputs(const CudaProblem& p) {
  return p.operation == Operation::kInputGradient ? p.in_features : p.out_features;
}

int64_t Contraction(const CudaProblem& p) {
  return p.operation == Operation::kInputGradient ? p.out_features : p.in_features;
}

// The smallest tile that holds all tokens, else the largest of the route.
ProductShape ShapeOf(const CudaProblem& p) {
  if (p.route == Route::kTile) return ShapeForTokens(128);
  int tokens = 8;
  while (tokens < 64 && tokens < p.tokens) tokens *= 2;
  return ShapeForTokens(tokens);
}

void AppendWeight(const CudaProblem& p, std::vector<Argument>* arguments) {
  const Argument weight[] = {
      Pointer(Buffer::kPacked),      Pointer(Buffer::kAbsmax), Pointer(Buffer::kGroupScales),
      Pointer(Buffer::kOffsets),     Pointer(Buffer::kWhere),  Int64(p.layers),
      Int64(p.layer_groups),         Int64(p.row_blocks),      Int32(p.block_shift),
      Int32(p.double_quantized ? 1 : 0),
  };
  arguments->insert(arguments->end(), std::begin(weight), std::end(weight));
}

Plan PlanDequantize(const CudaProblem& p) {
  const bool rows = p.layout == Layout::kRows;
  if (p.block_shift < 5) return Refuse("the kernels need blocks of 32 weights or more", p);
  const int64_t size = p.in_features * p.out_features;
  if (size == 0) return {};
  const int64_t blocks =
      rows ? CeilDivide(size, kRowWeightsPerBlock)
           : CeilDivide(FragmentTiles(p.in_features) * FragmentTiles(p.out_features), kFragmentTilesPerBlock);
  if (blocks > kMaxGridX) return Refuse("more blocks than a CUDA grid holds", p);
  Launch launch{std::string("nf4_dequantize_") + (rows ? "rows_" : "fragments_") + Name(p.dtype),
                {static_cast<uint32_t>(blocks), 1, 1},
                {kElementwiseThreads, 1, 1},
                0,
                {Pointer(Buffer::kDense)}};
  AppendWeight(p, &launch.arguments);
  launch.arguments.push_back(Int32(static_cast<int64_t>(p.weight_dtype)));
  launch.arguments.push_back(Int64(p.in_features));
  launch.arguments.push_back(Int64(p.out_features));
  Plan plan;
  plan.launches.push_back(launch);
  return plan;
}

// What keeps the fused kernels from a product; empty if nothing does.
std::string WhyNotFused(const CudaProblem& p) {
  if (p.layout != Layout::kFragments) return "the fused kernels need the layout fragments: dequantize, then multiply";
  if (p.dtype == Dtype::kFloat32) return "the fused kernels need 16-bit activations: dequantize, then multiply";
  if (p.dtype == Dtype::kFloat16 && p.weight_dtype == Dtype::kBfloat16) {
    return "bfloat16 weights may exceed the range of float16 activations: dequantize, then multiply";
  }
  if (p.block_shift < 6) return "the fused kernels need blocks of 64 weights or more: dequantize, then multiply";
  return "";
}

// Whether one launch holds a product in parts, and another their sums.
bool CanBeSplit(const CudaProblem& p, int64_t splits) {
  return p.tokens <= kMaxGridYZ * ShapeOf(p).tokens && !TooLarge(p.tokens * Outputs(p), splits) &&
         CeilDivide(p.tokens * Outputs(p), kSumsPerBlock) <= kMaxGridX;
}

Plan PlanProduct(const CudaProblem& p) {
  const std::string why_not = WhyNotFused(p);
  if (!why_not.empty()) return Refuse(why_not, p);
  const int64_t outputs = Outputs(p);
  const int64_t contraction = Contraction(p);
  Plan plan;
  if (p.tokens == 0 || outputs == 0) return plan;
  if (contraction == 0) {
    plan.zero_bytes = p.tokens * outputs * 2;
    return plan;
  }
  if (contraction > kMaxContraction) return Refuse("the kernels count a contraction in 32 bits", p);
  const ProductShape shape = ShapeOf(p);
  const int64_t steps = CeilDivide(contraction, kTile);
  const int64_t row_groups = CeilDivide(outputs, shape.rows());
  // More tokens than a grid holds take several launches.
  const int64_t launch_tokens = kMaxGridYZ * shape.tokens;
  if (p.splits < 1 || p.splits > std::min(steps, kMaxGridYZ)) {
    return Refuse("a contraction of " + std::to_string(steps) + " steps cannot be split in " +
                      std::to_string(p.splits), p);
  }
  const bool split = p.splits > 1;
  if (split && !CanBeSplit(p, p.splits)) return Refuse("too large to be split", p);
  if (row_groups > kMaxGridX) return Refuse("more blocks than a CUDA grid holds", p);

  const std::string name = std::string(p.route == Route::kTile ? "nf4_tile_" : "nf4_skinny_") +
                           (p.operation == Operation::kInputGradient ? "dx_" : "forward_") + Name(p.dtype) + "_t" +
                           std::to_string(shape.tokens);
  for (int64_t first = 0; first < p.tokens; first += launch_tokens) {
    const int64_t tokens = std::min(launch_tokens, p.tokens - first);
    const int64_t y_offset = first * outputs * 2;
    Launch launch{name,
                  {static_cast<uint32_t>(row_groups), static_cast<uint32_t>(p.splits),
                   static_cast<uint32_t>(CeilDivide(tokens, shape.tokens))},
                  {static_cast<uint32_t>(shape.threads()), 1, 1},
                  static_cast<uint32_t>(shape.shared_bytes()),
                  // Partial sums are not written where there is one part: y stands in for them.
                  {Pointer(Buffer::kX, first * contraction * 2), Pointer(Buffer::kY, y_offset),
                   split ? Pointer(Buffer::kPartials) : Pointer(Buffer::kY, y_offset)}};
    AppendWeight(p, &launch.arguments);
    launch.arguments.push_back(Int64(tokens));
    launch.arguments.push_back(Int64(p.in_features));
    launch.arguments.push_back(Int64(p.out_features));
    launch.arguments.push_back(Int32(p.splits));
    plan.launches.push_back(launch);
  }
  if (split) {
    const int64_t count = p.tokens * outputs;
    const int64_t blocks = CeilDivide(count, kSumsPerBlock);
    plan.partials_bytes = p.splits * count * 4;
    plan.launches.push_back({std::string("nf4_sum_splits_") + Name(p.dtype),
                             {static_cast<uint32_t>(blocks), 1, 1},
                             {kElementwiseThreads, 1, 1},
                             0,
                             {Pointer(Buffer::kPartials), Pointer(Buffer::kY), Int64(count), Int32(p.splits)}});
  }
  return plan;
}

}  // namespace

Plan MakePlan(const CudaProblem& p) {
  const bool product = p.operation != Operation::kDequantize;
  if (p.in_features < 0 || p.out_features < 0 || (product && p.tokens < 0)) return Refuse("negative extents", p);
  if (TooLarge(p.in_features, p.out_features) ||
      (product && (TooLarge(p.tokens, p.in_features) || TooLarge(p.tokens, p.out_features)))) {
    return Refuse("too large", p);
  }
  return product ? PlanProduct(p) : PlanDequantize(p);
}

int64_t ChooseSplits(const CudaProblem& p, int64_t multiprocessors) {
  const ProductShape shape = ShapeOf(p);
  const int64_t steps = CeilDivide(Contraction(p), kTile);
  const int64_t tiles = CeilDivide(Outputs(p), shape.rows()) * CeilDivide(p.tokens, shape.tokens);
  int64_t best = 1;
  int64_t best_clocks = 0;
  const int64_t most = std::min<int64_t>(kMaxSplits, steps / (2 * shape.k_groups));
  for (int64_t splits = 1; splits == 1 || (splits <= most && CanBeSplit(p, splits)); ++splits) {
    const int64_t turns = CeilDivide(CeilDivide(steps, splits), shape.k_groups);
    const int64_t block_clocks = kBlockClocks + turns * (kStepClocks + kStepClocksPerToken * shape.tokens);
    const int64_t blocks = CeilDivide(tiles * splits, multiprocessors);
    int64_t clocks = blocks == 1 ? block_clocks + block_clocks * 3 / 5 : blocks * block_clocks;
    if (splits > 1) clocks += kSumClocks + splits * p.tokens * Outputs(p) / kSumsPerClock;
    if (splits == 1 || clocks < best_clocks) {
      best = splits;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace qlora_jax
