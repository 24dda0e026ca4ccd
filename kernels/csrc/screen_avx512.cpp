// AVX-512: 12 tokens x 32 codes of fp32 in registers; and the int8 screen on VNNI, 6 tokens x 64
// codes in registers, so that the multiplier and not the loads is what it waits for. Compiled with
// the AVX-512 flags, called only where they exist.
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

// Appends the lanes of `score` that reach `least`; writes up to kLane values.
inline int append(__m512 score, __m512 least, const int32_t* order, int32_t* out) {
  const __mmask16 reach = _mm512_cmp_ps_mask(score, least, _CMP_GE_OQ);
  if (!reach) return 0;
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(reach, _mm512_load_si512(order)));
  return __builtin_popcount(reach);
}

int candidates_float(const Codebook& book, const Tokens& tokens, int64_t token, int64_t group,
                     float least, int32_t* out) {
  const int dim = book.dim;
  const float* x = tokens.centred.get() + token * dim;
  const __m512 bound = _mm512_set1_ps(least);
  int count = 0;
  for (int64_t c = group * kGroup; c < (group + 1) * kGroup; c += 4 * kLane) {
    const float* block = book.block.get() + c * dim;
    __m512 sum[4];
    for (int b = 0; b < 4; b++) sum[b] = _mm512_load_ps(book.bias.get() + c + b * kLane);
    for (int i = 0; i < dim; i++) {
      const __m512 v = _mm512_set1_ps(x[i]);
      for (int b = 0; b < 4; b++)
        sum[b] = _mm512_fmadd_ps(v, _mm512_load_ps(block + (b * dim + i) * kLane), sum[b]);
    }
    for (int b = 0; b < 4; b++)
      count += append(sum[b], bound, book.order.get() + c + b * kLane, out + count);
  }
  return count;
}

// Up to kLane bounds from `g` on, the rest below everything.
inline __m512 bounds(const float* upper, const float* bias, int64_t g, int64_t count) {
  const int64_t left = count - g;
  const __mmask16 some = left < kLane ? static_cast<__mmask16>((1 << left) - 1) : 0xffff;
  const __m512 none = _mm512_set1_ps(-3e38f);
  const __m512 value = _mm512_mask_loadu_ps(none, some, upper + g);
  if (!bias) return value;
  return _mm512_mask_add_ps(value, some, value, _mm512_maskz_loadu_ps(some, bias + g));
}

float greatest(const float* upper, const float* bias, int64_t count) {
  __m512 top = _mm512_set1_ps(-3e38f);
  for (int64_t g = 0; g < count; g += kLane)
    top = _mm512_max_ps(top, bounds(upper, bias, g, count));
  return _mm512_reduce_max_ps(top);
}

int reaching(const float* upper, const float* bias, int64_t count, float least, int32_t* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int found = 0;
  for (int64_t g = 0; g < count; g += kLane) {
    const __mmask16 reach = _mm512_cmp_ps_mask(bounds(upper, bias, g, count),
                                               _mm512_set1_ps(least), _CMP_GE_OQ);
    if (!reach) continue;
    const __m512i number = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(g)));
    _mm512_mask_compressstoreu_epi32(out + found, reach, number);
    found += __builtin_popcount(reach);
  }
  return found;
}

#define FOCUS_INLINE inline __attribute__((always_inline))

// Integer scores of one token and 64 codes. Named members and not an array: compilers keep these in
// registers, of an array they write every step to memory.
struct Scores {
  __m512i a, b, c, d;
};

FOCUS_INLINE Scores zero() {
  const __m512i none = _mm512_setzero_si512();
  return {none, none, none, none};
}

// Four dimensions of 64 codes, blocks `stride` bytes apart.
FOCUS_INLINE Scores load(const uint8_t* from, int stride) {
  return {_mm512_load_si512(from), _mm512_load_si512(from + stride),
          _mm512_load_si512(from + 2 * stride), _mm512_load_si512(from + 3 * stride)};
}

// sum += codes (unsigned) . token (signed) per 32-bit lane. Written out because GCC 12 copies the
// accumulator of the intrinsic to the stack at every step, which halves the speed.
FOCUS_INLINE void accumulate(__m512i& sum, __m512i codes, __m512i token) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(token));
}

FOCUS_INLINE void multiply(Scores& sum, const Scores& codes, const int8_t* token) {
  int32_t word;
  std::memcpy(&word, token, 4);
  const __m512i v = _mm512_set1_epi32(word);
  accumulate(sum.a, codes.a, v);
  accumulate(sum.b, codes.b, v);
  accumulate(sum.c, codes.c, v);
  accumulate(sum.d, codes.d, v);
}

FOCUS_INLINE void raise(__m512i* best, const Scores& sum) {
  const __m512i most =
      _mm512_max_epi32(_mm512_max_epi32(sum.a, sum.b), _mm512_max_epi32(sum.c, sum.d));
  _mm512_store_si512(best, _mm512_max_epi32(_mm512_load_si512(best), most));
}

// QUADS > 0 fixes the width (d = 4 QUADS) so that the loop unrolls; 0 reads it from the book.
template <int QUADS>
void screen_int8(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
                 int64_t group_first, int64_t group_last, float* upper) {
  constexpr int kRows = 6;
  const int quads = QUADS > 0 ? QUADS : book.quads;
  for (int64_t g = group_first; g < group_last; g++)
    for (int64_t t0 = first; t0 < last; t0 += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, last - t0));
      const auto row = [&](int t) {
        return tokens.quantised.get() + (t0 + std::min(t, count - 1)) * quads * 4;
      };
      const int8_t *x0 = row(0), *x1 = row(1), *x2 = row(2), *x3 = row(3), *x4 = row(4),
                   *x5 = row(5);
      __m512i best[kRows];
      for (auto& value : best) value = _mm512_set1_epi32(-2147483647);
      const uint8_t* block = book.quantised.get() + g * kGroup * quads * 4;
      for (int b = 0; b < kGroup / kLane; b += 4, block += 4 * quads * 64) {
        Scores s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero(), s4 = zero(), s5 = zero();
#pragma GCC unroll 4
        for (int q = 0; q < quads; q++) {
          const Scores codes = load(block + q * 64, quads * 64);
          multiply(s0, codes, x0 + q * 4);
          multiply(s1, codes, x1 + q * 4);
          multiply(s2, codes, x2 + q * 4);
          multiply(s3, codes, x3 + q * 4);
          multiply(s4, codes, x4 + q * 4);
          multiply(s5, codes, x5 + q * 4);
        }
        raise(best + 0, s0), raise(best + 1, s1), raise(best + 2, s2);
        raise(best + 3, s3), raise(best + 4, s4), raise(best + 5, s5);
      }
      for (int t = 0; t < count; t++)
        upper[(t0 + t) * book.num_groups + g] =
            static_cast<float>(_mm512_reduce_max_epi32(best[t]) + tokens.offset[t0 + t]) *
            tokens.step[t0 + t];
    }
}

int candidates_int8(const Codebook& book, const Tokens& tokens, int64_t token, int64_t group,
                    float least, int32_t* out) {
  const int quads = book.quads;
  const int8_t* x = tokens.quantised.get() + token * quads * 4;
  const __m512i offset = _mm512_set1_epi32(tokens.offset[token]);
  const __m512 step = _mm512_set1_ps(tokens.step[token]), bound = _mm512_set1_ps(least);
  int count = 0;
  for (int64_t c = group * kGroup; c < (group + 1) * kGroup; c += 4 * kLane) {
    Scores sum = zero();
    const uint8_t* block = book.quantised.get() + c * quads * 4;
    for (int q = 0; q < quads; q++)
      multiply(sum, load(block + q * 64, quads * 64), x + q * 4);
    const auto finish = [&](__m512i value, int64_t at) {
      const __m512 score =
          _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(value, offset)), step);
      count += append(_mm512_add_ps(score, _mm512_load_ps(book.bias.get() + at)), bound,
                      book.order.get() + at, out + count);
    };
    finish(sum.a, c), finish(sum.b, c + kLane);
    finish(sum.c, c + 2 * kLane), finish(sum.d, c + 3 * kLane);
  }
  return count;
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
  static const Backend backend{screen_float, candidates_float, false, greatest, reaching};
  return backend;
}

const Backend& vnni_backend() {
  static const Backend backend{screen_quantised, candidates_int8, true, greatest, reaching};
  return backend;
}

}  // namespace focus
#endif
