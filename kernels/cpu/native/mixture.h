// A mixture of experts: each token goes to a few of them, each expert is multiplied once with all
// the tokens that it has, and what is not chosen is not read.
//
// What experts make of a token is weighted and added in ascending order of their numbers: a token's
// result has the same bits alone and among others.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dots.h"
#include "exchange.h"
#include "experts.h"

namespace quire {
namespace QUIRE_ISA {

// Choose the experts of all rows of `input`, and bring these to their places, for those experts that
// are here.
inline void route_rows(Thread& thread, const Mixture& m, int64_t layer, const float* input,
                       int64_t hidden, int64_t count, const Buffers& rows) {
  const MixtureRows& r = *rows.mixture;
  const int64_t width = m.router.out;
  multiply(thread, {input, hidden, count, r.scores, width, &m.router}, rows.halves);
  thread.share(count, [&](int64_t t) {
    choose_experts(m, r.scores + t * width, r.weights + t * m.per_token,
                   r.chosen + t * m.per_token);
  });
  thread.share(1, [&](int64_t) { order_pairs(m, layer, count, r); });
  const int32_t* firsts = r.first_of(layer);
  const int64_t first = firsts[m.first_held];
  thread.share(firsts[m.first_held + m.num_held] - first, [&](int64_t item) {
    const int64_t pair = first + item;
    std::memcpy(r.pairs + pair * hidden, input + r.tokens[pair] * hidden, hidden * sizeof(float));
  });
}

// What each expert makes of its rows takes their place.
inline void run_experts(Thread& thread, const Mixture& m, int64_t layer, int activation,
                        int64_t hidden, const Buffers& rows) {
  const MixtureRows& r = *rows.mixture;
  const int32_t* firsts = r.first_of(layer);
  for (int32_t number = m.first_held; number < m.first_held + m.num_held; ++number) {
    const int64_t first = firsts[number], count = firsts[number + 1] - first;
    if (count == 0) continue;
    const Expert& e = m.experts[number - m.first_held];
    float* x = r.pairs + first * hidden;
    const int64_t size = e.up.out;
    Product up{x, hidden, count, r.inner, size, e.gated == kNoGate ? &e.up : &e.gate,
               Then::kActivate, activation};
    if (e.gated == kGatedAtOnce) {
      up.factor = &e.up;
      up.then = Then::kActivateAndMultiply;
    }
    multiply(thread, up, rows.halves);
    if (e.gated == kGatedApart) {
      up.weight = &e.up;
      up.then = Then::kMultiply;
      multiply(thread, up, rows.halves);
    }
    multiply(thread, {r.inner, size, count, x, hidden, &e.down}, rows.halves);
  }
}

// The weighted sums of what experts made of each row, and of what stands in `rows.normed` if there
// is a shared expert, added to `x` by way of a norm, if there is one. Where ranks share the mixture,
// they are added up over these before that.
inline void add_mixture(Thread& thread, const Mixture& m, bool has_shared, const Norm& norm,
                        int64_t hidden, int64_t count, const Buffers& rows, Exchange& exchange) {
  const MixtureRows& r = *rows.mixture;
  float* parts = exchange.is_on() ? exchange.parts(count * hidden) : nullptr;
  thread.share(count, [&](int64_t t) {
    float* total = rows.normed + t * hidden;
    if (!has_shared) std::fill_n(total, hidden, 0.0f);
    if (m.has_shared_gate) {
      const float score = r.scores[t * m.router.out + m.num_experts];
      const float share = 1.0f / (1.0f + std::exp(-score));
      for (int64_t i = 0; i < hidden; ++i) total[i] *= share;
    }
    for (int64_t pair = t * m.per_token; pair < (t + 1) * m.per_token; ++pair) {
      if (!is_held(m, r.chosen[pair])) continue;
      const float* made = r.pairs + r.places[pair] * hidden;
      const float share = r.weights[pair];
      for (int64_t i = 0; i < hidden; ++i) total[i] += made[i] * share;
    }
    if (parts != nullptr) {
      std::memcpy(parts + t * hidden, total, hidden * sizeof(float));
      return;
    }
    if (norm.kind != kNoNorm) normalize(norm, total, hidden, total);
    float* x = rows.x + t * hidden;
    for (int64_t i = 0; i < hidden; ++i) x[i] += total[i];
  });
  if (parts != nullptr) add_sums(thread, exchange, count, hidden, norm, rows.x);
}

}  // namespace QUIRE_ISA
}  // namespace quire
