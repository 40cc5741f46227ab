// Matrix products with packed weights: y = epilogue(x @ weight^T + bias).
//
// An output is accumulated in float32 over its inputs in ascending order, whatever the number of
// rows: a row's result has the same bits alone and among others.
#pragma once
#include <algorithm>

#include "lora.h"

namespace quire {
namespace QUIRE_ISA {

// Rows computed at once: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kMostRows = 14;
#elif defined(QUIRE_WIDE)
constexpr int kMostRows = 5;  // of wide vectors that are made of others; and compiled in less time
#elif defined(__AVX2__)
constexpr int kMostRows = 6;
#elif defined(__aarch64__)
constexpr int kMostRows = 5;
#else
constexpr int kMostRows = 2;
#endif

// One input of each row, times what a vector of outputs takes of it. Row by row: so one register
// for the input does, and all others are left to sums.
template <int Rows>
inline void add_products(const float* x, int64_t ldx, const vf (&factor)[kVectors],
                         vf (&acc)[Rows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const float input = x[r * ldx];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = factor[v] * input + acc[r][v];
  }
}

// out[r][0:16] (+)= sum over k of x[r][k] * block[k][0:16], for `Rows` rows.
template <int Rows, bool Accumulate>
inline void tile_of_rows(const float* x, int64_t ldx, int64_t depth, const float* block,
                         float* out, int64_t ldo) {
  vf acc[Rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = Accumulate ? load(out + r * ldo + v * kLanes) : all(0.0f);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf factor[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = load(block + k * kBlock + v * kLanes);
    add_products<Rows>(x + k, ldx, factor, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * ldo + v * kLanes, acc[r][v]);
  }
}

template <int Rows, bool Accumulate>
inline void tile_of_rows(const float* x, int64_t ldx, int64_t depth, const uint16_t* block,
                         float* out, int64_t ldo) {
  static_assert(!Accumulate);
  vf acc[Rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = all(0.0f);
  }
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* w = block + k * kBlock;
    if constexpr (Rows <= 2) __builtin_prefetch(w + 1024);
    vf factor[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = widen_low(load_as<vu>(w + 2 * v * kLanes));
    add_products<Rows>(x + k, ldx, factor, acc);
    // The pairs are loaded again: to keep them would take registers that sums are in.
    asm volatile("" ::: "memory");
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = widen_high(load_as<vu>(w + 2 * v * kLanes));
    add_products<Rows>(x + k + 1, ldx, factor, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * ldo + v * kLanes, acc[r][v]);
  }
}

// Rows up to which two blocks are gone over at once. With so few, the sums of one block would wait
// for each other, and memory for both.
constexpr int kFewRows = kLanes == 4 ? 2 : 3;

// The same for two blocks.
template <int Rows>
inline void tile_of_two(const float* x, int64_t ldx, int64_t depth, const uint16_t* first,
                        const uint16_t* second, float* out_first, float* out_second) {
  vf acc[2][Rows][kVectors];
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[b][r][v] = all(0.0f);
    }
  }
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* const w[2] = {first + k * kBlock, second + k * kBlock};
    vf factor[kVectors];
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      __builtin_prefetch(w[b] + 1024);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) factor[v] = widen_low(load_as<vu>(w[b] + 2 * v * kLanes));
      add_products<Rows>(x + k, ldx, factor, acc[b]);
    }
    asm volatile("" ::: "memory");  // see above
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        factor[v] = widen_high(load_as<vu>(w[b] + 2 * v * kLanes));
      }
      add_products<Rows>(x + k + 1, ldx, factor, acc[b]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out_first + r * kBlock + v * kLanes, acc[0][r][v]);
      store(out_second + r * kBlock + v * kLanes, acc[1][r][v]);
    }
  }
}

template <int Rows = kFewRows>
inline void few_rows(int rows, const float* x, int64_t ldx, int64_t depth, const uint16_t* first,
                     const uint16_t* second, float* out_first, float* out_second) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      few_rows<Rows - 1>(rows, x, ldx, depth, first, second, out_first, out_second);
      return;
    }
  }
  tile_of_two<Rows>(x, ldx, depth, first, second, out_first, out_second);
}

template <bool Accumulate, typename W, int Rows = kMostRows>
inline void tile(int rows, const float* x, int64_t ldx, int64_t depth, const W* block, float* out,
                 int64_t ldo) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      tile<Accumulate, W, Rows - 1>(rows, x, ldx, depth, block, out, ldo);
      return;
    }
  }
  tile_of_rows<Rows, Accumulate>(x, ldx, depth, block, out, ldo);
}

inline vf activate(vf x, int kind) {
  switch (kind) {
    case kSilu:
      return x / (1.0f + exp(-x));
    case kGelu: {
      // x * Phi(x); the complementary error function by a Chebyshev fit (Press et al., Numerical
      // Recipes, 2nd ed., section 6.2).
      const vf z = x * 0.70710678f;
      const vf size = z < 0.0f ? -z : z;
      const vf t = 1.0f / (1.0f + size * 0.5f);
      vf p = all(0.17087277f);
      p = p * t + -0.82215223f;
      p = p * t + 1.48851587f;
      p = p * t + -1.13520398f;
      p = p * t + 0.27886807f;
      p = p * t + -0.18628806f;
      p = p * t + 0.09678418f;
      p = p * t + 0.37409196f;
      p = p * t + 1.00002368f;
      p = p * t + -1.26551223f;
      const vf erfc = t * exp(p - size * size);
      return x * 0.5f * (z < 0.0f ? erfc : 2.0f - erfc);
    }
    case kGeluTanh:
      return x * 0.5f * (1.0f + tanh((x + x * x * x * 0.044715f) * 0.79788456f));
    case kQuickGelu:
      return x / (1.0f + exp(x * -1.702f));
    case kRelu:
      return x == x ? max(x, all(0.0f)) : x;
    case kReluSquared: {
      const vf y = max(x, all(0.0f));
      return x == x ? y * y : x;
    }
    default:
      return tanh(x);
  }
}

// What becomes of x @ weight^T + bias.
enum class Then { kStore, kAdd, kMultiply, kActivate, kActivateAndMultiply };

// It and what stands at its place already.
template <typename T>
inline T joined(Then then, T old, T value) {
  if (then == Then::kAdd) return old + value;
  return then == Then::kMultiply ? old * value : value;
}

struct Product {
  const float* x;
  int64_t ldx;
  int64_t rows;
  float* y;
  int64_t ldy;
  const Matrix* weight;
  Then then = Then::kStore;
  int activation = 0;
  const Matrix* factor = nullptr;  // of kActivateAndMultiply: act(x @ weight) * (x @ factor)
  const AdapterPlan* adapters = nullptr;
  int64_t delta = 0;         // number of what adapters do to the product with the weight
  int64_t factor_delta = 0;  // and with the factor
  int64_t skipped = 0;       // outputs of that delta that lie before the weight's
};

// What adapters make of the sums of some rows, `ld` apart: of the weight's outputs, or the factor's.
inline void adapt(const Product& p, bool is_factor, int64_t first, int64_t row, int64_t rows,
                  float* values, int64_t ld) {
  if (p.adapters == nullptr) return;
  adapt(*p.adapters, is_factor ? p.factor_delta : p.delta, p.skipped + first, row, rows, values, ld);
}

// Said before the sums of a block are computed.
inline void prefetch_gains(const Product& p, int64_t first) {
  if (p.adapters == nullptr) return;
  prefetch_gains(*p.adapters, p.delta, p.skipped + first);
  if (p.factor != nullptr) prefetch_gains(*p.adapters, p.factor_delta, p.skipped + first);
}

// What values that stand beside a weight in codes add to sums of a block, `ld` apart: row by row the
// same.
// `x` are inputs in the order of the weight's columns.
inline void add_outliers(const Matrix& weight, int64_t first, const float* x, int64_t ldx,
                         int64_t rows, float* values, int64_t ld = kBlock) {
  if (weight.codes == nullptr || weight.codes->outlier_first == nullptr) return;
  const Codes& codes = *weight.codes;
  const int64_t count = std::min<int64_t>(kBlock, weight.out - first);
  for (int64_t o = 0; o < count; ++o) {
    const int64_t end = codes.outlier_first[first + o + 1];
    if (rows == 1) {  // as below, in a register
      float sum = values[o];
      for (int64_t e = codes.outlier_first[first + o]; e < end; ++e) {
        sum += codes.outlier_values[e] * x[codes.outlier_columns[e]];
      }
      values[o] = sum;
      continue;
    }
    for (int64_t e = codes.outlier_first[first + o]; e < end; ++e) {
      const float* inputs = x + codes.outlier_columns[e];
      const float value = codes.outlier_values[e];
      for (int64_t r = 0; r < rows; ++r) values[r * ld + o] += value * inputs[r * ldx];
    }
  }
}

inline void finish_row(const Product& p, const float* values, const float* factors, int64_t first,
                       float* y) {
  const int64_t count = std::min<int64_t>(kBlock, p.weight->out - first);
  const bool is_joined = p.then == Then::kAdd || p.then == Then::kMultiply;
  float result[kBlock];
  for (int i = 0; i < kBlock; i += kLanes) {
    vf v = load(values + i);
    if (p.weight->bias != nullptr) v += load(p.weight->bias + first + i);
    if (p.then == Then::kActivate) v = activate(v, p.activation);
    if (p.then == Then::kActivateAndMultiply) {
      vf other = load(factors + i);
      if (p.factor->bias != nullptr) other += load(p.factor->bias + first + i);
      v = activate(v, p.activation) * other;
    }
    if (count < kBlock) {
      store(result + i, v);
    } else {
      store(y + i, is_joined ? joined(p.then, load(y + i), v) : v);
    }
  }
  if (count < kBlock) {
    for (int i = 0; i < count; ++i) y[i] = is_joined ? joined(p.then, y[i], result[i]) : result[i];
  }
}

// Blocks that a thread takes at a time: enough memory to read on in, little enough to share out.
constexpr int64_t kBlocksAtOnce = 2;

// From so many rows on, a block is widened once and not anew for every few of them.
constexpr int64_t kWidenFrom = 2 * kMostRows + 1;

// Rows whose sums wait for each other, so that more of them are of one adapter.
constexpr int64_t kRowsToAdapt = 36;
static_assert(kRowsToAdapt >= kMostRows);

// What `block` and `other`, if there is one, make of all rows: outputs `first` to first + 15.
template <typename W>
inline void multiply_block(const Product& p, const W* block, const W* other, int64_t first) {
  const int64_t depth = p.weight->in;
  const int64_t passes = (p.rows + kMostRows - 1) / kMostRows;
  const int64_t step = (p.rows + passes - 1) / passes;
  const int64_t most = p.adapters == nullptr ? step : kRowsToAdapt / step * step;
  float values[kRowsToAdapt * kBlock], factors[kRowsToAdapt * kBlock];
  prefetch_gains(p, first);
  for (int64_t row = 0; row < p.rows; row += most) {
    const int64_t rows = std::min(most, p.rows - row);
    for (int64_t r = 0; r < rows; r += step) {
      const int some = static_cast<int>(std::min(step, rows - r));
      const float* x = p.x + (row + r) * p.ldx;
      tile<false>(some, x, p.ldx, depth, block, values + r * kBlock, kBlock);
      if (other != nullptr) {
        tile<false>(some, x, p.ldx, depth, other, factors + r * kBlock, kBlock);
      }
    }
    add_outliers(*p.weight, first, p.x + row * p.ldx, p.ldx, rows, values);
    if (other != nullptr) add_outliers(*p.factor, first, p.x + row * p.ldx, p.ldx, rows, factors);
    adapt(p, false, first, row, rows, values, kBlock);
    if (other != nullptr) adapt(p, true, first, row, rows, factors, kBlock);
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(p, values + r * kBlock, factors + r * kBlock, first,
                 p.y + (row + r) * p.ldy + first);
    }
  }
}

// The product of a few rows with block `b`, and with its factor or else with the block after it.
// Returns which block comes next.
inline int64_t multiply_two(const Product& p, int64_t b) {
  const bool is_gated = p.factor != nullptr;
  const uint16_t* block = block_of<uint16_t>(*p.weight, b);
  const uint16_t* other =
      is_gated ? block_of<uint16_t>(*p.factor, b) : block_of<uint16_t>(*p.weight, b + 1);
  float values[kFewRows * kBlock], others[kFewRows * kBlock];
  const int64_t first = b * kBlock, second = is_gated ? first : first + kBlock;
  prefetch_gains(p, first);
  if (!is_gated) prefetch_gains(p, second);
  few_rows(static_cast<int>(p.rows), p.x, p.ldx, p.weight->in, block, other, values, others);
  adapt(p, false, first, 0, p.rows, values, kBlock);
  adapt(p, is_gated, second, 0, p.rows, others, kBlock);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* y = p.y + r * p.ldy + first;
    finish_row(p, values + r * kBlock, others + r * kBlock, first, y);
    if (!is_gated) finish_row(p, others + r * kBlock, nullptr, second, y + kBlock);
  }
  return is_gated ? b + 1 : b + 2;
}

template <typename W>
inline void multiply_blocks(Thread& thread, const Product& p) {
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t num_items = (num_blocks + kBlocksAtOnce - 1) / kBlocksAtOnce;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * kBlocksAtOnce);
    for (int64_t b = item * kBlocksAtOnce; b < end; ++b) {
      if constexpr (sizeof(W) == 2) {
        if (p.rows <= kFewRows && (p.factor != nullptr || b + 1 < end)) {
          b = multiply_two(p, b) - 1;
          continue;
        }
      }
      const W* block = block_of<W>(*p.weight, b);
      const W* other = p.factor != nullptr ? block_of<W>(*p.factor, b) : nullptr;
      if constexpr (sizeof(W) == 2) {
        if (p.rows >= kWidenFrom) {
          const int64_t depth = p.weight->in;
          float* wide = thread.scratch();
          const float* wide_other =
              other == nullptr ? nullptr : widen_block(other, depth, wide + depth * kBlock);
          multiply_block(p, widen_block(block, depth, wide), wide_other, b * kBlock);
          continue;
        }
      }
      multiply_block(p, block, other, b * kBlock);
    }
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
