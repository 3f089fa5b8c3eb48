// CUDA's runtime, cuBLAS and bitsandbytes' kernels on host memory, as far as the tests and timings call them: what is
// tested with them on a CPU is how they are called and compared. Quantization follows bitsandbytes' CUDA rule.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kCode[16] = {
    -1.0f,               -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f};

struct Bf16 {
  uint16_t bits;
};

float Widen(float value) { return value; }
float Widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
float Widen(_Float16 value) { return static_cast<float>(value); }

void Narrow(float value, float* result) { *result = value; }
void Narrow(float value, Bf16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  result->bits = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
void Narrow(float value, _Float16* result) { *result = static_cast<_Float16>(value); }

// The lower of two codes at a tie, and code 0 for what is not a number.
int Nf4(float x) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += x > (kCode[i] + kCode[i + 1]) / 2;
  return code;
}

// The nearest value; at a tie the one with the even index.
int Nearest(const float* code, float x) {
  int low = 0;
  while (low < 254 && x > (code[low] + code[low + 1]) * 0.5f) ++low;
  const float middle = (code[low] + code[low + 1]) * 0.5f;
  return x > middle || (x == middle && low % 2 == 1) ? low + 1 : low;
}

template <typename T>
void Quantize(const float* code, const T* a, float* absmax, uint8_t* out, int block, int n) {
  for (int first = 0; first < n; first += block) {
    const int last = first + block < n ? first + block : n;
    float most = 0;
    for (int i = first; i < last; ++i) most = std::fmax(most, std::fabs(Widen(a[i])));
    absmax[first / block] = most;
    const float inverse = 1.0f / most;
    if (code != nullptr) {
      for (int i = first; i < last; ++i) out[i] = static_cast<uint8_t>(Nearest(code, Widen(a[i]) * inverse));
      continue;
    }
    for (int i = first; i < last; i += 2) {
      const int low = i + 1 < last ? Nf4(Widen(a[i + 1]) * inverse) : 7;
      out[i / 2] = static_cast<uint8_t>(Nf4(Widen(a[i]) * inverse) << 4 | low);
    }
  }
}

float Weight(const uint8_t* packed, int64_t i) { return kCode[i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15]; }

template <typename T>
void Dequantize(const float* code, const uint8_t* a, const float* absmax, T* out, int block, int n) {
  for (int64_t i = 0; i < n; ++i) Narrow((code ? code[a[i]] : Weight(a, i)) * absmax[i / block], &out[i]);
}

template <typename T>
void Gemm4Bit(const T* a, const uint8_t* b, const float* absmax, const uint8_t* codes, const float* map,
              const float* offset, T* y, int m, int n, int k, int block) {
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t out = 0; out < n; ++out) {
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = (out * k + i) / block;
        T weight;
        Narrow(Weight(b, out * k + i) * (codes ? map[codes[at]] * absmax[at >> 8] + *offset : absmax[at]), &weight);
        sum += Widen(a[row * k + i]) * Widen(weight);
      }
      Narrow(sum, &y[row * n + out]);
    }
  }
}

// Column-major: c [m, n] = op(a) [m, k] b [k, n].
template <typename T>
void Gemm(bool transposed, int m, int n, int k, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += Widen(transposed ? a[row * lda + i] : a[i * lda + row]) * Widen(b[column * ldb + i]);
      }
      Narrow(sum, &c[column * ldc + row]);
    }
  }
}

// A handle that is not null.
int Anything(void** handle) {
  static int one;
  *handle = &one;
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* cudaGetErrorString(int) { return "an error of the host double"; }
EXPORT int cudaMemcpy(void* target, const void* source, size_t size, int kind) {
  std::memcpy(target, source, size);
  return kind == 4 ? 0 : 1;
}
EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned) { return Anything(stream); }
EXPORT int cudaStreamSynchronize(void*) { return 0; }
EXPORT int cudaDeviceSynchronize() { return 0; }
// What is put on a stream runs at once; a graph holds nothing.
EXPORT int cudaStreamBeginCapture(void*, int) { return 0; }
EXPORT int cudaStreamEndCapture(void* stream, void** graph) {
  *graph = stream;
  return 0;
}
EXPORT int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = graph;
  return 0;
}
EXPORT int cudaGraphDestroy(void*) { return 0; }
EXPORT int cudaGraphExecDestroy(void*) { return 0; }
EXPORT int cudaGraphLaunch(void* graph, void* stream) { return graph == nullptr || stream == nullptr; }

EXPORT int cublasCreate_v2(void** handle) { return Anything(handle); }
EXPORT int cublasSetStream_v2(void*, void* stream) { return stream == nullptr; }
EXPORT int cublasSetWorkspace_v2(void*, void* workspace, size_t) { return workspace == nullptr; }
EXPORT int cublasSaxpy_v2(void*, int n, const float* alpha, const float* x, int, float* y, int) {
  for (int i = 0; i < n; ++i) y[i] = std::fma(*alpha, x[i], y[i]);
  return 0;
}
EXPORT int cublasGemmEx(void*, int transa, int transb, int m, int n, int k, const float* alpha, const void* a,
                        int a_type, int lda, const void* b, int b_type, int ldb, const float* beta, void* c,
                        int c_type, int ldc, int compute, int) {
  if (transb || *alpha != 1 || *beta != 0 || compute != 68 || a_type != b_type || a_type != c_type) return 7;
  switch (a_type) {
    case 0:
      Gemm(transa, m, n, k, static_cast<const float*>(a), lda, static_cast<const float*>(b), ldb,
           static_cast<float*>(c), ldc);
      return 0;
    case 2:
      Gemm(transa, m, n, k, static_cast<const _Float16*>(a), lda, static_cast<const _Float16*>(b), ldb,
           static_cast<_Float16*>(c), ldc);
      return 0;
    case 14:
      Gemm(transa, m, n, k, static_cast<const Bf16*>(a), lda, static_cast<const Bf16*>(b), ldb,
           static_cast<Bf16*>(c), ldc);
      return 0;
  }
  return 7;
}

#define BITSANDBYTES(name, T)                                                                                      \
  EXPORT void cquantize_blockwise_##name##_nf4(const float*, const T* a, float* absmax, uint8_t* out, int block,  \
                                               int n) {                                                            \
    Quantize(nullptr, a, absmax, out, block, n);                                                                   \
  }                                                                                                                \
  EXPORT void cquantize_blockwise_##name(const float* code, const T* a, float* absmax, uint8_t* out, int block,   \
                                         int n) {                                                                  \
    Quantize(code, a, absmax, out, block, n);                                                                      \
  }                                                                                                                \
  EXPORT void cdequantize_blockwise_##name##_nf4(const float*, const uint8_t* a, const float* absmax, T* out,     \
                                                 int block, int n, void*) {                                        \
    Dequantize(nullptr, a, absmax, out, block, n);                                                                 \
  }                                                                                                                \
  EXPORT void cdequantize_blockwise_##name(const float* code, const uint8_t* a, const float* absmax, T* out,      \
                                           int block, int n, void*) {                                              \
    Dequantize(code, a, absmax, out, block, n);                                                                    \
  }                                                                                                                \
  EXPORT void cgemm_4bit_##name(const T* a, const uint8_t* b, const float* absmax, const uint8_t* codes,          \
                                const float* map, const float* offset, T* y, const T*, int m, int n, int k,       \
                                int block, int, void*) {                                                           \
    Gemm4Bit(a, b, absmax, codes, map, offset, y, m, n, k, block);                                                 \
  }

BITSANDBYTES(fp32, float)
BITSANDBYTES(bf16, Bf16)
BITSANDBYTES(fp16, _Float16)
