// Prepared codebook and the screens that the instruction sets provide.
//
// Notation: x' = s (x - mu), c' = s (c - mu) with mu the mean code and s a power of two, so that
// distances keep their order. score(x, c) = x'.c' - |c'|^2 / 2, and the nearest code has the
// greatest score. Codes are sorted by norm and cut into groups of kGroup.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace focus {

constexpr int kGroup = 256;  // codes of one screening group
constexpr int kLane = 16;    // codes of one register block

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// Returns 64-byte aligned memory for `count` values, or null.
template <class T>
Buffer<T> allocate(size_t count) {
  const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

struct Codebook {
  int64_t num_codes = 0;
  int64_t num_groups = 0;
  int dim = 0;
  int quads = 0;          // ceil(dim / 4)
  bool finite = true;
  float scale = 1.0f;     // s
  double max_norm = 0.0;  // max |c'|
  Buffer<float> raw;      // [K, d] as given: the fp64 decision reads these
  Buffer<float> mean;     // [d]
  Buffer<float> block;    // [Kp / 16, d, 16] c', sorted
  Buffer<float> bias;     // [Kp] -|c'|^2 / 2, padding very negative
  Buffer<int32_t> order;  // [Kp] original index, padding -1
  // int8 screen: v = c' / t per dimension, q = round(127 v) + 128
  Buffer<uint8_t> quantised;  // [Kp / 16, quads, 16, 4]
  Buffer<float> unit;         // [4 quads] t
  Buffer<float> bias_high;    // [G] greatest bias of the group
  Buffer<float> bias_low;     // [G] least bias of the group
  double max_v = 0.0;         // max |v|
  double max_residue = 0.0;   // max |v - (q - 128) / 127|
  int64_t bytes = 0;
};

// Tokens of one batch, centred and scaled, with what every screen needs to know about them.
struct Tokens {
  int64_t count = 0;
  Buffer<float> centred;      // [n, d] x'
  Buffer<int8_t> quantised;   // [n, 4 quads]
  Buffer<float> step;         // [n] real score of one integer step
  Buffer<float> margin;       // [n] bound of |screen score - exact score|
  Buffer<float> fine_margin;  // [n] the same for a fp32 score
  Buffer<double> square;      // [n] |x'|^2
  Buffer<int32_t> offset;     // [n] -128 * sum of the quantised token
  Buffer<uint8_t> state;      // [n] kScreen, kScan or kBad
};
enum : uint8_t { kScreen = 0, kScan = 1, kBad = 2 };

// One instruction set: upper bounds per (token, group), and the codes of a group that reach a score.
struct Backend {
  // upper[t * G + g] = greatest screen score of group g, without margin; where `quantised` also
  // without the group's bias.
  void (*screen)(const Codebook&, const Tokens&, int64_t first, int64_t last, int64_t group_first,
                 int64_t group_last, float* upper);
  // Writes the original indices of the group's codes whose screen score, bias included, is at least
  // `least`; returns their number. `out` holds kGroup + kLane.
  int (*candidates)(const Codebook&, const Tokens&, int64_t token, int64_t group, float least,
                    int32_t* out);
  bool quantised;
  // The greatest of a token's bounds [count], `bias` (may be null) added.
  float (*greatest)(const float* upper, const float* bias, int64_t count);
  // Writes the numbers of the bounds that are at least `least`; returns how many. `out` holds count.
  int (*reaching)(const float* upper, const float* bias, int64_t count, float least, int32_t* out);
};

// Keeps the codes of a scored group that reach `least`, for the screens in floating point.
static inline int keep(const Codebook& book, int64_t group, const float* score, float least,
                int32_t* out) {
  int count = 0;
  for (int j = 0; j < kGroup; j++)
    if (score[j] >= least) out[count++] = book.order[group * kGroup + j];
  return count;
}

// Searches without an instruction set of their own; defined once, in the file for any processor: of
// an inline function the linker might keep the copy of a file that was compiled for more.
float greatest_bound(const float* upper, const float* bias, int64_t count);
int reaching_bounds(const float* upper, const float* bias, int64_t count, float least,
                    int32_t* out);

const Backend& scalar_backend();
#if defined(__x86_64__) || defined(_M_X64)
const Backend& avx2_backend();
const Backend& avx512_backend();
const Backend& vnni_backend();
#endif

}  // namespace focus
