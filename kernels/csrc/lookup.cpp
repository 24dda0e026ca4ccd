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

constexpr int64_t kBoundsBytes = 3 << 20;  // bounds of one batch
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

// Starts loading a row.
inline void fetch(const float* row, int dim) {
#if defined(__GNUC__)
  for (int i = 0; i < dim; i += 16) __builtin_prefetch(row + i);
#else
  (void)row, (void)dim;
#endif
}

struct Best {
  double distance = std::numeric_limits<double>::infinity();
  int64_t code = std::numeric_limits<int64_t>::max();
  void offer(double d, int64_t c) {
    if (d < distance || (d == distance && c < code)) distance = d, code = c;
  }
};

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

// A group that may hold the nearest code of a token: its codes count from the score `least` on.
struct Visit {
  int32_t token;
  int32_t group;
  float least;
};

// One batch, from screened groups to nearest codes.
class Decision {
 public:
  Decision(const Codebook& book, const Backend& backend, const Tokens& tokens, const float* x,
           int64_t count, const float* upper, int num_threads)
      : book_(book), backend_(backend), tokens_(tokens), x_(x), upper_(upper),
        high_(backend.quantised ? book.bias_high.get() : nullptr), count_(count),
        tasks_((count + kTokensPerTask - 1) / kTokensPerTask), num_threads_(num_threads),
        best_(count), likely_(count), groups_(tasks_) {
    for (auto& part : groups_) part.resize(book.num_groups);
  }

  // The most promising group of every token first: what it holds bounds all others from below.
  const std::vector<Best>& run() {
    std::vector<std::vector<Visit>> found(tasks_);
    // All room beforehand: a thread that finds no memory could not say so.
    for (auto& part : found) part.reserve(kTokensPerTask * kMany);
    over_tokens([&](int64_t t, int64_t part) { promising(t, part, found[part]); });
    make(found);
    over_tokens([&](int64_t t, int64_t part) { survivors(t, part, found[part]); });
    make(found);
    return best_;
  }

 private:
  static constexpr int kMany = 16;         // groups of a token that are worth a list
  static constexpr int64_t kVisits = 256;  // of one task
  static constexpr int64_t kAhead = 8;     // visits whose rows are on their way at once

  // Runs task(token, number of its part), parts side by side.
  template <class Task>
  void over_tokens(const Task& task) const {
    parallel(tasks_, num_threads_, [&](int64_t part) {
      const int64_t last = std::min(count_, (part + 1) * kTokensPerTask);
      for (int64_t t = part * kTokensPerTask; t < last; t++) task(t, part);
    });
  }

  const float* row(int64_t t) const { return upper_ + t * book_.num_groups; }

  double slack(int64_t t) const {
    return static_cast<double>(tokens_.margin[t]) + tokens_.fine_margin[t];
  }

  // Score of the exact best so far, less what a screen score may be wrong by.
  float least(int64_t t) const {  // |x' - c'|^2 = |x'|^2 - 2 score
    const double squared = static_cast<double>(book_.scale) * book_.scale * best_[t].distance;
    return static_cast<float>(0.5 * (tokens_.square[t] - squared) - slack(t));
  }

  // Lists the group with the greatest bound. Its own best is at least upper + its least bias:
  // nothing below that by two margins can win.
  void promising(int64_t t, int64_t part, std::vector<Visit>& out) {
    if (tokens_.state[t] != kScreen) return;
    const float top = backend_.greatest(row(t), high_, book_.num_groups);
    int32_t* groups = groups_[part].data();
    backend_.reaching(row(t), high_, book_.num_groups, top, groups);
    const double floor = row(t)[groups[0]] + (high_ ? book_.bias_low[groups[0]] : 0.0);
    likely_[t] = groups[0];
    out.push_back({static_cast<int32_t>(t), groups[0], static_cast<float>(floor - 2 * slack(t))});
  }

  // Lists the other groups that may beat the exact best so far. A token with many is done at once,
  // the bound rising with every group.
  void survivors(int64_t t, int64_t part, std::vector<Visit>& out) {
    if (tokens_.state[t] == kScan)
      for (int64_t k = 0; k < book_.num_codes; k++)
        best_[t].offer(exact_distance(book_, x_ + t * book_.dim, k), k);
    if (tokens_.state[t] != kScreen) return;
    int32_t* groups = groups_[part].data();
    const float reach = least(t);
    const int count = backend_.reaching(row(t), high_, book_.num_groups, reach, groups);
    for (int i = 0; i < count; i++) {
      if (groups[i] == likely_[t]) continue;
      const Visit visit{static_cast<int32_t>(t), groups[i], count > kMany ? least(t) : reach};
      if (count <= kMany) {
        out.push_back(visit);
      } else if (row(t)[groups[i]] + (high_ ? high_[groups[i]] : 0.0f) >= visit.least) {
        int32_t codes[kGroup + kLane];
        measure(visit, codes, screen(visit, codes), best_[t]);
      }
    }
  }

  // Writes the codes of the group that survive; fetches their rows, which lie scattered in memory.
  int screen(const Visit& visit, int32_t* codes) const {
    const int count =
        backend_.candidates(book_, tokens_, visit.token, visit.group, visit.least, codes);
    for (int i = 0; i < count; i++)
      if (codes[i] >= 0) fetch(book_.raw.get() + int64_t{codes[i]} * book_.dim, book_.dim);
    return count;
  }

  void measure(const Visit& visit, const int32_t* codes, int count, Best& best) const {
    const float* x = x_ + int64_t{visit.token} * book_.dim;
    for (int i = 0; i < count; i++)
      if (codes[i] >= 0) best.offer(exact_distance(book_, x, codes[i]), codes[i]);
  }

  // Makes all visits and empties their lists. Group by group: a group's codes are read once for all
  // tokens that need them.
  void make(std::vector<std::vector<Visit>>& parts) {
    std::vector<int32_t> next(book_.num_groups + 1, 0);
    for (const auto& part : parts)
      for (const Visit& visit : part) next[visit.group + 1]++;
    for (size_t g = 1; g < next.size(); g++) next[g] += next[g - 1];
    std::vector<Visit> visits(next.back());
    for (auto& part : parts) {
      for (const Visit& visit : part) visits[next[visit.group]++] = visit;
      part.clear();
    }
    std::vector<Best> found(visits.size());
    const int64_t total = static_cast<int64_t>(visits.size());
    parallel((total + kVisits - 1) / kVisits, num_threads_, [&](int64_t part) {
      int32_t codes[kAhead][kGroup + kLane];
      int count[kAhead];
      const int64_t end = std::min(total, (part + 1) * kVisits);
      for (int64_t first = part * kVisits; first < end; first += kAhead) {
        const int64_t last = std::min(end, first + kAhead);
        for (int64_t i = first; i < last; i++)
          count[i - first] = screen(visits[i], codes[i - first]);
        for (int64_t i = first; i < last; i++)
          measure(visits[i], codes[i - first], count[i - first], found[i]);
      }
    });
    for (int64_t i = 0; i < total; i++)
      best_[visits[i].token].offer(found[i].distance, found[i].code);
  }

  const Codebook& book_;
  const Backend& backend_;
  const Tokens& tokens_;
  const float* x_;
  const float* upper_;
  const float* high_;
  const int64_t count_;
  const int64_t tasks_;
  const int num_threads_;
  std::vector<Best> best_;
  std::vector<int32_t> likely_;               // the promising group of each token
  std::vector<std::vector<int32_t>> groups_;  // room for a token's groups, one per part
};

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
  Decision decision(book, backend, tokens, x, count, upper, num_threads);
  const std::vector<Best>& best = decision.run();
  for (int64_t t = 0; t < count; t++) {
    const bool bad = tokens.state[t] == kBad;
    index[t] = bad ? -1 : best[t].code;
    distance[t] = bad ? std::numeric_limits<float>::quiet_NaN()
                      : static_cast<float>(best[t].distance);
  }
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
    const int64_t most = std::max<int64_t>(focus::kTokensPerTask,
                                           std::min<int64_t>(8192, focus::kBoundsBytes / row));
    const int64_t batches = (num_tokens + most - 1) / most;  // of even sizes
    const int64_t batch = batches ? (num_tokens + batches - 1) / batches : 1;
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
