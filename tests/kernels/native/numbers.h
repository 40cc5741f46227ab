// Random numbers, bfloat16, and numbers that know how far off a float32 computation will be.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace check {

// Steele, Lea and Flood's SplitMix (OOPSLA 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // least <= result <= most
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(bits() % static_cast<uint64_t>(most - least + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  // Of mean 0 and variance 1, or near enough.
  float normal() {
    double sum = 0;
    for (int i = 0; i < 6; ++i) sum += static_cast<double>(bits() >> 11) * 0x1p-53 - 0.5;
    return static_cast<float>(sum * std::sqrt(2.0));
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[bits() % i]);
  }

 private:
  uint64_t state_;
};

inline float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// To the nearest, and to even from halfway.
inline uint16_t to_bfloat16(double x) {
  const float near = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &near, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr double kUnit = 0x1p-24;         // the relative error of one float32 operation
constexpr double kBfloat16Unit = 0x1p-8;  // twice that of rounding to bfloat16
constexpr double kTiny = 0x1p-110;        // what may get lost below the normal numbers

// A number in double precision, and the variance of the error that it has when it is computed in
// float32, as if each rounding were by chance. Bounds that hold for certain would soon say nothing.
struct Estimate {
  double value = 0;
  double variance = 0;

  Estimate() = default;
  Estimate(double v, double of_error = 0) : value(v), variance(of_error) {}
};

inline double square(double x) { return x * x; }

// The result of an operation: the error that its operands bring along, and its own roundings.
inline Estimate rounded(double value, double variance, double roundings = 1) {
  return {value, variance + square(roundings * kUnit * value) + square(kTiny)};
}

inline Estimate operator+(Estimate a, Estimate b) {
  return rounded(a.value + b.value, a.variance + b.variance);
}
inline Estimate operator-(Estimate a, Estimate b) {
  return rounded(a.value - b.value, a.variance + b.variance);
}
inline Estimate operator*(Estimate a, Estimate b) {
  return rounded(a.value * b.value, square(a.value) * b.variance + square(b.value) * a.variance +
                                        a.variance * b.variance);
}
inline Estimate operator/(Estimate a, double b) {
  return rounded(a.value / b, a.variance / square(b));
}

// A sum of many numbers in any order.
class Sum {
 public:
  void add(Estimate term) {
    total_.value += term.value;
    total_.variance += term.variance;
    squares_ += square(term.value);
    count_ += 1;
  }
  Estimate result() const {
    const double sizes = squares_ + square(total_.value);
    return {total_.value, total_.variance + count_ * square(kUnit) * sizes};
  }

 private:
  Estimate total_;
  double squares_ = 0, count_ = 0;
};

// Two numbers that are close may lie on either side of a border between two bfloat16.
inline Estimate as_bfloat16(Estimate x) {
  const double value = widen(to_bfloat16(x.value));
  const double off = 4 * std::sqrt(x.variance);
  const double low = widen(to_bfloat16(x.value - off));
  const double high = widen(to_bfloat16(x.value + off));
  return {value, square(std::max(high - value, value - low))};
}

// To the nearest number of e4m3, and to even from halfway; of a size of 448 at most.
inline double to_float8(double x) {
  const double size = std::min(std::fabs(x), 448.0);
  const double step = size < 0x1p-6 ? 0x1p-9 : std::exp2(std::floor(std::log2(size)) - 3);
  return std::copysign(std::nearbyint(size / step) * step, x);
}

// What a code stands for, and what the codes of numbers that are close do.
inline Estimate as_code(Estimate x, double scale, bool is_int8) {
  auto near = [&](double number) {
    const double steps = number / scale;
    const double code = is_int8 ? std::clamp(std::nearbyint(steps), -127.0, 127.0) : to_float8(steps);
    return code * scale;
  };
  const double value = near(x.value), off = 4 * std::sqrt(x.variance);
  const double low = near(x.value - off), high = near(x.value + off);
  return {value, square(std::max(high - value, value - low))};
}

// The largest error seen, as a part of what was allowed.
class Worst {
 public:
  // Whether a result is within its bound.
  bool take(float result, double expected, double bound) {
    const double off = std::fabs(static_cast<double>(result) - expected);
    const double part = off == 0 ? 0 : off / bound;
    part_ = std::isnan(part) ? HUGE_VAL : std::max(part_, part);
    return part <= 1;
  }
  // The same for an estimate, with room for errors that go the same way.
  bool take(float result, const Estimate& expected, double deviations) {
    return take(result, expected.value, deviations * std::sqrt(expected.variance));
  }
  double part() const { return part_; }

 private:
  double part_ = 0;
};

}  // namespace check
