// Stress of the C interface, for the sanitizers: odd sizes, every instruction set, threads sharing
// one codebook, inputs that are not finite. Exits 0 when every index equals a plain fp64 search.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "focus_kernels.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, int64_t a, int64_t b) {
  if (condition) return;
  std::fprintf(stderr, "%s (%lld, %lld)\n", what, static_cast<long long>(a),
               static_cast<long long>(b));
  failures++;
}

std::vector<float> normal(size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& value : values) value = draw(engine);
  return values;
}

int64_t search(const std::vector<float>& codes, const float* x, int dim) {
  double least = std::numeric_limits<double>::infinity();
  int64_t winner = -1;
  for (size_t k = 0; k * dim < codes.size(); k++) {
    double sum = 0.0;
    for (int i = 0; i < dim; i++) {
      const double gap = static_cast<double>(x[i]) - codes[k * dim + i];
      sum += gap * gap;
    }
    if (sum < least) least = sum, winner = static_cast<int64_t>(k);
  }
  return winner;
}

void sizes() {
  for (int dim : {1, 3, 8, 32, 33})
    for (int64_t num_codes : {1, 15, 256, 700})
      for (int64_t num_tokens : {0, 1, 13, 100}) {
        const auto codes = normal(num_codes * dim, 1), x = normal(num_tokens * dim, 2);
        focus_codebook* book = focus_codebook_prepare(codes.data(), num_codes, dim);
        expect(book != nullptr, "prepare failed", num_codes, dim);
        std::vector<int64_t> index(num_tokens);
        std::vector<float> distance(num_tokens);
        for (int isa = FOCUS_ISA_AUTO; isa <= focus_best_isa(); isa++) {
          const int status = focus_codebook_lookup(book, x.data(), num_tokens, index.data(),
                                                   distance.data(), 2, isa);
          expect(status == FOCUS_OK, "lookup failed", status, isa);
          for (int64_t n = 0; n < num_tokens; n++)
            expect(index[n] == search(codes, x.data() + n * dim, dim), "wrong index", n, isa);
        }
        focus_codebook_free(book);
      }
}

void threads() {
  const int dim = 32;
  const int64_t num_codes = 900, num_tokens = 70;
  const auto codes = normal(num_codes * dim, 3), x = normal(num_tokens * dim, 4);
  focus_codebook* book = focus_codebook_prepare(codes.data(), num_codes, dim);
  std::vector<int64_t> truth(num_tokens);
  for (int64_t n = 0; n < num_tokens; n++) truth[n] = search(codes, x.data() + n * dim, dim);
  std::vector<std::vector<int64_t>> found(4, std::vector<int64_t>(num_tokens));
  std::vector<std::thread> workers;
  for (auto& index : found)
    workers.emplace_back([&] {
      std::vector<float> distance(num_tokens);
      for (int turn = 0; turn < 5; turn++)
        focus_codebook_lookup(book, x.data(), num_tokens, index.data(), distance.data(), 3, 0);
    });
  for (auto& worker : workers) worker.join();
  for (const auto& index : found) expect(index == truth, "threads disagree", 0, 0);
  focus_codebook_free(book);
}

void refusals() {
  const float bad[2] = {1.0f, std::numeric_limits<float>::quiet_NaN()};
  int64_t index = 7;
  float distance = 0.0f;
  expect(focus_codebook_prepare(nullptr, 1, 1) == nullptr, "null codes taken", 0, 0);
  expect(focus_codebook_prepare(bad, 0, 1) == nullptr, "no codes taken", 0, 0);
  focus_codebook* book = focus_codebook_prepare(bad, 2, 1);
  expect(focus_codebook_lookup(book, bad, 1, &index, &distance, 1, 0) == FOCUS_OK, "status", 0, 0);
  expect(index == -1 && std::isnan(distance), "NaN code gave an index", index, 0);
  expect(focus_codebook_lookup(book, bad, 1, &index, &distance, 1, 9) == FOCUS_BAD_ARGUMENT,
         "unknown instruction set taken", 0, 0);
  expect(focus_codebook_lookup(nullptr, bad, 1, &index, &distance, 1, 0) == FOCUS_BAD_ARGUMENT,
         "null book taken", 0, 0);
  focus_codebook_free(book);
  focus_codebook_free(nullptr);
}

}  // namespace

int main() {
  sizes();
  threads();
  refusals();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
