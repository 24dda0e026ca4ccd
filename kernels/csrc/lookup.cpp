// Lookup: screen every group, keep those that may hold the winner, decide in fp64.
//
// Bounds, with u = 2^-24 the fp32 rounding unit and d the width:
//   fp32 score:  |computed - exact| <= (d + 8) 2u (|x'| |c'| + |c'|^2), which also covers the
//                rounding of x' and c' themselves (their effect is x'.dc + c'.dx + c'.dc);
//                plus (d + 8) 4u^2 (|x'| + |c'|)^2, the rounding of the fp64 distance itself, so that
//                codes which tie in fp64 all reach the decision;
//   int8 score:  |x'.c' - u.v| = |u.v - uq.vq| <= |u - uq| |v| + |uq| |v - vq|, u = x' t, v = c' / t.
// A group survives when upper + margin reaches the exact best so far; so does a code of such a group,
// by its own screen score, and only survivors are measured in fp64.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "codebook.h"
#include "focus_kernels.h"

struct focus_codebook : focus::Codebook {};

namespace focus {
namespace {

constexpr int64_t kBoundsBytes = 6 << 20;  // bounds of one batch
constexpr int64_t kTokensPerTask = 96;

bool reserve(Tokens& tokens, const Codebook& book, int64_t count) {
  tokens.centred = allocate<float>(count * book.dim);
  tokens.quantised = allocate<int8_t>(count * book.quads * 4);
  tokens.step = allocate<float>(count);
  tokens.margin = allocate<float>(count);
  tokens.fine_margin = allocate<float>(count);
  tokens.square = allocate<double>(count);
  tokens.offset = allocate<int32_t>(count);
  tokens.state = allocate<uint8_t>(count);
  return tokens.centred && tokens.quantised && tokens.step && tokens.margin &&
         tokens.fine_margin && tokens.square && tokens.offset && tokens.state;
}

void prepare_token(const Codebook& book, Tokens& tokens, int64_t t, const float* x,
                   bool quantised) {
  const int dim = book.dim, wide = book.quads * 4;
  float* centred = tokens.centred.get() + t * dim;
  int8_t* q = tokens.quantised.get() + t * wide;
  bool finite = true;
  double square = 0.0;
  float largest = 0.0f;
  for (int i = 0; i < dim; i++) {
    finite &= std::isfinite(x[i]) != 0;
    const double value = (static_cast<double>(x[i]) - book.mean[i]) * book.scale;
    centred[i] = static_cast<float>(value);
    square += value * value;
    largest = std::max(largest, std::fabs(centred[i] * book.unit[i]));
  }
  const double norm = std::sqrt(square);
  tokens.state[t] = !finite ? kBad : norm < 1e15 ? kScreen : kScan;
  if (tokens.state[t] != kScreen) std::fill_n(centred, dim, 0.0f), largest = 0.0f;
  const double both = norm + book.max_norm;
  const double fine = (dim + 8) * (std::ldexp(1.0, -23) * both * book.max_norm +
                                   std::ldexp(1.0, -52) * both * both);
  tokens.square[t] = square;
  tokens.fine_margin[t] = static_cast<float>(fine * 1.0001 + 1e-37);
  tokens.margin[t] = tokens.fine_margin[t];
  if (!quantised) return;
  const float up = largest > 1e-30f ? 127.0f / largest : 0.0f;
  const double down = up > 0.0f ? 1.0 / up : 0.0;
  double lost = 0.0, kept = 0.0;
  int sum = 0;
  std::fill_n(q, wide, static_cast<int8_t>(0));
  for (int i = 0; i < dim; i++) {
    const double u = static_cast<double>(centred[i]) * book.unit[i];
    const int value = std::clamp(static_cast<int>(std::lrint(u * up)), -127, 127);
    q[i] = static_cast<int8_t>(value);
    sum += value;
    lost += (u - value * down) * (u - value * down);
    kept += (value * down) * (value * down);
  }
  tokens.offset[t] = -128 * sum;
  tokens.step[t] = static_cast<float>(down / 127.0);
  const double coarse = std::sqrt(lost) * book.max_v + std::sqrt(kept) * book.max_residue;
  tokens.margin[t] = static_cast<float>((coarse + fine) * 1.0001 + 1e-37);
}

double exact_distance(const Codebook& book, const float* x, int64_t code) {
  const float* c = book.raw.get() + code * book.dim;
  double sum = 0.0;
  for (int i = 0; i < book.dim; i++) {
    const double difference = static_cast<double>(x[i]) - c[i];
    sum += difference * difference;
  }
  return sum;
}

struct Best {
  double distance = std::numeric_limits<double>::infinity();
  int64_t code = std::numeric_limits<int64_t>::max();
  void offer(double d, int64_t c) {
    if (d < distance || (d == distance && c < code)) distance = d, code = c;
  }
};

// The group with the greatest bound; `bias` may be null. Lanes keep the compiler's vectors full.
int64_t argmax(const float* upper, const float* bias, int64_t count) {
  float best[kLane];
  std::fill_n(best, kLane, -std::numeric_limits<float>::infinity());
  int64_t g = 0;
  for (; g + kLane <= count; g += kLane)
    for (int l = 0; l < kLane; l++) {
      const float value = bias ? upper[g + l] + bias[g + l] : upper[g + l];
      best[l] = value > best[l] ? value : best[l];
    }
  float top = *std::max_element(best, best + kLane);
  for (; g < count; g++) top = std::max(top, upper[g] + (bias ? bias[g] : 0.0f));
  for (g = 0; g < count; g++)
    if (upper[g] + (bias ? bias[g] : 0.0f) >= top) return g;
  return 0;
}

// Screens the codes of the surviving groups and measures those that survive in fp64.
Best decide(const Codebook& book, const Backend& backend, const Tokens& tokens, int64_t t,
            const float* x, const float* upper) {
  Best best;
  if (tokens.state[t] == kScan) {
    for (int64_t k = 0; k < book.num_codes; k++) best.offer(exact_distance(book, x, k), k);
    return best;
  }
  const float* high = backend.quantised ? book.bias_high.get() : nullptr;
  const double slack = static_cast<double>(tokens.margin[t]) + tokens.fine_margin[t];
  const double squared_scale = static_cast<double>(book.scale) * book.scale;
  int32_t found[kGroup + kLane];
  auto measure = [&](int64_t group, double least) {
    const int count = backend.candidates(book, tokens, t, group, static_cast<float>(least), found);
    for (int i = 0; i < count; i++)
      if (found[i] >= 0) best.offer(exact_distance(book, x, found[i]), found[i]);
  };
  // The most promising group first: what it holds bounds all others from below. Its own best is at
  // least upper + its least bias, so that nothing below that by two margins can win.
  const int64_t promising = argmax(upper, high, book.num_groups);
  const double floor = upper[promising] + (high ? book.bias_low[promising] : 0.0);
  measure(promising, floor - 2.0 * slack);
  // |x' - c'|^2 = |x'|^2 - 2 score
  auto top = [&] { return 0.5 * (tokens.square[t] - squared_scale * best.distance); };
  float least = static_cast<float>(top() - slack);
  for (int64_t g = 0; g < book.num_groups; g++) {
    if (upper[g] + (high ? high[g] : 0.0f) < least || g == promising) continue;
    measure(g, least);
    least = static_cast<float>(top() - slack);
  }
  return best;
}

// Runs task(0..count) on the calling thread and num_threads - 1 more.
void parallel(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  };
  std::vector<std::thread> threads;
  const int64_t extra = std::min<int64_t>(num_threads, count) - 1;
  for (int64_t i = 0; i < extra; i++) {
    try {
      threads.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // fewer threads, same result
    }
  }
  work();
  for (auto& thread : threads) thread.join();
}

void run_batch(const Codebook& book, const Backend& backend, Tokens& tokens, const float* x,
               int64_t count, float* upper, int64_t* index, float* distance, int num_threads) {
  const int64_t tasks = (count + kTokensPerTask - 1) / kTokensPerTask;
  const int64_t wanted = 2 * static_cast<int64_t>(num_threads);
  const int64_t splits = std::clamp<int64_t>((wanted + tasks - 1) / tasks, 1, book.num_groups);
  const int64_t span = (book.num_groups + splits - 1) / splits;
  auto token_range = [&](int64_t task) {
    return std::pair(task * kTokensPerTask, std::min(count, (task + 1) * kTokensPerTask));
  };
  parallel(tasks, num_threads, [&](int64_t task) {
    const auto [first, last] = token_range(task);
    for (int64_t t = first; t < last; t++)
      prepare_token(book, tokens, t, x + t * book.dim, backend.quantised);
  });
  parallel(tasks * splits, num_threads, [&](int64_t task) {
    const auto [first, last] = token_range(task % tasks);
    const int64_t from = task / tasks * span;
    const int64_t to = std::min(book.num_groups, from + span);
    if (from < to) backend.screen(book, tokens, first, last, from, to, upper);
  });
  parallel(tasks, num_threads, [&](int64_t task) {
    const auto [first, last] = token_range(task);
    for (int64_t t = first; t < last; t++) {
      const bool bad = tokens.state[t] == kBad;
      const Best best = bad ? Best{}
                            : decide(book, backend, tokens, t, x + t * book.dim,
                                     upper + t * book.num_groups);
      index[t] = bad ? -1 : best.code;
      distance[t] = bad ? std::numeric_limits<float>::quiet_NaN()
                        : static_cast<float>(best.distance);
    }
  });
}

const Backend* backend_of(int isa) {
  switch (isa) {
    case FOCUS_ISA_SCALAR: return &scalar_backend();
#if defined(__x86_64__) || defined(_M_X64)
    case FOCUS_ISA_AVX2: return &avx2_backend();
    case FOCUS_ISA_AVX512: return &avx512_backend();
    case FOCUS_ISA_VNNI: return &vnni_backend();
#endif
    default: return nullptr;
  }
}

}  // namespace
}  // namespace focus

extern "C" int focus_abi_version(void) { return FOCUS_ABI_VERSION; }

extern "C" int focus_best_isa(void) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512vnni") ? FOCUS_ISA_VNNI : FOCUS_ISA_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FOCUS_ISA_AVX2;
#endif
  return FOCUS_ISA_SCALAR;
}

extern "C" int focus_codebook_lookup(const focus_codebook* book, const float* tokens,
                                     int64_t num_tokens, int64_t* index, float* distance,
                                     int num_threads, int isa) {
  if (!book || num_tokens < 0 || (num_tokens > 0 && (!tokens || !index || !distance)))
    return FOCUS_BAD_ARGUMENT;
  const int best = focus_best_isa();
  const int chosen = isa == FOCUS_ISA_AUTO ? best : isa;
  const focus::Backend* backend = focus::backend_of(chosen);
  if (!backend) return FOCUS_BAD_ARGUMENT;
  if (chosen > best) return FOCUS_ISA_MISSING;
  if (!book->finite) {
    std::fill_n(index, num_tokens, int64_t{-1});
    std::fill_n(distance, num_tokens, std::numeric_limits<float>::quiet_NaN());
    return FOCUS_OK;
  }
  try {
    const int64_t row = book->num_groups * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::max<int64_t>(focus::kTokensPerTask, focus::kBoundsBytes / row);
    const int64_t batch = std::max<int64_t>(1, std::min({num_tokens, most, int64_t{8192}}));
    auto upper = focus::allocate<float>(batch * book->num_groups);
    focus::Tokens work;
    if (!upper || !focus::reserve(work, *book, batch)) return FOCUS_NO_MEMORY;
    for (int64_t start = 0; start < num_tokens; start += batch)
      focus::run_batch(*book, *backend, work, tokens + start * book->dim,
                       std::min(batch, num_tokens - start), upper.get(), index + start,
                       distance + start, std::max(1, num_threads));
    return FOCUS_OK;
  } catch (const std::bad_alloc&) {
    return FOCUS_NO_MEMORY;
  }
}
