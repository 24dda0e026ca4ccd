// AVX-512: 12 tokens x 32 codes of fp32 in registers; and the int8 screen on VNNI, 12 tokens x 16
// codes per instruction row. Compiled with the AVX-512 flags, called only where they exist.
#include "codebook.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace focus {
namespace {

constexpr int kTokens = 12;

void screen_float(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
                  int64_t group_first, int64_t group_last, float* upper) {
  const int dim = book.dim;
  for (int64_t g = group_first; g < group_last; g++)
    for (int64_t t0 = first; t0 < last; t0 += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, last - t0));
      const float* x[kTokens];
      for (int t = 0; t < kTokens; t++)
        x[t] = tokens.centred.get() + (t0 + std::min(t, count - 1)) * dim;
      alignas(64) float best[kTokens][kLane];
      for (auto& row : best) std::fill_n(row, kLane, -3e38f);
      for (int64_t c = g * kGroup; c < (g + 1) * kGroup; c += 2 * kLane) {
        const float* block = book.block.get() + c * dim;
        const __m512 b0 = _mm512_load_ps(book.bias.get() + c);
        const __m512 b1 = _mm512_load_ps(book.bias.get() + c + kLane);
        __m512 lo[kTokens], hi[kTokens];
        for (int t = 0; t < kTokens; t++) lo[t] = b0, hi[t] = b1;
        for (int i = 0; i < dim; i++) {
          const __m512 w0 = _mm512_load_ps(block + i * kLane);
          const __m512 w1 = _mm512_load_ps(block + (dim + i) * kLane);
          for (int t = 0; t < kTokens; t++) {
            const __m512 v = _mm512_set1_ps(x[t][i]);
            lo[t] = _mm512_fmadd_ps(v, w0, lo[t]);
            hi[t] = _mm512_fmadd_ps(v, w1, hi[t]);
          }
        }
        for (int t = 0; t < kTokens; t++)
          _mm512_store_ps(best[t], _mm512_max_ps(_mm512_load_ps(best[t]),
                                                 _mm512_max_ps(lo[t], hi[t])));
      }
      for (int t = 0; t < count; t++)
        upper[(t0 + t) * book.num_groups + g] = _mm512_reduce_max_ps(_mm512_load_ps(best[t]));
    }
}

float scores(const Codebook& book, const float* token, int64_t group, float* out) {
  const int dim = book.dim;
  __m512 best = _mm512_set1_ps(-3e38f);
  for (int64_t c = group * kGroup; c < (group + 1) * kGroup; c += 4 * kLane, out += 4 * kLane) {
    const float* block = book.block.get() + c * dim;
    const float* bias = book.bias.get() + c;
    __m512 sum[4];
    for (int b = 0; b < 4; b++) sum[b] = _mm512_load_ps(bias + b * kLane);
    for (int i = 0; i < dim; i++) {
      const __m512 v = _mm512_set1_ps(token[i]);
      for (int b = 0; b < 4; b++)
        sum[b] = _mm512_fmadd_ps(v, _mm512_load_ps(block + (b * dim + i) * kLane), sum[b]);
    }
    for (int b = 0; b < 4; b++) _mm512_storeu_ps(out + b * kLane, sum[b]);
    best = _mm512_max_ps(best, _mm512_max_ps(_mm512_max_ps(sum[0], sum[1]),
                                             _mm512_max_ps(sum[2], sum[3])));
  }
  return _mm512_reduce_max_ps(best);
}

// QUADS > 0 fixes the loop length (d = 4 QUADS) so that it unrolls; 0 reads it from the book.
template <int QUADS>
void screen_int8(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
                 int64_t group_first, int64_t group_last, float* upper) {
  const int quads = QUADS > 0 ? QUADS : book.quads;
  for (int64_t g = group_first; g < group_last; g++)
    for (int64_t t0 = first; t0 < last; t0 += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, last - t0));
      const int8_t* x[kTokens];
      __m512i best[kTokens];
      for (int t = 0; t < kTokens; t++) {
        x[t] = tokens.quantised.get() + (t0 + std::min(t, count - 1)) * quads * 4;
        best[t] = _mm512_set1_epi32(-2147483647);
      }
      const uint8_t* block = book.quantised.get() + g * kGroup * quads * 4;
      for (int b = 0; b < kGroup / kLane; b++, block += quads * 64) {
        __m512i sum[kTokens];
        for (int t = 0; t < kTokens; t++) sum[t] = _mm512_setzero_si512();
        for (int q = 0; q < quads; q++) {
          const __m512i w = _mm512_load_si512(block + q * 64);
          for (int t = 0; t < kTokens; t++) {
            int32_t word;
            std::memcpy(&word, x[t] + q * 4, 4);
            sum[t] = _mm512_dpbusd_epi32(sum[t], w, _mm512_set1_epi32(word));
          }
        }
        for (int t = 0; t < kTokens; t++) best[t] = _mm512_max_epi32(best[t], sum[t]);
      }
      for (int t = 0; t < count; t++)
        upper[(t0 + t) * book.num_groups + g] =
            static_cast<float>(_mm512_reduce_max_epi32(best[t]) + tokens.offset[t0 + t]) *
            tokens.step[t0 + t];
    }
}

void screen_quantised(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
                      int64_t group_first, int64_t group_last, float* upper) {
  switch (book.quads) {
    case 2: return screen_int8<2>(book, tokens, first, last, group_first, group_last, upper);
    case 4: return screen_int8<4>(book, tokens, first, last, group_first, group_last, upper);
    case 8: return screen_int8<8>(book, tokens, first, last, group_first, group_last, upper);
    case 16: return screen_int8<16>(book, tokens, first, last, group_first, group_last, upper);
    default: return screen_int8<0>(book, tokens, first, last, group_first, group_last, upper);
  }
}

}  // namespace

const Backend& avx512_backend() {
  static const Backend backend{screen_float, scores, false};
  return backend;
}

const Backend& vnni_backend() {
  static const Backend backend{screen_quantised, scores, true};
  return backend;
}

}  // namespace focus
#endif
