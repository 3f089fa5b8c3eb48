// Causal attention in tiles of bfloat16, forward and backward (FlashAttention-2, arXiv 2307.08691, section 3.1: the
// backward pass computes the weights again from the saved normalizers).
//
// Blocks of 32 queries meet all keys up to their last query at once: their scores are a strip [32][keys] of float32,
// which stays in the second-level cache up to some thousand keys, so no running maximum is needed. Every operand is
// packed into tiles once per key/value head:
//
//   scores = Q K^T     rows: Q      columns: K^T    (tiles of rows of K, transposed)
//   y      = P V       rows: P      columns: V      (pairs of rows of V)
//   dP     = dY V^T    rows: dY     columns: V^T
//   dS     = P (dP - sum(P dP)) scale
//   dQ     = dS K      rows: dS     columns: K
//   dK^T  += Q^T dS    rows: Q^T    columns: dS     (pairs of rows of dS)
//   dV^T  += dY^T P    rows: dY^T   columns: P
//
// Blocks of queries and keys above the diagonal are left out. Features are padded with zeros to whole blocks of 32, and
// so are tokens.
//
// Included after amx_tiles.h.
#ifndef QLORA_JAX_CPU_AMX_ATTENTION_H_
#define QLORA_JAX_CPU_AMX_ATTENTION_H_

#include "attention.h"

#include "amx_packing.h"

namespace qlora_jax::QLORA_JAX_ISA {

// Blocks of queries whose weights are gathered before the gradients of keys and values are summed over them: these sums
// are read and written once for so many steps.
constexpr int64_t kGathered = 4;

// e^x for x <= 0, to 2 units in the last place; below -104 it is 0. A Taylor polynomial of degree 6 in what is left of x
// after whole multiples of ln 2, which is 0.35 at most.
static inline __m512 Exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // of two operands with a NaN it is the second that comes out
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  // ln 2 in two parts, the first of which is exact in products with n.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  constexpr float kFactors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float factor : kFactors) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(p, n);
}

// Where 16 values of row `row` of a strip [32][keys] of sums lie.
static inline float* SumsAt(float* sums, int64_t row, int64_t column) {
  return sums + column / kBlockSide * kBlockSums + (row / kTileSide * 2 + column % kBlockSide / kTileSide) * kTileSums +
         row % kTileSide * kTileSide;
}

// Which of 16 keys a query sees.
static inline __mmask16 Visible(const AttentionProblem& p, int64_t row, int64_t query, int64_t key) {
  const int64_t own = query + 1 - key;
  __mmask16 seen = own >= kTileSide ? 0xffff : own <= 0 ? 0 : static_cast<__mmask16>((1u << own) - 1);
  if (p.mask != nullptr) {
    const uint8_t* mask = p.mask + (row * p.seq + query) * p.seq + key;
    const __m128i bytes = _mm_maskz_loadu_epi8(seen, mask);
    seen = static_cast<__mmask16>(seen & _mm_test_epi8_mask(bytes, bytes));
  }
  return seen;
}

// Two vectors of float32 as 32 bfloat16.
static inline __m512i RoundPair(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(Bfloat16Halves(low)), Bfloat16Halves(high), 1);
}

// One key/value head with the query heads that share it.
struct Head {
  const AttentionProblem& p;
  int64_t row, kv_head;  // of the batch

  Head(const AttentionProblem& problem, int64_t index)
      : p(problem), row(index / problem.kv_heads), kv_head(index % problem.kv_heads) {}

  int64_t steps() const { return CeilDivide(p.head_dim, kBlockSide); }  // of a product over features
  int64_t blocks() const { return CeilDivide(p.seq, kBlockSide); }
  int64_t group() const { return p.heads / p.kv_heads; }

  Matrix OfKeys(const uint16_t* tensor, int64_t tokens) const {
    return {tensor + (row * p.seq * p.kv_heads + kv_head) * p.head_dim, p.kv_heads * p.head_dim, tokens, p.head_dim};
  }
  Matrix OfQueries(const uint16_t* tensor, int64_t head) const {
    return {tensor + (row * p.seq * p.heads + head) * p.head_dim, p.heads * p.head_dim, p.seq, p.head_dim};
  }
};

// Writes 32 tokens by features from strips of sums; `factors`: of each token.
static void StoreTokens(const Matrix& m, int64_t token, float* sums, const float* factors) {
  uint16_t* data = const_cast<uint16_t*>(m.data);
  const int64_t tokens = Smaller(kBlockSide, m.tokens - token);
  for (int64_t i = 0; i < tokens; ++i) {
    const __m512 factor = _mm512_set1_ps(factors == nullptr ? 1.0f : factors[i]);
    for (int64_t feature = 0; feature < m.features; feature += kBlockSide) {
      const float* low = SumsAt(sums, i, feature);
      const __m512i values = RoundPair(_mm512_mul_ps(_mm512_load_ps(low), factor),
                                       _mm512_mul_ps(_mm512_load_ps(low + kTileSums), factor));
      _mm512_mask_storeu_epi16(data + (token + i) * m.stride + feature, Lanes(m.features - feature), values);
    }
  }
}

// Weights exp(score - largest) of 32 queries as rows of the product with V; returns the factors and normalizers.
static void Softmax(const Head& head, int64_t query_head, int64_t begin, int64_t blocks, float* scores, uint8_t* weights,
                    float factors[kBlockSide]) {
  const AttentionProblem& p = head.p;
  const __m512 scale = _mm512_set1_ps(p.scale), hidden = _mm512_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < kBlockSide; ++i) {
    const int64_t query = begin + i;
    uint8_t* out = weights + i / kTileSide * blocks * kTileBytes + i % kTileSide * kTileRowBytes;
    if (query >= p.seq) {
      for (int64_t block = 0; block < blocks; ++block, out += kTileBytes) {
        _mm512_store_si512(out, _mm512_setzero_si512());
      }
      continue;
    }
    __m512 largest = hidden;
    for (int64_t key = 0; key < blocks * kBlockSide; key += kTileSide) {
      float* at = SumsAt(scores, i, key);
      const __m512 score = _mm512_mask_mul_ps(hidden, Visible(p, head.row, query, key), _mm512_load_ps(at), scale);
      _mm512_store_ps(at, score);
      largest = _mm512_max_ps(largest, score);
    }
    const float most = _mm512_reduce_max_ps(largest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; ++block, out += kTileBytes) {
      const float* at = SumsAt(scores, i, block * kBlockSide);
      const __m512 low = Exp(_mm512_sub_ps(_mm512_load_ps(at), _mm512_set1_ps(most)));
      const __m512 high = Exp(_mm512_sub_ps(_mm512_load_ps(at + kTileSums), _mm512_set1_ps(most)));
      total = _mm512_add_ps(total, _mm512_add_ps(low, high));
      _mm512_store_si512(out, RoundPair(low, high));
    }
    const float sum = _mm512_reduce_add_ps(total);
    factors[i] = 1.0f / sum;
    p.normalizer[(head.row * p.heads + query_head) * p.seq + query] = most + __builtin_logf(sum);
  }
}

// Workspaces, one array after the other. Every size is a multiple of 64 bytes.
struct Cursor {
  uint8_t* at;
  uint8_t* Take(int64_t bytes) {
    uint8_t* taken = at;
    at += bytes;
    return taken;
  }
  float* TakeSums(int64_t blocks) { return reinterpret_cast<float*>(Take(blocks * kBlockSums * 4)); }
};

struct Attention {
  static int64_t Blocks(const AttentionProblem& p) { return CeilDivide(p.seq, kBlockSide); }
  static int64_t Steps(const AttentionProblem& p) { return CeilDivide(p.head_dim, kBlockSide); }

  static int64_t ForwardBytes(const AttentionProblem& p) {
    const int64_t blocks = Blocks(p), steps = Steps(p);
    return (2 * blocks * steps + steps + blocks) * kBlockBytes + (blocks + steps) * kBlockSums * 4;
  }

  static void Forward(const AttentionProblem& p, int64_t kv_head, int64_t first, int64_t last, void* workspace) {
    const Head head(p, kv_head);
    const int64_t keys = Smaller(RoundUpToBlock(last), p.seq);  // no query sees a later one
    const int64_t key_blocks = CeilDivide(keys, kBlockSide), steps = head.steps();
    Cursor cursor{static_cast<uint8_t*>(workspace)};
    uint8_t* keys_t = cursor.Take(key_blocks * steps * kBlockBytes);
    uint8_t* values = cursor.Take(key_blocks * steps * kBlockBytes);
    uint8_t* query = cursor.Take(steps * kBlockBytes);
    uint8_t* weights = cursor.Take(key_blocks * kBlockBytes);
    float* scores = cursor.TakeSums(key_blocks);
    float* y = cursor.TakeSums(steps);
    PackRows(head.OfKeys(p.key, keys), true, keys_t);
    PackTokens(head.OfKeys(p.value, keys), false, values);
    LoadTileConfig(FullTiles());
    for (int64_t h = head.kv_head * head.group(); h < (head.kv_head + 1) * head.group(); ++h) {
      for (int64_t begin = first; begin < last; begin += kBlockSide) {
        const int64_t blocks = begin / kBlockSide + 1;
        PackBlockOfRows(head.OfQueries(p.query, h), begin, false, query);
        MultiplyRow(PackedBlock(query, 0, steps), keys_t, blocks, steps, steps, scores);
        float factors[kBlockSide];
        Softmax(head, h, begin, blocks, scores, weights, factors);
        MultiplyRow(PackedBlock(weights, 0, blocks), values, steps, key_blocks, blocks, y);
        StoreTokens(head.OfQueries(p.y, h), begin, y, factors);
      }
    }
    ReleaseTiles();
  }

  static int64_t BackwardBytes(const AttentionProblem& p) {
    const int64_t blocks = Blocks(p), steps = Steps(p);
    return (3 * blocks * steps + 2 * steps + blocks + 2 * kGathered * (steps + blocks)) * kBlockBytes +
           (2 * blocks + steps + 2 * blocks * steps) * kBlockSums * 4;
  }

  // What a block of queries gives to the sums over queries: step `step` of `steps` of products over them.
  struct Step {
    uint8_t *weights, *d_scores;  // as columns, [key / 16][step]
    int64_t stride;               // bytes between tiles of 16 keys
  };

  // From scores and dP of 32 queries: dS as rows of the product with K, P and dS as columns of those over queries.
  static void ScoreGradients(const Head& head, int64_t query_head, int64_t begin, int64_t blocks, float* scores,
                             float* d_weights, uint8_t* d_scores, const Step& step) {
    const AttentionProblem& p = head.p;
    const __m512 scale = _mm512_set1_ps(p.scale);
    const float* normalizer = p.normalizer + (head.row * p.heads + query_head) * p.seq;
    for (int64_t i = 0; i < kBlockSide; i += 2) {
      __m512 shared[2];
      for (int j = 0; j < 2; ++j) {
        const int64_t query = begin + i + j;
        const __m512 own = _mm512_set1_ps(query < p.seq ? normalizer[query] : 0.0f);
        // The part of the softmax's derivative that all keys of a query share; from the rounded output (as sum(dy * y))
        // it would carry that rounding into every gradient.
        __m512 sum = _mm512_setzero_ps();
        for (int64_t key = 0; key < blocks * kBlockSide; key += kTileSide) {
          const __mmask16 seen = query < p.seq ? Visible(p, head.row, query, key) : 0;
          float* at = SumsAt(scores, i + j, key);
          const __m512 weight = _mm512_maskz_mov_ps(seen, Exp(_mm512_fmsub_ps(_mm512_load_ps(at), scale, own)));
          _mm512_store_ps(at, weight);
          sum = _mm512_fmadd_ps(weight, _mm512_load_ps(SumsAt(d_weights, i + j, key)), sum);
        }
        shared[j] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
      }
      uint8_t* out = d_scores + i / kTileSide * blocks * kTileBytes + i % kTileSide * kTileRowBytes;
      for (int64_t block = 0; block < blocks; ++block, out += kTileBytes) {
        __m512i weights[2], gradients[2];
        for (int j = 0; j < 2; ++j) {
          const float* at = SumsAt(scores, i + j, block * kBlockSide);
          const float* d_at = SumsAt(d_weights, i + j, block * kBlockSide);
          const __m512 low = _mm512_load_ps(at), high = _mm512_load_ps(at + kTileSums);
          weights[j] = RoundPair(low, high);
          const auto gradient = [&](__m512 weight, __m512 d_weight) {
            return _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_sub_ps(d_weight, shared[j])), scale);
          };
          gradients[j] = RoundPair(gradient(low, _mm512_load_ps(d_at)), gradient(high, _mm512_load_ps(d_at + kTileSums)));
          _mm512_store_si512(out + j * kTileRowBytes, gradients[j]);
        }
        __m512i weight_pairs[2], gradient_pairs[2];
        Pair(weights[0], weights[1], weight_pairs);
        Pair(gradients[0], gradients[1], gradient_pairs);
        for (int half = 0; half < 2; ++half) {
          const int64_t offset = (2 * block + half) * step.stride + i / 2 * kTileRowBytes;
          _mm512_store_si512(step.weights + offset, weight_pairs[half]);
          _mm512_store_si512(step.d_scores + offset, gradient_pairs[half]);
        }
      }
    }
  }

  // sums [feature block][key block] += over the gathered blocks of queries, from that on which may see the key block.
  static void AddOverQueries(const uint8_t* rows, const uint8_t* columns, int64_t features, int64_t gathered,
                             int64_t first_block, int64_t key_blocks, bool add, float* sums) {
    for (int64_t key = 0; key < first_block + gathered; ++key) {
      const int64_t skipped = key > first_block ? key - first_block : 0;
      Strip column = PackedBlock(columns, key, kGathered);
      column.tiles += skipped * kTileBytes;
      for (int64_t feature = 0; feature < features; ++feature) {
        Strip row = PackedBlock(rows, feature, kGathered);
        row.tiles += skipped * kTileBytes;
        // The first query that sees a block of keys is the block of the same number.
        MultiplyBlockTiles<2, 2>(row, column, gathered - skipped, add || key < first_block,
                                 sums + (feature * key_blocks + key) * kBlockSums);
      }
    }
  }

  // Writes tokens by features from sums of features by tokens.
  static void StoreTransposed(const Matrix& m, float* sums) {
    uint16_t* data = const_cast<uint16_t*>(m.data);
    const int64_t blocks = CeilDivide(m.tokens, kBlockSide);
    for (int64_t token = 0; token < m.tokens; token += kTileSide) {
      for (int64_t feature = 0; feature < m.features; feature += kBlockSide) {
        float* strip = sums + feature / kBlockSide * blocks * kBlockSums;
        __m512i tile[2][kTileSide];
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < kTileSide; ++i) tile[half][i] = _mm512_load_si512(SumsAt(strip, half * kTileSide + i, token));
          Transpose(tile[half]);
        }
        for (int i = 0; i < Smaller(kTileSide, m.tokens - token); ++i) {
          _mm512_mask_storeu_epi16(data + (token + i) * m.stride + feature, Lanes(m.features - feature),
                                   RoundPair(_mm512_castsi512_ps(tile[0][i]), _mm512_castsi512_ps(tile[1][i])));
        }
      }
    }
  }

  static void Backward(const AttentionProblem& p, int64_t kv_head, void* workspace) {
    const Head head(p, kv_head);
    const int64_t key_blocks = head.blocks(), steps = head.steps();
    Cursor cursor{static_cast<uint8_t*>(workspace)};
    uint8_t* keys_t = cursor.Take(key_blocks * steps * kBlockBytes);
    uint8_t* keys = cursor.Take(key_blocks * steps * kBlockBytes);
    uint8_t* values_t = cursor.Take(key_blocks * steps * kBlockBytes);
    uint8_t* query = cursor.Take(steps * kBlockBytes);
    uint8_t* dy = cursor.Take(steps * kBlockBytes);
    uint8_t* d_scores = cursor.Take(key_blocks * kBlockBytes);
    uint8_t* queries_t = cursor.Take(kGathered * steps * kBlockBytes);
    uint8_t* dy_t = cursor.Take(kGathered * steps * kBlockBytes);
    uint8_t* gathered_weights = cursor.Take(kGathered * key_blocks * kBlockBytes);
    uint8_t* gathered_d_scores = cursor.Take(kGathered * key_blocks * kBlockBytes);
    float* scores = cursor.TakeSums(key_blocks);
    float* d_weights = cursor.TakeSums(key_blocks);
    float* d_query = cursor.TakeSums(steps);
    float* d_keys_t = cursor.TakeSums(key_blocks * steps);
    float* d_values_t = cursor.TakeSums(key_blocks * steps);
    PackRows(head.OfKeys(p.key, p.seq), true, keys_t);
    PackTokens(head.OfKeys(p.key, p.seq), false, keys);
    PackRows(head.OfKeys(p.value, p.seq), true, values_t);
    LoadTileConfig(FullTiles());
    for (int64_t h = head.kv_head * head.group(); h < (head.kv_head + 1) * head.group(); ++h) {
      const Matrix query_matrix = head.OfQueries(p.query, h), dy_matrix = head.OfQueries(p.dy, h);
      const bool first_head = h == head.kv_head * head.group();
      for (int64_t first_block = 0; first_block < key_blocks; first_block += kGathered) {
        const int64_t gathered = Smaller(kGathered, key_blocks - first_block);
        for (int64_t step = 0; step < gathered; ++step) {
          const int64_t begin = (first_block + step) * kBlockSide, blocks = first_block + step + 1;
          PackBlockOfRows(query_matrix, begin, false, query);
          PackBlockOfRows(dy_matrix, begin, false, dy);
          PackStepOfTokens(query_matrix, begin, true, kGathered * kTileBytes, queries_t + step * kTileBytes);
          PackStepOfTokens(dy_matrix, begin, true, kGathered * kTileBytes, dy_t + step * kTileBytes);
          MultiplyRow(PackedBlock(query, 0, steps), keys_t, blocks, steps, steps, scores);
          MultiplyRow(PackedBlock(dy, 0, steps), values_t, blocks, steps, steps, d_weights);
          ScoreGradients(head, h, begin, blocks, scores, d_weights, d_scores,
                         {gathered_weights + step * kTileBytes, gathered_d_scores + step * kTileBytes,
                          kGathered * kTileBytes});
          MultiplyRow(PackedBlock(d_scores, 0, blocks), keys, steps, key_blocks, blocks, d_query);
          StoreTokens(head.OfQueries(p.d_query, h), begin, d_query, nullptr);
        }
        const bool add = !first_head;
        AddOverQueries(queries_t, gathered_d_scores, steps, gathered, first_block, key_blocks, add, d_keys_t);
        AddOverQueries(dy_t, gathered_weights, steps, gathered, first_block, key_blocks, add, d_values_t);
      }
    }
    ReleaseTiles();
    StoreTransposed(head.OfKeys(p.d_key, p.seq), d_keys_t);
    StoreTransposed(head.OfKeys(p.d_value, p.seq), d_values_t);
  }

  static constexpr AttentionKernels kKernels = {ForwardBytes, BackwardBytes, Forward, Backward, kBlockSide};
};

}  // namespace qlora_jax::QLORA_JAX_ISA

#endif  // QLORA_JAX_CPU_AMX_ATTENTION_H_
