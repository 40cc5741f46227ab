// From logits to tokens, against sorting all of them in double precision.
#include <numeric>

#include "cases.h"

namespace check {
namespace {

constexpr double kSlack = 1e-4;  // of a cumulative probability, summed up in float32

// What a draw is from: tokens in the order of the draw, and their probabilities.
struct Kept {
  std::vector<int64_t> ids;
  std::vector<double> weights;
  double total = 0;
  bool is_clear = true;  // nothing hangs on a rounding
};

std::vector<int64_t> in_order(const std::vector<float>& logits) {
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  return ids;
}

Kept keep(const std::vector<float>& logits, double temperature, int64_t top_k, double top_p,
          double min_p) {
  Kept kept;
  kept.ids = in_order(logits);
  const double highest = logits[kept.ids[0]];
  const size_t most = top_k > 0 ? std::min<size_t>(top_k, logits.size()) : logits.size();
  double all = 0;
  for (size_t i = 0; i < most; ++i) {
    const double weight = std::exp((logits[kept.ids[i]] - highest) / temperature);
    if (min_p > 0) kept.is_clear &= std::fabs(weight / min_p - 1) > kSlack || i == 0;
    if (i > 0 && weight < min_p) break;
    kept.weights.push_back(weight);
    all += weight;
  }
  size_t count = 0;
  for (; count < kept.weights.size(); ++count) {
    if (top_p < 1) kept.is_clear &= std::fabs(kept.total / all - top_p) > kSlack;
    if (top_p < 1 && count > 0 && kept.total >= top_p * all) break;
    kept.total += kept.weights[count];
  }
  kept.weights.resize(count);
  kept.ids.resize(count);
  if (count == logits.size() && most == logits.size() && top_p >= 1 && min_p <= 0) {
    std::vector<double> by_id(count);
    for (size_t i = 0; i < count; ++i) by_id[kept.ids[i]] = kept.weights[i];
    kept.weights = by_id;
    std::iota(kept.ids.begin(), kept.ids.end(), 0);
  }
  return kept;
}

bool is_drawn(const Kept& kept, int64_t id, double uniform) {
  double before = 0;
  for (size_t i = 0; i < kept.ids.size(); ++i) {
    const double after = before + kept.weights[i];
    if (kept.ids[i] == id) {
      return before / kept.total <= uniform + kSlack && uniform <= after / kept.total + kSlack;
    }
    before = after;
  }
  return false;
}

void check_row(Random& random, Context& context, Findings& found) {
  const int64_t vocab = random.one_of<int64_t>({1, 7, 128, 300, 5000, 70000});
  std::vector<float> row(vocab);
  const float scale = random.one_of<float>({0.1f, 2.0f, 10.0f});
  for (float& each : row) each = scale * random.normal();
  if (random.one_in(3)) {  // many that are equal
    for (float& each : row) each = std::round(each);
  }
  const Logits logits{row.data(), vocab, 1, vocab};
  const std::vector<int64_t> order = in_order(row);
  const std::string name = "of " + std::to_string(vocab) + " logits ";

  int64_t id = -1, rank = 0;
  float highest = NAN;
  must(quire_argmax(context.get(), &logits, &id, &highest, 1));
  if (id != order[0] || highest != row[order[0]]) found.fail(name + "the wrong one is highest");

  const int64_t k = std::min<int64_t>(vocab, random.one_of<int64_t>({1, 5, 40, 200}));
  std::vector<float> values(k + 1);
  std::vector<int64_t> ids(k + 1);
  must(quire_top(context.get(), &logits, k, values.data(), ids.data(), 1));
  if (!std::equal(ids.begin(), ids.begin() + k, order.begin())) {
    found.fail(name + "the wrong " + std::to_string(k) + " are the highest");
  }

  const int64_t target = random.between(0, vocab - 1);
  must(quire_log_probabilities(context.get(), &logits, &target, k, ids.data(), values.data(),
                               &rank, 1));
  double total = 0;
  int64_t higher = 0;
  for (float each : row) {
    total += std::exp(static_cast<double>(each) - highest);
    higher += each > row[target];
  }
  bool is_right = rank == higher + 1 && ids[0] == target;
  for (int64_t i = 0; i <= k; ++i) {
    const double expected = row[ids[i]] - highest - std::log(total);
    is_right &= std::fabs(values[i] - expected) <= 1e-5 * (1 + std::fabs(expected));
    is_right &= i == 0 || ids[i] == order[i - 1];
  }
  if (!is_right) found.fail(name + "log-probabilities are off");

  const double temperature = random.one_of<double>({0.3, 1.0, 5.0});
  const int64_t top_k = random.one_of<int64_t>({0, 0, 1, 20, 3000});
  const double top_p = random.one_of<double>({1.0, 0.9, 0.3});
  const double min_p = random.one_of<double>({0.0, 0.0, 0.05});
  const Kept kept = keep(row, temperature, top_k, top_p, min_p);
  for (double uniform : {0.0, 0.37, 0.9999999999}) {
    const Draw how{&temperature, &top_k, &top_p, &min_p, &uniform};
    must(quire_draw(context.get(), &logits, &how, &id, 1));
    if (kept.is_clear && !is_drawn(kept, id, uniform)) {
      found.fail(name + "token " + std::to_string(id) + " was drawn at " +
                 std::to_string(uniform) + ", temperature " + std::to_string(temperature) +
                 ", top_k " + std::to_string(top_k) + ", top_p " + std::to_string(top_p) +
                 ", min_p " + std::to_string(min_p));
    }
  }
  ++found.num_rows;
}

}  // namespace

void check_sampling(Random& random, int count, Findings& found) {
  Context context;
  for (int i = 0; i < count; ++i) check_row(random, context, found);
}

}  // namespace check
