#include "experts.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace quire {

namespace {
constexpr size_t kLoopsPerProduct = 3;
constexpr size_t kLoopsBesideExperts = 8;  // that a layer with one MLP has not
}  // namespace

const MixtureRows* reserve_rows(const Model& model, int64_t num_tokens, Memory& memory,
                                MixtureRows& rows) {
  int64_t scores = 0, per_token = 0, experts = 0, width = 0;
  each_mixture(model, [&](const Mixture& m) {
    scores = std::max(scores, m.router.out);
    per_token = std::max<int64_t>(per_token, m.per_token);
    experts = std::max<int64_t>(experts, m.num_experts);
    width = std::max(width, m.width);
  });
  if (experts == 0) return nullptr;
  const int64_t pairs = num_tokens * per_token;
  const int64_t sizes[] = {num_tokens * scores, pairs, pairs, pairs,
                           pairs, model.num_layers * (experts + 1), pairs * model.hidden_size, num_tokens * width};
  int64_t total = 0;
  for (int64_t size : sizes) total += padded(size, 16);
  float* next = memory.reserve(total);
  float* parts[8];
  for (int i = 0; i < 8; ++i) {
    parts[i] = next;
    next += padded(sizes[i], 16);
  }
  auto whole = [&](int i) { return reinterpret_cast<int32_t*>(parts[i]); };
  rows = {parts[0], parts[1], whole(2), whole(3), whole(4), whole(5), parts[6], parts[7],
          experts + 1};
  return &rows;
}

size_t mixture_loops(const Model& model, int64_t num_tokens) {
  size_t loops = 0;
  each_mixture(model, [&](const Mixture& m) {
    // Gate, up and down of each expert that has rows.
    const int64_t active = std::min<int64_t>(m.num_held, num_tokens * m.per_token);
    loops += kLoopsBesideExperts + kLoopsPerProduct * 3 * active;
  });
  return loops;
}

void choose_experts(const Mixture& mixture, const float* scores, float* weights, int32_t* chosen) {
  using Share = std::pair<float, int32_t>;
  const int32_t count = mixture.num_experts, k = mixture.per_token;
  thread_local std::vector<Share> shares;
  shares.resize(count);
  const float highest = *std::max_element(scores, scores + count);
  float sum = 0.0f;
  for (int32_t i = 0; i < count; ++i) {
    shares[i] = {std::exp(scores[i] - highest), i};
    sum += shares[i].first;
  }
  for (Share& each : shares) each.first /= sum;
  // Step by step what torch.topk does, so that of equal shares the same are chosen.
  auto is_before = [](const Share& a, const Share& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= count) {
    std::partial_sort(shares.begin(), shares.begin() + k, shares.end(), is_before);
  } else {
    std::nth_element(shares.begin(), shares.begin() + k - 1, shares.end(), is_before);
    std::sort(shares.begin(), shares.begin() + k - 1, is_before);
  }
  float total = 1.0f;
  if (mixture.is_normalized) {
    total = 0.0f;
    for (int32_t i = 0; i < k; ++i) total += shares[i].first;
  }
  std::sort(shares.begin(), shares.begin() + k,
            [](const Share& a, const Share& b) { return a.second < b.second; });
  for (int32_t i = 0; i < k; ++i) {
    weights[i] = shares[i].first / total;
    chosen[i] = shares[i].second;
  }
}

void order_pairs(const Mixture& mixture, int64_t layer, int64_t num_tokens,
                 const MixtureRows& rows) {
  const int64_t pairs = num_tokens * mixture.per_token;
  int32_t* first = rows.first_of(layer);
  std::fill_n(first, mixture.num_experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++first[rows.chosen[i] + 1];
  for (int32_t e = 0; e < mixture.num_experts; ++e) first[e + 1] += first[e];
  for (int64_t i = 0; i < pairs; ++i) {
    // The number of an expert's pairs so far is added to its first, and taken off again below.
    const int32_t place = first[rows.chosen[i]]++;
    rows.places[i] = place;
    rows.tokens[place] = static_cast<int32_t>(i / mixture.per_token);
  }
  for (int32_t e = mixture.num_experts; e > 0; --e) first[e] = first[e - 1];
  first[0] = 0;
}

}  // namespace quire
