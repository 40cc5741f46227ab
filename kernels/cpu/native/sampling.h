// From logits to tokens: each row by itself, and none of them sorted as a whole. Of equal logits,
// that of the lower token id counts as the higher.
#pragma once
#include <algorithm>
#include <cfloat>

#include "abi.h"
#include "simd.h"
#include "team.h"

namespace quire {
namespace QUIRE_ISA {

constexpr int64_t kSpan = 128;       // logits whose maximum and sum stand for them
constexpr int64_t kFirstTop = 128;   // most likely tokens to look at first, without a top_k
constexpr int64_t kBuckets = 2048;   // by likelihood, where more tokens matter than these
constexpr float kBucketsReach = 40;  // -log of the likelihood from which all lie in the last one

inline bool any(vi mask) {
  uint64_t words[kLanes / 2], some = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (int i = 0; i < kLanes / 2; ++i) some |= words[i];
  return some != 0;
}

struct Candidate {
  float logit;
  int32_t id;
};

struct IsBefore {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  }
};

// A type of its own: what the library makes of it is then of this instruction set, and no other's.
struct IsLess {
  bool operator()(float a, float b) const { return a < b; }
};

struct Found {
  int64_t count;
  bool is_all;  // there are no others
};

struct Bucket {
  int64_t count;
  double mass;
};

// One row of logits, and a thread's memory for it.
struct Row {
  const float* x;
  int64_t size;
  int64_t num_spans;
  float* maxima;  // of the spans
  float* spare;   // as many
  Bucket* buckets;
  Candidate* candidates;
  float highest;  // no number where one of them is none

  // `memory` has room for as many numbers as sampling_scratch() says.
  Row(const float* logits, int64_t vocab, float* memory)
      : x(logits),
        size(vocab),
        num_spans((vocab + kSpan - 1) / kSpan),
        maxima(memory + kBuckets * sizeof(Bucket) / sizeof(float)),
        spare(maxima + padded(num_spans, 2)),
        buckets(reinterpret_cast<Bucket*>(memory)),
        candidates(reinterpret_cast<Candidate*>(spare + padded(num_spans, 2))) {
    const float none = -std::numeric_limits<float>::infinity();
    vi odd = {};
    highest = none;
    for (int64_t s = 0; s < num_spans; ++s) {
      vf most = all(none);
      each(s, none, [&](vf v) {
        most = max(v, most);
        odd |= (vi)(v != v);
      });
      maxima[s] = largest(most);
      highest = std::max(highest, maxima[s]);
    }
    if (any(odd)) highest = std::numeric_limits<float>::quiet_NaN();
  }

  int64_t length(int64_t span) const { return std::min(kSpan, size - span * kSpan); }

  // All logits of a span, a vector at a time, the last of them filled up.
  template <typename Body>
  void each(int64_t span, float filling, Body body) const {
    const float* from = x + span * kSpan;
    const int64_t count = length(span);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) body(load(from + i));
    if (i == count) return;
    float rest[kLanes];
    for (int l = 0; l < kLanes; ++l) rest[l] = i + l < count ? from[i + l] : filling;
    body(load(rest));
  }

  int64_t first_highest() const {
    int64_t i = 0;
    if (highest != highest) {
      while (x[i] == x[i]) ++i;
      return i;
    }
    for (int64_t s = 0; s < num_spans && maxima[s] != highest; ++s) i += kSpan;
    while (x[i] != highest) ++i;
    return i;
  }

  // Weights, exp((logit - highest) / temperature), summed up; the spans' own sums go to `spare`.
  double weigh(float temperature) const {
    double total = 0.0;
    for (int64_t s = 0; s < num_spans; ++s) {
      vf part = all(0.0f);
      each(s, -std::numeric_limits<float>::infinity(),
           [&](vf v) { part += exp((v - highest) / temperature); });
      spare[s] = sum(part);
      total += spare[s];
    }
    return total;
  }

  // At least the `count` most likely tokens, and all that are as likely as one of them, in order.
  // Those without any weight, and what is no number, are left out.
  Found collect(int64_t count) const {
    const float none = -std::numeric_limits<float>::infinity();
    int64_t found = 0;
    float least = none;
    if (count <= num_spans) {
      std::copy(maxima, maxima + num_spans, spare);
      std::nth_element(spare, spare + (num_spans - count), spare + num_spans, IsLess{});
      least = spare[num_spans - count];
    }
    for (int64_t s = 0; s < num_spans; ++s) {
      if (maxima[s] < least || maxima[s] == none) continue;
      const int64_t first = s * kSpan;
      for (int64_t i = first; i < first + length(s); ++i) {
        if (x[i] >= least && x[i] > none) candidates[found++] = {x[i], static_cast<int32_t>(i)};
      }
    }
    std::sort(candidates, candidates + found, IsBefore{});
    return {found, least == none};
  }
};

// Go on with a row's likeliest token, of which `x` is the part from token `first` on.
inline void find_highest(const float* x, int64_t count, int64_t first, int64_t& id,
                         float& highest) {
  const float none = -std::numeric_limits<float>::infinity();
  vf most = all(none);
  vi odd = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf v = load(x + i);
    most = max(v, most);
    odd |= (vi)(v != v);
  }
  float here = largest(most);
  bool is_odd = any(odd);
  for (; i < count; ++i) {
    here = std::max(here, x[i]);
    is_odd |= x[i] != x[i];
  }
  if (is_odd) highest = std::numeric_limits<float>::quiet_NaN();
  if (!(here > highest)) return;
  highest = here;
  i = 0;
  while (x[i] != here) ++i;
  id = first + i;
}

inline double below(double target, double reach) {
  return std::min(target, std::nextafter(reach, 0.0));
}

// From all tokens, in the order of their ids: first a span, then one of it.
inline int64_t draw_from_all(const Row& row, float temperature, double uniform) {
  const double total = row.weigh(temperature);
  double target = below(uniform * total, total), before = 0.0;
  int64_t s = 0;
  while (before + row.spare[s] <= target) before += row.spare[s++];
  target -= before;
  float weights[kSpan + kLanes];
  float* next = weights;
  row.each(s, -std::numeric_limits<float>::infinity(), [&](vf v) {
    store(next, exp((v - row.highest) / temperature));
    next += kLanes;
  });
  double reach = 0.0;
  for (int64_t i = 0; i < row.length(s); ++i) reach += weights[i];
  target = below(target, reach);
  int64_t i = 0;
  for (double sum = weights[0]; sum <= target; sum += weights[i]) ++i;
  return s * kSpan + i;
}

struct Limits {
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  double uniform;
};

inline double weight_of(const Row& row, float logit, const Limits& limits) {
  return std::exp((static_cast<double>(logit) - row.highest) / limits.temperature);
}

// From the candidates that were found, the most likely tokens; -1 where those beyond may be kept,
// too. `total` is the weight of the whole row, or 0 where top_k or min_p comes before
// top_p.
inline int64_t draw_from_candidates(const Row& row, Found found, const Limits& limits,
                                    double total) {
  const int64_t count = found.count;
  double kept_mass = 0.0;
  int64_t kept = 0;
  for (; kept < std::min(count, limits.top_k); ++kept) {
    const double weight = weight_of(row, row.candidates[kept].logit, limits);
    if (weight < limits.min_p || weight == 0.0) break;
    kept_mass += weight;
  }
  const bool is_cut = kept < count;  // by top_k, min_p or having no weight
  const double most = limits.top_p < 1.0 ? limits.top_p * (total > 0.0 ? total : kept_mass)
                                         : std::numeric_limits<double>::infinity();
  double reach = 0.0;
  int64_t chosen = 0;
  while (chosen < kept && (chosen == 0 || reach < most)) {
    reach += weight_of(row, row.candidates[chosen++].logit, limits);
  }
  const bool is_known = is_cut || found.is_all || limits.top_k <= count;
  if (!is_known && !(total > 0.0 && chosen < kept)) return -1;
  const double target = below(limits.uniform * reach, reach);
  int64_t i = 0;
  double sum = weight_of(row, row.candidates[0].logit, limits);
  while (sum <= target && i + 1 < chosen) {
    sum += weight_of(row, row.candidates[++i].logit, limits);
  }
  return row.candidates[i].id;
}

// The same where many tokens are kept: they are counted and weighed by buckets of likelihood, and
// just those buckets are sorted in which something is decided.
inline int64_t draw_by_buckets(const Row& row, const Limits& limits) {
  const float temperature = static_cast<float>(std::min<double>(limits.temperature, FLT_MAX));
  const float scale = (kBuckets - 1) / (kBucketsReach * temperature);
  const float least = static_cast<float>(limits.min_p);
  std::fill(row.buckets, row.buckets + kBuckets, Bucket{0, 0.0});
  const float none = -std::numeric_limits<float>::infinity();
  const auto weigh = [&](vf v) { return exp((v - row.highest) / temperature); };
  const auto place = [&](vf v) { return min((row.highest - v) * scale, all(kBuckets - 1)); };
  const auto counts = [&](float weight) { return weight >= least && weight > 0.0f; };
  float weights[kLanes], places[kLanes];
  for (int64_t s = 0; s < row.num_spans; ++s) {
    row.each(s, none, [&](vf v) {
      store(weights, weigh(v));
      store(places, place(v));
      for (int l = 0; l < kLanes; ++l) {
        if (!counts(weights[l])) continue;
        Bucket& bucket = row.buckets[static_cast<int64_t>(places[l])];
        ++bucket.count;
        bucket.mass += weights[l];
      }
    });
  }
  // The tokens of one bucket, in order.
  const auto collect = [&](int64_t bucket) {
    const float low = static_cast<float>(bucket), high = low + 1.0f;
    int64_t found = 0, first = 0;
    for (int64_t s = 0; s < row.num_spans; ++s, first = s * kSpan) {
      row.each(s, none, [&](vf v) {
        const vf where = place(v);
        const vi here = (vi)(where >= low) & (vi)(where < high);
        if (any(here)) {
          store(weights, weigh(v));
          for (int l = 0; l < kLanes; ++l) {
            if (!here[l] || !counts(weights[l])) continue;
            const int64_t id = first + l;
            row.candidates[found++] = {row.x[id], static_cast<int32_t>(id)};
          }
        }
        first += kLanes;
      });
    }
    std::sort(row.candidates, row.candidates + found, IsBefore{});
    return found;
  };
  int64_t last = kBuckets - 1;  // bucket of which something is kept
  int64_t num_before = 0;
  double mass = 0.0;
  for (int64_t b = 0; b <= last; ++b) {
    Bucket& bucket = row.buckets[b];
    if (num_before + bucket.count >= limits.top_k) {
      last = b;
      const int64_t found = collect(b);
      bucket.count = std::min(found, limits.top_k - num_before);
      bucket.mass = 0.0;
      for (int64_t i = 0; i < bucket.count; ++i) {
        bucket.mass += weight_of(row, row.candidates[i].logit, limits);
      }
    }
    num_before += bucket.count;
    mass += bucket.mass;
  }
  double reach = mass;
  if (limits.top_p < 1.0) {
    const double most = limits.top_p * mass;
    double before = 0.0;
    for (int64_t b = 0; b <= last; ++b) {
      Bucket& bucket = row.buckets[b];
      if (before + bucket.mass < most) {
        before += bucket.mass;
        continue;
      }
      last = b;
      const int64_t found = std::min(collect(b), bucket.count);
      bucket.mass = 0.0;
      bucket.count = 0;
      while (bucket.count < found && (bucket.count == 0 || before + bucket.mass < most)) {
        bucket.mass += weight_of(row, row.candidates[bucket.count++].logit, limits);
      }
      reach = before + bucket.mass;
    }
  }
  const double target = below(limits.uniform * reach, reach);
  double before = 0.0;
  int64_t b = 0;
  while (b < last && (row.buckets[b].count == 0 || before + row.buckets[b].mass <= target)) {
    before += row.buckets[b++].mass;
  }
  while (row.buckets[b].count == 0) --b;  // rounding has led past the last
  const int64_t found = std::min<int64_t>(collect(b), row.buckets[b].count);
  int64_t i = 0;
  double sum = before + weight_of(row, row.candidates[0].logit, limits);
  while (sum <= target && i + 1 < found) {
    sum += weight_of(row, row.candidates[++i].logit, limits);
  }
  return row.candidates[i].id;
}

inline int64_t draw_row(const Row& row, Limits limits) {
  if (!std::isfinite(row.highest)) return row.first_highest();
  const float temperature = static_cast<float>(std::min<double>(limits.temperature, FLT_MAX));
  if (limits.top_k <= 0 || limits.top_k > row.size) limits.top_k = row.size;
  const bool is_whole = limits.top_k == row.size && limits.min_p <= 0.0;
  if (is_whole && limits.top_p >= 1.0) return draw_from_all(row, temperature, limits.uniform);
  const int64_t few = limits.top_k < row.size ? limits.top_k : kFirstTop;
  if (row.num_spans >= 4 * few) {
    const double total = is_whole ? row.weigh(temperature) : 0.0;
    const int64_t drawn = draw_from_candidates(row, row.collect(few), limits, total);
    if (drawn >= 0) return drawn;
  }
  return draw_by_buckets(row, limits);
}

inline void argmax(Thread& thread, const Logits& logits, int64_t* ids, float* highest) {
  thread.share(logits.num_rows, [&](int64_t r) {
    const Row row(logits.data + r * logits.stride, logits.vocab, thread.scratch());
    ids[r] = row.first_highest();
    highest[r] = row.highest;
  });
}

inline void draw(Thread& thread, const Logits& logits, const Draw& how, int64_t* ids) {
  thread.share(logits.num_rows, [&](int64_t r) {
    const Row row(logits.data + r * logits.stride, logits.vocab, thread.scratch());
    ids[r] = draw_row(row, {how.temperature[r], how.top_k[r], how.top_p[r], how.min_p[r],
                            how.uniform[r]});
  });
}

// The k highest logits of each row in order, [num_rows][k].
inline void find_top(const Row& row, int64_t k, float* values, int64_t* ids) {
  const int64_t found =
      std::min(k, row.collect(4 * k <= row.num_spans ? k : row.size).count);
  for (int64_t i = 0; i < found; ++i) {
    values[i] = row.candidates[i].logit;
    ids[i] = row.candidates[i].id;
  }
  // Then those without any weight, in the order of their ids.
  for (int64_t i = 0, n = found; n < k; ++i) {
    if (row.x[i] > -std::numeric_limits<float>::infinity()) continue;
    values[n] = row.x[i];
    ids[n++] = i;
  }
}

inline void top(Thread& thread, const Logits& logits, int64_t k, float* values, int64_t* ids) {
  thread.share(logits.num_rows, [&](int64_t r) {
    const Row row(logits.data + r * logits.stride, logits.vocab, thread.scratch());
    find_top(row, k, values + r * k, ids + r * k);
  });
}

// Of a given token of each row and, behind it, of the k likeliest: [num_rows][k + 1].
inline void log_probabilities(Thread& thread, const Logits& logits, const int64_t* targets,
                              int64_t k, int64_t* ids, float* values, int64_t* ranks) {
  thread.share(logits.num_rows, [&](int64_t r) {
    const Row row(logits.data + r * logits.stride, logits.vocab, thread.scratch());
    const float normalizer = static_cast<float>(row.highest + std::log(row.weigh(1.0f)));
    int64_t* own_ids = ids + r * (k + 1);
    float* own = values + r * (k + 1);
    own_ids[0] = targets[r];
    own[0] = row.x[targets[r]];
    vi higher = {};
    int64_t rank = 1;
    for (int64_t s = 0; s < row.num_spans; ++s) {
      row.each(s, -std::numeric_limits<float>::infinity(),
               [&](vf v) { higher -= (vi)(v > own[0]); });
    }
    for (int l = 0; l < kLanes; ++l) rank += higher[l];
    ranks[r] = rank;
    if (k > 0) find_top(row, k, own + 1, own_ids + 1);
    for (int64_t i = 0; i <= k; ++i) own[i] -= normalizer;
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
