// Packed weights to a dense matrix [out, in], double-quantized scales decoded on the way: one launch.
//
// Bound by memory: 0.52 bytes are read and 2 written for a weight, which leaves about 20 instructions for each on an
// H100. The 16 codes are float32 values in shared memory, where no two of them share a bank; a weight is
// `T(float32 code * float32 scale)`, rounded once to the weight's own dtype.
#include "async.cuh"
#include "number.cuh"
#include "weight.cuh"

namespace qlora_jax {
namespace {

constexpr int kThreads = 256;
// Groups of eight weights in flight in a thread.
constexpr int kUnroll = 4;

struct Tables {
  float code[16];
  float dynamic_map[256];
};

__device__ void Fill(Tables& tables) {
  if (threadIdx.x < 16) tables.code[threadIdx.x] = kNf4Code.value[threadIdx.x];
  tables.dynamic_map[threadIdx.x] = kDynamicMap.value[threadIdx.x];
  __syncthreads();
}

// The weight's own dtype first. Where T is the same, storing rounds once more, which changes nothing.
__device__ float RoundToWeightDtype(Dtype dtype, float value) {
  if (dtype == Dtype::kBfloat16) return __bfloat162float(__float2bfloat16_rn(value));
  if (dtype == Dtype::kFloat16) return __half2float(__float2half_rn(value));
  return value;
}

// Eight weights of one block. `codes` holds them four bits each, the first lowest.
template <typename T>
__device__ void StoreEight(typename T::Storage* dense, uint32_t codes, float scale, Dtype dtype, const float* code) {
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = RoundToWeightDtype(dtype, MultiplyRounded(code[codes >> 4 * i & 15], scale));
  if constexpr (sizeof(typename T::Storage) == 4) {
    StoreGlobal(dense, make_float4(value[0], value[1], value[2], value[3]));
    StoreGlobal(dense + 4, make_float4(value[4], value[5], value[6], value[7]));
  } else {
    StoreGlobal(dense, make_uint4(T::Pack(value[0], value[1]), T::Pack(value[2], value[3]),
                                  T::Pack(value[4], value[5]), T::Pack(value[6], value[7])));
  }
}

// Bytes in memory order hold the first weight in the high nibble.
__device__ uint32_t FirstNibbleLowest(uint32_t bytes) {
  return (bytes >> 4 & 0x0f0f0f0fu) | (bytes << 4 & 0xf0f0f0f0u);
}

template <typename T>
__device__ void DequantizeRows(typename T::Storage* dense, QLORA_JAX_WEIGHT_PARAMETERS, Dtype dtype,
                               int64_t in_features, int64_t out_features) {
  __shared__ Tables tables;
  Fill(tables);
  const LayerWeight w = SelectLayer<Layout::kRows>(QLORA_JAX_WEIGHT_ARGUMENTS, in_features, out_features);
  const int64_t size = in_features * out_features;
  const int64_t bytes = (size + 1) / 2;
  // Where rows are whole, or blocks ignore them, a scale's place follows from the element's alone.
  const bool divided = row_blocks != 0 && row_blocks << block_shift != in_features;
  const bool words = reinterpret_cast<uintptr_t>(w.packed) % 4 == 0;  // not where a layer has an odd number of bytes
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t unit = (int64_t{blockIdx.x} * kUnroll + u) * kThreads + threadIdx.x;
    const int64_t element = unit * 8;
    if (element >= size) return;
    uint32_t packed_bytes = 0;
    if (words && unit * 4 + 4 <= bytes) {
      packed_bytes = __ldg(reinterpret_cast<const uint32_t*>(w.packed + unit * 4));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (unit * 4 + i < bytes) packed_bytes |= uint32_t{__ldg(w.packed + unit * 4 + i)} << 8 * i;
      }
    }
    // Blocks hold a multiple of 32 weights and rows a multiple of a block, or blocks ignore rows: eight share a scale.
    const int64_t row = divided ? element / in_features : 0;
    const float scale = BlockScale(w, tables.dynamic_map, row, element - row * in_features);
    const uint32_t codes = FirstNibbleLowest(packed_bytes);
    if (element + 8 <= size) {
      StoreEight<T>(dense + element, codes, scale, dtype, tables.code);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (element + i < size) {
          dense[element + i] = RoundToWeightDtype(dtype, MultiplyRounded(tables.code[codes >> 4 * i & 15], scale));
        }
      }
    }
  }
}

// Four lanes hold four bytes each; afterwards lane i holds byte i of every lane, in the order of the lanes.
__device__ uint32_t TransposeBytes(uint32_t bytes, int lane) {
  uint32_t other = __shfl_xor_sync(0xffffffffu, bytes, 1);
  bytes = __byte_perm(bytes, other, lane & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(0xffffffffu, bytes, 2);
  return __byte_perm(bytes, other, lane & 2 ? 0x3276 : 0x5410);
}

// A warp takes a 64x64 tile. Four lanes hold a row of it in pairs of columns; they exchange bytes, so that each stores
// eight columns side by side.
template <typename T>
__device__ void DequantizeFragments(typename T::Storage* dense, QLORA_JAX_WEIGHT_PARAMETERS, Dtype dtype,
                                    int64_t in_features, int64_t out_features) {
  __shared__ Tables tables;
  Fill(tables);
  const LayerWeight w = SelectLayer<Layout::kFragments>(QLORA_JAX_WEIGHT_ARGUMENTS, in_features, out_features);
  const int lane = threadIdx.x % 32;
  const int64_t tile = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int64_t tile_columns = FragmentTiles(in_features);
  if (tile >= tile_columns * FragmentTiles(out_features)) return;
  const int64_t first_row = tile / tile_columns * kTile + lane / 4;
  const int64_t first_column = tile % tile_columns * kTile;

  const uint4* bundles = reinterpret_cast<const uint4*>(w.packed + tile * kTileBytes) + BundleChunk(lane);
  uint4 bundle[4];
#pragma unroll
  for (int strip = 0; strip < 4; ++strip) bundle[strip] = __ldg(bundles + 32 * strip);
#pragma unroll
  for (int strip = 0; strip < 4; ++strip) {
    const uint32_t word[4] = {bundle[strip].x, bundle[strip].y, bundle[strip].z, bundle[strip].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the tile's columns
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t own = __byte_perm(word[2 * half], word[2 * half + 1], r == 0 ? 0x6420 : 0x7531);
        const uint32_t codes = TransposeBytes(own, lane);
        const int64_t row = first_row + 16 * strip + 8 * r;
        const int64_t column = first_column + 32 * half + lane % 4 * 8;
        if (row < out_features && column < in_features) {
          const float scale = BlockScale(w, tables.dynamic_map, row, column);
          StoreEight<T>(dense + row * in_features + column, codes, scale, dtype, tables.code);
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora_jax

#define QLORA_JAX_DEQUANTIZE(LAYOUT, Function, DTYPE, T)                                                            \
  extern "C" __global__ void __launch_bounds__(qlora_jax::kThreads) nf4_dequantize_##LAYOUT##_##DTYPE(               \
      qlora_jax::T::Storage* dense, QLORA_JAX_WEIGHT_PARAMETERS, int32_t weight_dtype, int64_t in_features,          \
      int64_t out_features) {                                                                                        \
    qlora_jax::Function<qlora_jax::T>(dense, QLORA_JAX_WEIGHT_ARGUMENTS, static_cast<qlora_jax::Dtype>(weight_dtype), \
                                      in_features, out_features);                                                    \
  }
QLORA_JAX_DEQUANTIZE(rows, DequantizeRows, bf16, Bfloat16)
QLORA_JAX_DEQUANTIZE(rows, DequantizeRows, f16, Float16)
QLORA_JAX_DEQUANTIZE(rows, DequantizeRows, f32, Float32)
QLORA_JAX_DEQUANTIZE(fragments, DequantizeFragments, bf16, Bfloat16)
QLORA_JAX_DEQUANTIZE(fragments, DequantizeFragments, f16, Float16)
QLORA_JAX_DEQUANTIZE(fragments, DequantizeFragments, f32, Float32)
