// Products with packed weights, through a model that is nothing but its output matrix.
#include "cases.h"

namespace check {
namespace {

struct Case {
  Context context;
  Weight weight;
  Model model{};
  int64_t rows;
  std::vector<float> x;

  std::vector<float> run(int64_t first, int64_t count, int num_threads) {
    std::vector<float> y(count * weight.matrix.out, NAN);
    must(quire_logits(context.get(), &model, x.data() + first * weight.matrix.in, count, nullptr,
                      y.data(), num_threads));
    return y;
  }
};

// The error is at most one unit in the last place of the sum of all sizes for each addition; and
// what the instruction set rounds of each term.
bool check_number(const Weight& weight, const float* x, int64_t output, float result,
                  const Rounding& rounding, Findings& found) {
  const int64_t in = weight.matrix.in;
  double expected = weight.bias.empty() ? 0.0 : weight.bias[output];
  double sizes = 0;
  for (int64_t k = 0; k < in; ++k) {
    const double term = double{x[k]} * weight.values[output * in + k];
    expected += term;
    sizes += std::fabs(term);
  }
  const double bound = rounding.of_product(weight.matrix.dtype) * sizes +
                       static_cast<double>(in + 1) * kUnit * (sizes + std::fabs(expected));
  return found.products.take(result, expected, bound);
}

void check_product(Random& random, const Rounding& rounding, Findings& found) {
  Case c;
  const int32_t dtype = random.one_of<int32_t>({kFloat32, kBFloat16});
  const int64_t out = random.between(1, 100);
  int64_t in = random.between(2, 300);
  if (dtype == kBFloat16) in &= ~int64_t{1};
  c.rows = random.one_in(3) ? random.between(1, 5) : random.between(1, 70);
  c.weight.draw(random, out, in, dtype, random.one_in(2));
  c.model.hidden_size = in;
  c.model.head = c.weight.matrix;
  c.x.resize(c.rows * in);
  for (float& each : c.x) each = random.normal();
  const std::string name = (dtype == kBFloat16 ? "bfloat16 [" : "float32 [") +
                           std::to_string(c.rows) + ", " + std::to_string(in) + "] x " +
                           std::to_string(out);
  const std::vector<float> all = c.run(0, c.rows, 1);
  bool is_right = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    const float* x = c.x.data() + r * in;
    for (int64_t o = 0; o < out; ++o) {
      is_right &= check_number(c.weight, x, o, all[r * out + o], rounding, found);
    }
  }
  if (!is_right) found.fail("product " + name + " is off");
  if (c.run(0, c.rows, 2) != all) found.fail("product " + name + " differs with two threads");
  for (int i = 0; i < 6; ++i) {
    const int64_t first = random.between(0, c.rows - 1);
    const int64_t count = i < 3 ? 1 : random.between(1, c.rows - first);
    const std::vector<float> some = c.run(first, count, 1);
    if (!same_bits(some.data(), &all[first * out], count * out)) {
      found.fail("product " + name + ": rows " + std::to_string(first) + " to " +
                 std::to_string(first + count - 1) + " differ when they are alone");
    }
    ++found.num_same;
  }
  ++found.num_products;
}

}  // namespace

void check_products(Random& random, int count, const Rounding& rounding, Findings& found) {
  for (int i = 0; i < count; ++i) check_product(random, rounding, found);
}

}  // namespace check
