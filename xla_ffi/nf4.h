// The one definition of the 4-bit format: codes, nibbles, block scales and roundings, for host and device code.
//
// A weight of shape [in, out] is stored as its transpose [out, in], row-major, two codes a byte, the first element in
// the high nibble; `block_size` consecutive elements share a scale. These are bitsandbytes' bytes.
#ifndef QLORA_JAX_NF4_H_
#define QLORA_JAX_NF4_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QLORA_JAX_HOST_DEVICE __host__ __device__
#else
#define QLORA_JAX_HOST_DEVICE
#endif

namespace qlora_jax {

// Functions of this header are static: files compiled for different instruction sets must not share one copy.

struct Nf4Code {
  float value[16];
};

// QLoRA (arXiv 2305.14314), appendix E: quantiles of N(0, 1) scaled to [-1, 1], zero at index 7.
QLORA_JAX_HOST_DEVICE static constexpr Nf4Code MakeNf4Code() {
  return {{-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f, 0.0795803f,
           0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f}};
}

struct DynamicMap {
  float value[256];
};

// bitsandbytes' signed 8-bit dynamic map, ascending: entry 127 is 0, entry 255 is 1, entry 127 - i is minus entry 127 + i.
// Data, not a formula: recomputing it in another precision moves entries by one ulp.
QLORA_JAX_HOST_DEVICE static constexpr DynamicMap MakeDynamicMap() {
  constexpr float positives[127] = {
      5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f,
      0.00015625001f, 0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f,
      0.00083125f, 0.0009437501f, 0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f,
      0.00409375f, 0.0046562497f, 0.0052187503f, 0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f,
      0.00803125f, 0.00859375f, 0.009156249f, 0.00971875f, 0.01140625f, 0.01421875f, 0.01703125f,
      0.019843752f, 0.02265625f, 0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f, 0.036718752f,
      0.03953125f, 0.042343747f, 0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f,
      0.059218753f, 0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f,
      0.07890625f, 0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f,
      0.09859375f, 0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734376f,
      0.19140625f, 0.20546874f, 0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f,
      0.28984374f, 0.30390626f, 0.31796873f, 0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f,
      0.38828123f, 0.40234375f, 0.41640624f, 0.43046874f, 0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f,
      0.50078124f, 0.5148437f, 0.5289062f, 0.54296875f, 0.5570313f, 0.5710938f, 0.58515626f, 0.5992187f,
      0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, 0.68359375f, 0.6976563f, 0.7117188f,
      0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, 0.79609376f, 0.8101562f, 0.82421875f,
      0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f, 0.9085938f, 0.92265624f, 0.93671876f,
      0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f,
  };
  DynamicMap map{};
  for (int i = 0; i < 127; ++i) {
    map.value[128 + i] = positives[i];
    map.value[126 - i] = -positives[i];
  }
  map.value[127] = 0.0f;
  map.value[255] = 1.0f;
  return map;
}

// Block scales that share one second-level scale: 256, as a shift.
constexpr int kGroupShift = 8;

// Products and sums that the compiler may not fuse. Host files are compiled with -ffp-contract=off.
QLORA_JAX_HOST_DEVICE static inline float MultiplyRounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QLORA_JAX_HOST_DEVICE static inline float AddRounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// One layer of a weight, or one shard of a layer. Elements are counted in the local buffers; `first_row`,
// `first_block` and `row_blocks` place them in the whole tensor, over which scales are grouped.
struct Nf4Weight {
  const uint8_t* packed;
  const uint8_t* scale_codes;  // null: `scales` holds float32 scales
  const float* scales;
  const float* group_scales;
  float offset;
  int64_t in_features;
  int64_t out_features;
  int block_shift;     // log2 of the block size
  int64_t row_blocks;  // blocks in a row of the whole tensor; 0: blocks may straddle rows
  int64_t first_row;
  int64_t first_block;
};

QLORA_JAX_HOST_DEVICE static inline int Code(const uint8_t* packed, int64_t element) {
  const int byte = packed[element >> 1];
  return element & 1 ? byte & 15 : byte >> 4;
}

// Number of local block `block`, which holds element [out, in], in the tensor of which `w` is a shard.
QLORA_JAX_HOST_DEVICE static inline int64_t GlobalBlock(const Nf4Weight& w, int64_t block, int64_t out, int64_t in) {
  return w.row_blocks == 0 ? block : (w.first_row + out) * w.row_blocks + w.first_block + (in >> w.block_shift);
}

// float32 scale of the block that holds element [out, in]; two roundings where scales are quantized.
QLORA_JAX_HOST_DEVICE static inline float BlockScale(const Nf4Weight& w, const float* dynamic_map, int64_t out,
                                                     int64_t in) {
  const int64_t block = (out * w.in_features + in) >> w.block_shift;
  if (w.scale_codes == nullptr) return w.scales[block];
  const int64_t global_block = GlobalBlock(w, block, out, in);
  const float scale = MultiplyRounded(dynamic_map[w.scale_codes[block]], w.group_scales[global_block >> kGroupShift]);
  return AddRounded(scale, w.offset);
}

// Values match the attribute `weight_dtype` of the handlers.
enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

QLORA_JAX_HOST_DEVICE static inline uint32_t FloatBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

QLORA_JAX_HOST_DEVICE static inline float FloatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
QLORA_JAX_HOST_DEVICE static inline uint16_t Bfloat16Bits(float value) {
  const uint32_t bits = FloatBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

QLORA_JAX_HOST_DEVICE static inline float FromBfloat16Bits(uint16_t bits) {
  return FloatFromBits(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN, values from 65520 on become infinity.
QLORA_JAX_HOST_DEVICE static inline uint16_t Float16Bits(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: next to 0.5 a float32 has the spacing of float16's subnormals, so this sum rounds as needed.
    return static_cast<uint16_t>(sign | (FloatBits(FloatFromBits(magnitude) + 0.5f) - FloatBits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

QLORA_JAX_HOST_DEVICE static inline float FromFloat16Bits(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatFromBits(sign | 0x7f800000u | magnitude << 13);
  if (magnitude < 0x0400u) return FloatFromBits(sign | FloatBits(static_cast<float>(magnitude) * 0x1p-24f));
  return FloatFromBits(sign | ((magnitude << 13) + 0x38000000u));
}

QLORA_JAX_HOST_DEVICE static inline float RoundTo(Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return FromBfloat16Bits(Bfloat16Bits(value));
    case Dtype::kFloat16:
      return FromFloat16Bits(Float16Bits(value));
    default:
      return value;
  }
}

}  // namespace qlora_jax

#endif  // QLORA_JAX_NF4_H_
