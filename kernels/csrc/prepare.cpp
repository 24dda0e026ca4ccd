// Preparation: centre, scale, sort by norm, block for the registers, quantise.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

#include "codebook.h"
#include "focus_kernels.h"

struct focus_codebook : focus::Codebook {};

namespace focus {
namespace {

bool reserve(Codebook& book) {
  const int64_t padded = book.num_groups * kGroup;
  const int64_t wide = padded * book.quads * 4;
  book.raw = allocate<float>(book.num_codes * book.dim);
  book.mean = allocate<float>(book.dim);
  book.block = allocate<float>(padded * book.dim);
  book.bias = allocate<float>(padded);
  book.order = allocate<int32_t>(padded);
  book.quantised = allocate<uint8_t>(wide);
  book.unit = allocate<float>(book.quads * 4);
  book.bias_high = allocate<float>(book.num_groups);
  book.bias_low = allocate<float>(book.num_groups);
  book.bytes = 4 * (book.num_codes * book.dim + padded * (book.dim + 2)) + wide;
  return book.raw && book.mean && book.block && book.bias && book.order && book.quantised &&
         book.unit && book.bias_high && book.bias_low;
}

// Fills mean and scale; the scale brings the largest centred entry to about one.
void centre(Codebook& book) {
  std::vector<double> mean(book.dim, 0.0);
  for (int64_t k = 0; k < book.num_codes; k++)
    for (int i = 0; i < book.dim; i++) mean[i] += book.raw[k * book.dim + i];
  for (int i = 0; i < book.dim; i++) book.mean[i] = static_cast<float>(mean[i] / book.num_codes);
  double largest = 0.0;
  for (int64_t k = 0; k < book.num_codes; k++)
    for (int i = 0; i < book.dim; i++)
      largest = std::max(largest, std::fabs(static_cast<double>(book.raw[k * book.dim + i]) -
                                            book.mean[i]));
  const int exponent = largest > 0.0 ? -std::ilogb(largest) : 0;
  book.scale = std::ldexp(1.0f, std::clamp(exponent, -126, 126));
}

// Returns the centred, scaled codes [K, d] and their squared norms.
void transform(const Codebook& book, std::vector<float>& codes, std::vector<double>& square) {
  codes.resize(book.num_codes * book.dim);
  square.assign(book.num_codes, 0.0);
  for (int64_t k = 0; k < book.num_codes; k++)
    for (int i = 0; i < book.dim; i++) {
      const double wide = static_cast<double>(book.raw[k * book.dim + i]) - book.mean[i];
      const float value = static_cast<float>(wide * book.scale);
      codes[k * book.dim + i] = value;
      square[k] += static_cast<double>(value) * value;
    }
}

void block(Codebook& book, const std::vector<float>& codes, const std::vector<double>& square,
           const std::vector<int32_t>& order) {
  const int64_t padded = book.num_groups * kGroup;
  for (int64_t j = 0; j < padded; j++) {
    const bool real = j < book.num_codes;
    book.order[j] = real ? order[j] : -1;
    book.bias[j] = real ? static_cast<float>(-0.5 * square[order[j]]) : -1e30f;
    float* to = book.block.get() + (j / kLane) * book.dim * kLane + j % kLane;
    for (int i = 0; i < book.dim; i++)
      to[i * kLane] = real ? codes[static_cast<int64_t>(order[j]) * book.dim + i] : 0.0f;
  }
  book.max_norm = std::sqrt(*std::max_element(square.begin(), square.end()));
  for (int64_t g = 0; g < book.num_groups; g++) {
    const int64_t last = std::min((g + 1) * kGroup, book.num_codes) - 1;
    book.bias_high[g] = book.bias[g * kGroup];
    book.bias_low[g] = book.bias[last];
  }
}

void quantise(Codebook& book, const std::vector<float>& codes, const std::vector<int32_t>& order) {
  std::vector<float> inverse(book.dim);
  for (int i = 0; i < book.quads * 4; i++) book.unit[i] = 0.0f;
  for (int i = 0; i < book.dim; i++) {
    float largest = 0.0f;
    for (int64_t k = 0; k < book.num_codes; k++)
      largest = std::max(largest, std::fabs(codes[k * book.dim + i]));
    book.unit[i] = largest > 1e-30f ? largest : 1.0f;
    inverse[i] = 1.0f / book.unit[i];
  }
  double max_v = 0.0, max_residue = 0.0;
  const int64_t padded = book.num_groups * kGroup;
  std::fill_n(book.quantised.get(), padded * book.quads * 4, static_cast<uint8_t>(128));
  for (int64_t j = 0; j < padded; j++) {
    // padding repeats the last real code: it can never beat it, so the bound stays valid
    const int64_t code = order[std::min(j, book.num_codes - 1)];
    uint8_t* to = book.quantised.get() + (j / kLane) * book.quads * 64 + (j % kLane) * 4;
    double v_square = 0.0, residue = 0.0;
    for (int i = 0; i < book.dim; i++) {
      const float v = codes[code * book.dim + i] * inverse[i];
      const int q = std::clamp(static_cast<int>(std::lrint(v * 127.0f)), -127, 127);
      to[(i / 4) * 64 + i % 4] = static_cast<uint8_t>(q + 128);
      const double exact = static_cast<double>(codes[code * book.dim + i]) / book.unit[i];
      v_square += exact * exact;
      residue += (exact - q / 127.0) * (exact - q / 127.0);
    }
    max_v = std::max(max_v, v_square);
    max_residue = std::max(max_residue, residue);
  }
  book.max_v = std::sqrt(max_v);
  book.max_residue = std::sqrt(max_residue);
}

void build(Codebook& book) {
  centre(book);
  std::vector<float> codes;
  std::vector<double> square;
  transform(book, codes, square);
  std::vector<int32_t> order(book.num_codes);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return square[a] < square[b] || (square[a] == square[b] && a < b);
  });
  block(book, codes, square, order);
  quantise(book, codes, order);
}

}  // namespace
}  // namespace focus

extern "C" focus_codebook* focus_codebook_prepare(const float* codes, int64_t num_codes,
                                                  int32_t dim) {
  if (!codes || num_codes < 1 || dim < 1 || num_codes > std::numeric_limits<int32_t>::max() - 512)
    return nullptr;
  try {
    auto book = std::make_unique<focus_codebook>();
    book->num_codes = num_codes;
    book->dim = dim;
    book->quads = (dim + 3) / 4;
    book->num_groups = (num_codes + focus::kGroup - 1) / focus::kGroup;
    if (!focus::reserve(*book)) return nullptr;
    std::copy_n(codes, num_codes * dim, book->raw.get());
    for (int64_t i = 0; i < num_codes * dim; i++) book->finite &= std::isfinite(codes[i]) != 0;
    if (book->finite) focus::build(*book);
    return book.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

extern "C" void focus_codebook_free(focus_codebook* book) { delete book; }

extern "C" int64_t focus_codebook_bytes(const focus_codebook* book) {
  return book ? book->bytes : 0;
}
