// Blockwise quantization, written once in the vectors that GCC and Clang lower to any instruction set.
//
// A file that includes this header has defined QLORA_JAX_ISA, the namespace of its instruction set, included quantize.h,
// and defined in that namespace:
//   kLanes                     float32 values of a vector
//   Words                      a vector of as many 32-bit integers
//   PackCodes(codes, packed)   kLanes codes to kLanes / 2 bytes, the first of two in the high nibble
// and, where it has an instruction for it, with QLORA_JAX_PICKS:
//   Pick(table, indices)       of 8 float32 values, aligned to 32 bytes, those that the lowest 3 bits of indices name
// Everything here lies in that namespace, so that no two instruction sets share a function.

namespace qlora_jax::QLORA_JAX_ISA {

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr int64_t kMaxBlock = int64_t{1} << kMaxBlockShift;
constexpr int64_t kGroup = int64_t{1} << kGroupShift;

// While it lives, this thread counts subnormal operands and results as 0, as XLA's threads do.
class FlushSubnormals {
 public:
#if defined(QLORA_JAX_X86)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | uint64_t{1} << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushSubnormals() {}
#endif
};

template <class To, class From>
static inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
static inline T LoadUnaligned(const void* source) {
  T value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

// kLanes elements as float32 values.
template <Elements kKind>
static inline Floats LoadFloats(const char* source) {
  if constexpr (kKind == Elements::kFloat32) {
    return LoadUnaligned<Floats>(source);
  } else if constexpr (kKind == Elements::kRounded) {
    const Words bits = LoadUnaligned<Words>(source);
    const Words is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff;
    return BitCast<Floats>((bits & is_nan) | (rounded & ~is_nan));
  } else {
    const Words halves = __builtin_convertvector(LoadUnaligned<Halves>(source), Words);
    if constexpr (kKind == Elements::kBfloat16) return BitCast<Floats>(halves << 16);
    const Words magnitude = halves & 0x7fff;
    const Words small = BitCast<Words>(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
    const Words large = magnitude << 13 | 0x7f800000;  // infinity, NaN
    const Words normal = (magnitude << 13) + 0x38000000;
    const Words is_small = magnitude < 0x0400, is_large = magnitude >= 0x7c00;
    const Words result = (small & is_small) | (large & is_large) | (normal & ~is_small & ~is_large);
    return BitCast<Floats>(result | (halves & 0x8000) << 16);
  }
}

// The largest magnitude of `count` elements; NaN where there is one, 0 where all are subnormal. As integers the bits of
// magnitudes are ordered as their values, NaN above all.
template <Elements kKind>
static inline float LargestMagnitude(const char* source, int64_t count) {
  uint32_t bits;
  if constexpr (BytesOf(kKind) == 4) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t magnitude = LoadUnaligned<int32_t>(source + 4 * i) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    bits = static_cast<uint32_t>(largest);
    if (kKind == Elements::kRounded) bits = FloatBits(RoundTo(Dtype::kBfloat16, FloatFromBits(bits)));
  } else {
    int16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int16_t magnitude = static_cast<int16_t>(LoadUnaligned<uint16_t>(source + 2 * i) & 0x7fff);
      largest = magnitude > largest ? magnitude : largest;
    }
    const uint16_t half = static_cast<uint16_t>(largest);
    bits = FloatBits(kKind == Elements::kBfloat16 ? FromBfloat16Bits(half) : FromFloat16Bits(half));
  }
  return FloatFromBits(bits < 0x00800000u ? 0u : bits);
}

// 1 / scale, and 0 for 0 and NaN, which sends a block of zeros to the code of zero.
static inline float Reciprocal(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// Finds the codes of normalized weights.
#ifdef QLORA_JAX_PICKS
// The thresholds are a binary search tree: nodes 2n and 2n + 1 are the children of node n, 1 is the root.
class Search {
 public:
  explicit Search(const Encoding& encoding) {
    const int levels = encoding.by_magnitude ? 3 : 4;
    upper_[0] = 0.0f;
    for (int level = 0; level < levels; ++level) {
      for (int i = 0; i < 1 << level; ++i) {
        const float threshold = encoding.thresholds[((2 * i + 1) << (levels - 1 - level)) - 1];
        (level < 3 ? upper_[(1 << level) + i] : lower_[i]) = threshold;
      }
    }
    if (encoding.by_magnitude) {
      for (int i = 0; i < 8; ++i) lower_[i] = FloatFromBits(encoding.codes[i]);
    }
  }

  template <bool kByMagnitude>
  Words Codes(Floats normalized) const {
    const Floats searched = kByMagnitude ? BitCast<Floats>(BitCast<Words>(normalized) & 0x7fffffff) : normalized;
    Words node = 2 + ((searched > upper_[1]) & 1);
    node += node + ((searched > Pick(upper_, node)) & 1);
    node += node + ((searched > Pick(upper_, node)) & 1);
    if constexpr (kByMagnitude) return BitCast<Words>(Pick(lower_, node)) | ((normalized < 0.0f) & 8);
    node += node + ((searched > Pick(lower_, node)) & 1);
    return node & 15;
  }

 private:
  alignas(32) float upper_[8];  // nodes 1 to 7
  alignas(32) float lower_[8];  // nodes 8 to 15; by magnitude, the codes of 3 bits, as they stand in a float
};
#else
// By comparing with each threshold.
class Search {
 public:
  explicit Search(const Encoding& encoding) : encoding_(encoding) {}

  template <bool kByMagnitude>
  Words Codes(Floats normalized) const {
    if constexpr (!kByMagnitude) {
      Words codes = {};
      for (int i = 0; i < 15; ++i) codes -= normalized > encoding_.thresholds[i];
      return codes;
    } else {
      const Floats magnitudes = BitCast<Floats>(BitCast<Words>(normalized) & 0x7fffffff);
      Words codes = Words{} + encoding_.codes[0];
      for (int i = 0; i < 7; ++i) {
        codes += (magnitudes > encoding_.thresholds[i]) & (encoding_.codes[i + 1] - encoding_.codes[i]);
      }
      return codes | ((normalized < 0.0f) & 8);
    }
  }

 private:
  const Encoding encoding_;
};
#endif

// So far ahead, perhaps past the end, elements are called for: without it most of the time is spent waiting for them.
constexpr int64_t kPrefetchBytes = 4096;

// One whole block.
template <Elements kKind, bool kByMagnitude>
static inline void EncodeBlock(const Search& search, const char* source, int64_t block, uint8_t* packed,
                               float* absmax) {
  for (int64_t i = 0; i < block * BytesOf(kKind); i += 64) __builtin_prefetch(source + i + kPrefetchBytes);
  *absmax = LargestMagnitude<kKind>(source, block);
  const float reciprocal = Reciprocal(*absmax);
  for (int64_t i = 0; i < block; i += kLanes) {
    const Floats normalized = LoadFloats<kKind>(source + i * BytesOf(kKind)) * reciprocal;
    PackCodes(search.Codes<kByMagnitude>(normalized), packed + i / 2);
  }
}

template <Elements kKind, bool kByMagnitude>
static void EncodeAs(const Encoding& encoding, const char* source, int64_t count, int block_shift, uint8_t* packed,
                     float* absmax) {
  const Search search(encoding);  // local, so that no store can change it and it stays in registers
  const int64_t block = int64_t{1} << block_shift;
  for (; count >= block; count -= block) {
    EncodeBlock<kKind, kByMagnitude>(search, source, block, packed, absmax);
    source += block * BytesOf(kKind);
    packed += block / 2;
    ++absmax;
  }
  if (count == 0) return;
  char rest[kMaxBlock * BytesOf(kKind)];
  uint8_t codes[kMaxBlock / 2];
  __builtin_memset(rest, 0, block * BytesOf(kKind));
  __builtin_memcpy(rest, source, count * BytesOf(kKind));
  EncodeBlock<kKind, kByMagnitude>(search, rest, block, codes, absmax);
  __builtin_memcpy(packed, codes, (count + 1) / 2);
}

// `width` <= kLanes elements; 0 where the others would be.
template <Elements kKind>
static inline Floats LoadFirst(const char* source, int64_t width) {
  if (width == kLanes) return LoadFloats<kKind>(source);
  char elements[kLanes * BytesOf(kKind)] = {};
  __builtin_memcpy(elements, source, width * BytesOf(kKind));
  return LoadFloats<kKind>(elements);
}

// A block of each of `width` <= kLanes columns, one column a lane, of a matrix whose rows are `stride` bytes apart.
// Results for two columns are `packed_stride` bytes and `absmax_stride` scales apart.
template <Elements kKind, bool kByMagnitude>
static inline void EncodeColumnBlocks(const Search& search, const char* source, int64_t stride, int64_t width,
                                      int64_t block, uint8_t* packed, int64_t packed_stride, float* absmax,
                                      int64_t absmax_stride) {
  Words largest = {};
  for (int64_t i = 0; i < block; ++i) {
    __builtin_prefetch(source + (block + i) * stride);
    const Words magnitudes = BitCast<Words>(LoadFirst<kKind>(source + i * stride, width)) & 0x7fffffff;
    largest = magnitudes > largest ? magnitudes : largest;
  }
  largest &= largest >= 0x00800000;
  const Floats scales = BitCast<Floats>(largest);
  const Floats reciprocals = BitCast<Floats>(BitCast<Words>(1.0f / scales) & (scales > 0.0f));
  constexpr int64_t kCodesPerWord = 8;
  int32_t words[kMaxBlock / kCodesPerWord][kLanes];
  for (int64_t i = 0; i < block; i += kCodesPerWord) {
    Words word = {};
    for (int j = 0; j < kCodesPerWord; ++j) {
      const Floats normalized = LoadFirst<kKind>(source + (i + j) * stride, width) * reciprocals;
      word |= search.Codes<kByMagnitude>(normalized) << (4 * (j ^ 1));  // the first of two in the high nibble
    }
    __builtin_memcpy(words[i / kCodesPerWord], &word, sizeof word);
  }
  for (int64_t lane = 0; lane < width; ++lane) {
    absmax[lane * absmax_stride] = scales[lane];
    for (int64_t i = 0; i < block / kCodesPerWord; ++i) {
      __builtin_memcpy(packed + lane * packed_stride + 4 * i, &words[i][lane], 4);
    }
  }
}

template <Elements kKind, bool kByMagnitude>
static void EncodeColumnsAs(const Encoding& encoding, const char* source, int64_t stride, int64_t rows,
                            int64_t columns, int block_shift, uint8_t* packed, float* absmax) {
  const Search search(encoding);
  const int64_t block = int64_t{1} << block_shift;
  const int64_t packed_stride = rows / 2, absmax_stride = rows >> block_shift;
  for (int64_t row = 0; row < rows; row += block) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = columns - column < kLanes ? columns - column : kLanes;
      const int64_t block_index = row >> block_shift;
      EncodeColumnBlocks<kKind, kByMagnitude>(search, source + row * stride + column * BytesOf(kKind), stride, width,
                                              block, packed + column * packed_stride + row / 2, packed_stride,
                                              absmax + column * absmax_stride + block_index, absmax_stride);
    }
  }
}

// The functions of one kind of elements and of encoding.
struct Encoders {
  void (*rows)(const Encoding&, const char*, int64_t, int, uint8_t*, float*);
  void (*columns)(const Encoding&, const char*, int64_t, int64_t, int64_t, int, uint8_t*, float*);
};

template <Elements kKind>
static Encoders EncodersOf(bool by_magnitude) {
  if (by_magnitude) return {EncodeAs<kKind, true>, EncodeColumnsAs<kKind, true>};
  return {EncodeAs<kKind, false>, EncodeColumnsAs<kKind, false>};
}

static Encoders EncodersOf(const Encoding& encoding, Elements kind) {
  switch (kind) {
    case Elements::kFloat32:
      return EncodersOf<Elements::kFloat32>(encoding.by_magnitude);
    case Elements::kBfloat16:
      return EncodersOf<Elements::kBfloat16>(encoding.by_magnitude);
    case Elements::kFloat16:
      return EncodersOf<Elements::kFloat16>(encoding.by_magnitude);
    case Elements::kRounded:
      return EncodersOf<Elements::kRounded>(encoding.by_magnitude);
  }
  __builtin_unreachable();
}

static void Encode(const Encoding& encoding, Elements kind, const void* elements, int64_t count, int block_shift,
                   uint8_t* packed, float* absmax) {
  const FlushSubnormals flush;
  const char* const source = static_cast<const char*>(elements);
  EncodersOf(encoding, kind).rows(encoding, source, count, block_shift, packed, absmax);
}

static void EncodeColumns(const Encoding& encoding, Elements kind, const void* elements, int64_t stride, int64_t rows,
                          int64_t columns, int block_shift, uint8_t* packed, float* absmax) {
  const FlushSubnormals flush;
  const char* const source = static_cast<const char*>(elements);
  EncodersOf(encoding, kind).columns(encoding, source, stride * BytesOf(kind), rows, columns, block_shift, packed,
                                     absmax);
}

// The 255 midpoints of the dynamic map, and infinity.
struct Midpoints {
  float value[256];
};

static constexpr Midpoints MakeMidpoints() {
  constexpr DynamicMap map = MakeDynamicMap();
  Midpoints midpoints{};
  for (int i = 0; i < 255; ++i) midpoints.value[i] = (map.value[i] + map.value[i + 1]) * 0.5f;
  midpoints.value[255] = __builtin_inff();
  return midpoints;
}

constexpr Midpoints kMidpoints = MakeMidpoints();

static inline int MidpointsBelow(float value) {
  int below = 0;
  for (int step = 128; step > 0; step /= 2) below += kMidpoints.value[below + step - 1] < value ? step : 0;
  return below;
}

// By the upper 16 bits of a float32: the midpoints below all values that begin so. No two midpoints begin alike, so that
// one comparison finds the rest. NaN comes after all.
struct FirstMidpoints {
  uint8_t value[1 << 16];

  FirstMidpoints() {
    for (uint32_t upper = 0; upper < 1 << 16; ++upper) {
      const bool finite = (upper & 0x7f80u) != 0x7f80u;
      const uint32_t least = upper << 16 | (upper & 0x8000u ? 0xffffu : 0u);
      value[upper] = static_cast<uint8_t>(finite ? MidpointsBelow(FloatFromBits(least)) : 254);
    }
  }
};

// The nearest value of the dynamic map; on an exact midpoint the one with the even index. NaN: the last.
static inline uint8_t ScaleCode(const FirstMidpoints& first, float normalized) {
  int code = first.value[FloatBits(normalized) >> 16];
  code += !(kMidpoints.value[code] >= normalized);
  return static_cast<uint8_t>(code + ((kMidpoints.value[code] == normalized) & code & 1));
}

static void EncodeScales(const float* absmax, int64_t count, float offset, uint8_t* codes, float* group_scales) {
  static const FirstMidpoints first_midpoints;
  const FlushSubnormals flush;
  for (int64_t first = 0; first < count; first += kGroup) {
    const int64_t size = count - first < kGroup ? count - first : kGroup;
    float centred[kGroup];
    for (int64_t i = 0; i < size; ++i) centred[i] = absmax[first + i] - offset;
    const float scale = LargestMagnitude<Elements::kFloat32>(reinterpret_cast<const char*>(centred), size);
    const float reciprocal = Reciprocal(scale);
    for (int64_t i = 0; i < size; ++i) codes[first + i] = ScaleCode(first_midpoints, centred[i] * reciprocal);
    *group_scales++ = scale;
  }
}

static float Mean(const float* values, int64_t count, float* sums) {
  const FlushSubnormals flush;
  const float* from = values;
  for (int64_t size = count; size > 1;) {
    const int64_t half = (size + 1) / 2;
    for (int64_t i = 0; i < size - half; ++i) sums[i] = from[i] + from[half + i];
    if (half > size - half) sums[half - 1] = from[half - 1];
    from = sums;
    size = half;
  }
  return from[0] / static_cast<float>(count);
}

static constexpr QuantizeKernels NamedQuantize(const char* name) {
  return {name, Encode, EncodeColumns, EncodeScales, Mean};
}

}  // namespace qlora_jax::QLORA_JAX_ISA
