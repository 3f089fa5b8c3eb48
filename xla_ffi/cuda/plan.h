// From a problem to kernel launches, as plain data: the handlers execute them, the tests replay them.
//
// No CUDA here. All choices of kernel, tile, split and grid, and all arithmetic on addresses, are made in this file.
#ifndef QLORA_JAX_CUDA_PLAN_H_
#define QLORA_JAX_CUDA_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "../layout.h"
#include "../nf4.h"

namespace qlora_jax {

enum class Operation { kForward, kInputGradient, kDequantize };

// Values match the attribute `route` of the handlers: few rows of activations, or tiles of 128 of them.
enum class Route { kSkinny, kTile };

struct CudaProblem {
  Operation operation;
  Route route;  // of a product
  Layout layout;
  Dtype dtype;  // of the activations and the result, or of the dense matrix
  Dtype weight_dtype;
  int64_t tokens;  // rows of the activations; not read by kDequantize
  int64_t in_features;
  int64_t out_features;
  int64_t layers;
  int64_t layer_groups;  // second-level scales of a layer
  int64_t row_blocks;
  int32_t block_shift;
  bool double_quantized;
  int64_t splits;  // of a product's contraction, see ChooseSplits
};

enum class Buffer { kX, kY, kPacked, kAbsmax, kGroupScales, kOffsets, kWhere, kDense, kPartials };

struct Argument {
  enum class Kind { kPointer, kInt32, kInt64 };
  Kind kind;
  Buffer buffer;  // of a pointer
  int64_t value;  // a number, or a pointer's offset in bytes
};

struct Launch {
  std::string kernel;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;  // dynamic
  std::vector<Argument> arguments;
};

// Launches follow one another on a stream.
struct Plan {
  std::string error;  // why the problem is refused; empty if it is not
  std::vector<Launch> launches;
  int64_t partials_bytes = 0;  // float32 [splits, tokens, outputs], where the contraction is split
  int64_t zero_bytes = 0;      // leading bytes of y to be cleared: an empty sum
};

Plan MakePlan(const CudaProblem& problem);

// Parts of a product's contraction, each summed by blocks of its own and added in order by one more kernel.
//
// As many as make the busiest multiprocessor finish first, by a count of clocks: a split evens out the work, but every
// block fills its tables anew, and sums make a round trip through memory. Never so many that a group of warps gets
// fewer than two contraction steps. Depends on the shape and the device's size alone, so results repeat.
int64_t ChooseSplits(const CudaProblem& problem, int64_t multiprocessors);

}  // namespace qlora_jax

#endif  // QLORA_JAX_CUDA_PLAN_H_
