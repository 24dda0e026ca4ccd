// AVX2 + FMA: 6 tokens x 16 codes of fp32 in registers. Compiled with -mavx2 -mfma, called only
// where the processor has them.
#include "codebook.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <algorithm>

namespace focus {
namespace {

constexpr int kTokens = 6;

inline float reduce_max(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

void screen(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
            int64_t group_first, int64_t group_last, float* upper) {
  const int dim = book.dim;
  for (int64_t g = group_first; g < group_last; g++)
    for (int64_t t0 = first; t0 < last; t0 += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, last - t0));
      const float* x[kTokens];
      __m256 best[kTokens];
      for (int t = 0; t < kTokens; t++) {
        x[t] = tokens.centred.get() + (t0 + std::min(t, count - 1)) * dim;
        best[t] = _mm256_set1_ps(-3e38f);
      }
      for (int64_t c = g * kGroup; c < (g + 1) * kGroup; c += kLane) {
        const float* block = book.block.get() + c * dim;
        const __m256 b0 = _mm256_load_ps(book.bias.get() + c);
        const __m256 b1 = _mm256_load_ps(book.bias.get() + c + 8);
        __m256 lo[kTokens], hi[kTokens];
        for (int t = 0; t < kTokens; t++) lo[t] = b0, hi[t] = b1;
        for (int i = 0; i < dim; i++) {
          const __m256 w0 = _mm256_load_ps(block + i * kLane);
          const __m256 w1 = _mm256_load_ps(block + i * kLane + 8);
          for (int t = 0; t < kTokens; t++) {
            const __m256 v = _mm256_broadcast_ss(x[t] + i);
            lo[t] = _mm256_fmadd_ps(v, w0, lo[t]);
            hi[t] = _mm256_fmadd_ps(v, w1, hi[t]);
          }
        }
        for (int t = 0; t < kTokens; t++)
          best[t] = _mm256_max_ps(best[t], _mm256_max_ps(lo[t], hi[t]));
      }
      for (int t = 0; t < count; t++) upper[(t0 + t) * book.num_groups + g] = reduce_max(best[t]);
    }
}

int candidates(const Codebook& book, const Tokens& tokens, int64_t token, int64_t group,
               float least, int32_t* out) {
  const int dim = book.dim;
  const float* x = tokens.centred.get() + token * dim;
  float score[kGroup];
  for (int j = 0; j < kGroup; j += kLane) {
    const int64_t c = group * kGroup + j;
    const float* block = book.block.get() + c * dim;
    __m256 lo = _mm256_load_ps(book.bias.get() + c), hi = _mm256_load_ps(book.bias.get() + c + 8);
    for (int i = 0; i < dim; i++) {
      const __m256 v = _mm256_broadcast_ss(x + i);
      lo = _mm256_fmadd_ps(v, _mm256_load_ps(block + i * kLane), lo);
      hi = _mm256_fmadd_ps(v, _mm256_load_ps(block + i * kLane + 8), hi);
    }
    _mm256_storeu_ps(score + j, lo);
    _mm256_storeu_ps(score + j + 8, hi);
  }
  return keep(book, group, score, least, out);
}

}  // namespace

const Backend& avx2_backend() {
  static const Backend backend{screen, candidates, false, greatest_bound, reaching_bounds};
  return backend;
}

}  // namespace focus
#endif
