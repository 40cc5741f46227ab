// Products with adapters, through a model that is nothing but its output matrix: what each row
// gains by its own, and that no row's company changes a bit.
#include <deque>

#include "cases.h"

namespace check {
namespace {

// A slice for all outputs from one on.
struct TinyAdapter {
  Weight a, b;
  std::vector<float> scales, bias, factor;
  DeltaSlice slice{};
  Delta delta{};

  void draw(Random& random, int64_t out, int64_t in) {
    const int32_t dtype = random.one_of<int32_t>({kFloat32, kBFloat16});
    slice.rank = random.one_of<int64_t>({1, 2, 3, 8, 16, 17, 40});
    slice.first_rank = random.between(0, 20);
    slice.first_output = random.between(0, (out - 1) / 16) * 16;
    const int64_t all = slice.first_rank + slice.rank;
    a.draw(random, all, in, dtype, false);
    b.draw(random, out - slice.first_output, (slice.rank + 1) / 2 * 2, dtype, false);
    slice.b = b.matrix;
    scales.assign((all + 15) / 16 * 16, 0.0f);
    for (int64_t k = 0; k < all; ++k) scales[k] = random.normal();
    if (random.one_in(3)) bias = numbers(random, out, 0.0f);
    if (random.one_in(3)) factor = numbers(random, out, 1.0f);
    delta.a = a.matrix;
    delta.scales = scales.data();
    delta.slices = &slice;
    delta.num_slices = 1;
    delta.bias = bias.empty() ? nullptr : bias.data();
    delta.factor = factor.empty() ? nullptr : factor.data();
  }

  static std::vector<float> numbers(Random& random, int64_t out, float around) {
    std::vector<float> drawn((out + 15) / 16 * 16);
    for (int64_t i = 0; i < out; ++i) drawn[i] = around + 0.3f * random.normal();
    return drawn;
  }

  Adapter adapter() const {
    Adapter made{};
    made.deltas = &delta;
    made.width = static_cast<int64_t>(scales.size());
    return made;
  }
};

struct Case {
  Context context;
  Weight weight;
  std::deque<TinyAdapter> adapters;
  std::vector<Adapter> table;
  Model model{};
  std::vector<int32_t> slots;
  std::vector<float> x;

  Case(Random& random, int64_t rows, int64_t out, int64_t in) {
    weight.draw(random, out, in, random.one_of<int32_t>({kFloat32, kBFloat16}), random.one_in(2));
    for (int64_t i = random.between(1, 4); i > 0; --i) {
      adapters.emplace_back().draw(random, out, in);
      table.push_back(adapters.back().adapter());
    }
    model.hidden_size = in;
    model.head = weight.matrix;
    model.adapters = table.data();
    for (int64_t r = 0; r < rows; ++r) {
      slots.push_back(static_cast<int32_t>(random.between(-1, adapters.size() - 1)));
      for (int64_t k = 0; k < in; ++k) x.push_back(random.normal());
    }
  }

  std::vector<float> run(int64_t first, int64_t count, int num_threads, bool adapts = true) {
    std::vector<float> y(count * weight.matrix.out, NAN);
    must(quire_logits(context.get(), &model, x.data() + first * weight.matrix.in, count,
                      adapts ? slots.data() + first : nullptr, y.data(), num_threads));
    return y;
  }
};

double dot(const float* x, const float* y, int64_t count, double& sizes) {
  double sum = 0;
  sizes = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += double{x[k]} * y[k];
    sizes += std::fabs(double{x[k]} * y[k]);
  }
  return sum;
}

// One unit in the last place of all sizes for each addition, and what of the model's own product is
// rounded besides. An adapter's share is computed in float32 whatever the instruction set.
bool check_number(const Case& c, int64_t row, int64_t o, float result, const Rounding& rounding,
                  Findings& found) {
  const int64_t in = c.weight.matrix.in;
  const TinyAdapter& adapter = c.adapters[c.slots[row]];
  const float* x = c.x.data() + row * in;
  double sizes;
  double expected = dot(x, c.weight.values.data() + o * in, in, sizes);
  double blur = rounding.of_product(c.weight.matrix.dtype) * sizes;
  const DeltaSlice& slice = adapter.slice;
  if (o >= slice.first_output) {
    const float* b = adapter.b.values.data() + (o - slice.first_output) * slice.b.in;
    for (int64_t k = 0; k < slice.rank; ++k) {
      const int64_t rank = slice.first_rank + k;
      double sizes_of_rank;
      const double shrunk = dot(x, adapter.a.values.data() + rank * in, in, sizes_of_rank);
      const double share = double{adapter.scales[rank]} * b[k];
      expected += shrunk * share;
      sizes += sizes_of_rank * std::fabs(share);
    }
  }
  if (!adapter.factor.empty()) {
    expected *= adapter.factor[o];
    sizes *= std::fabs(adapter.factor[o]);
    blur *= std::fabs(adapter.factor[o]);
  }
  for (const auto* bias : {&c.weight.bias, &adapter.bias}) {
    if (bias->empty()) continue;
    expected += (*bias)[o];
    sizes += std::fabs((*bias)[o]);
  }
  const double bound = blur + static_cast<double>(in + slice.rank + 8) * kUnit * sizes;
  return found.products.take(result, expected, bound);
}

void check_case(Random& random, const Rounding& rounding, const std::string& name,
                Findings& found) {
  const int64_t rows = random.between(1, random.one_in(3) ? 5 : 70), out = random.between(1, 100);
  Case c(random, rows, out, 2 * random.between(1, 150));
  const std::vector<float> all = c.run(0, rows, 1), plain = c.run(0, rows, 1, false);
  bool is_right = true;
  for (int64_t r = 0; r < rows; ++r) {
    if (c.slots[r] < 0) {
      is_right &= same_bits(&all[r * out], &plain[r * out], out);
      continue;
    }
    for (int64_t o = 0; o < out; ++o) {
      is_right &= check_number(c, r, o, all[r * out + o], rounding, found);
    }
  }
  if (!is_right) found.fail(name + " is off");
  if (c.run(0, rows, 2) != all) found.fail(name + " differs with two threads");
  for (int i = 0; i < 6; ++i) {
    const int64_t first = random.between(0, rows - 1);
    const int64_t count = i < 3 ? 1 : random.between(1, rows - first);
    const std::vector<float> some = c.run(first, count, 1);
    if (!same_bits(some.data(), &all[first * out], count * out)) {
      found.fail(name + " differs for some of its rows alone");
    }
    ++found.num_same;
  }
  ++found.num_products;
}

}  // namespace

void check_adapters(Random& random, int count, const Rounding& rounding, Findings& found) {
  for (int i = 0; i < count; ++i) {
    check_case(random, rounding, "product " + std::to_string(i) + " with adapters", found);
  }
}

}  // namespace check
