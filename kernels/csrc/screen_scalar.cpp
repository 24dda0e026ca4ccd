// Portable screen, and the fallback of every machine.
#include <algorithm>
#include <limits>

#include "codebook.h"

namespace focus {
namespace {

float scores(const Codebook& book, const float* token, int64_t group, float* out) {
  const float* block = book.block.get() + group * kGroup * book.dim;
  const float* bias = book.bias.get() + group * kGroup;
  const float* first = out;
  for (int b = 0; b < kGroup / kLane; b++, block += book.dim * kLane, bias += kLane, out += kLane) {
    float sum[kLane];
    for (int l = 0; l < kLane; l++) sum[l] = bias[l];
    for (int i = 0; i < book.dim; i++)
      for (int l = 0; l < kLane; l++) sum[l] += token[i] * block[i * kLane + l];
    for (int l = 0; l < kLane; l++) out[l] = sum[l];
  }
  return *std::max_element(first, first + kGroup);
}

void screen(const Codebook& book, const Tokens& tokens, int64_t first, int64_t last,
            int64_t group_first, int64_t group_last, float* upper) {
  float group[kGroup];
  for (int64_t g = group_first; g < group_last; g++)
    for (int64_t t = first; t < last; t++) {
      upper[t * book.num_groups + g] =
          scores(book, tokens.centred.get() + t * book.dim, g, group);
    }
}

int candidates(const Codebook& book, const Tokens& tokens, int64_t token, int64_t group,
               float least, int32_t* out) {
  float score[kGroup];
  scores(book, tokens.centred.get() + token * book.dim, group, score);
  return keep(book, group, score, least, out);
}

}  // namespace

float greatest_bound(const float* upper, const float* bias, int64_t count) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < count; g++) top = std::max(top, bias ? upper[g] + bias[g] : upper[g]);
  return top;
}

int reaching_bounds(const float* upper, const float* bias, int64_t count, float least,
                    int32_t* out) {
  int found = 0;
  for (int64_t g = 0; g < count; g++)
    if ((bias ? upper[g] + bias[g] : upper[g]) >= least) out[found++] = static_cast<int32_t>(g);
  return found;
}

const Backend& scalar_backend() {
  static const Backend backend{screen, candidates, false, greatest_bound, reaching_bounds};
  return backend;
}

}  // namespace focus
