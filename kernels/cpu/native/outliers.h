// Values that stand beside a weight in codes, added to the sums of many rows: lanes are rows, so that
// the inputs of a value are one vector for each few of them.
//
// Row by row, these are the additions of `add_outliers` in gemm.h, in its order.
#pragma once
#include "chunk.h"
#include "float_codes.h"

namespace quire {
namespace QUIRE_ISA {

// Of inputs turned into columns, rows are a multiple of these.
constexpr int64_t kRowsTogether = 16;

// Inputs in the order of a weight's columns, turned to [columns][rows], rows filled up with anything.
inline const float* turn_inputs(Thread& thread, const Product& p, float* out) {
  const Codes& codes = *p.weight->codes;
  const int64_t depth = p.weight->in, wide = padded(p.rows, kRowsTogether);
  constexpr int64_t kColumns = 64;
  static_assert(kColumns % kLanes == 0);
  thread.share((depth + kColumns - 1) / kColumns, [&](int64_t item) {
    const int64_t begin = item * kColumns, end = std::min(depth, begin + kColumns);
    const bool is_plain = codes.order == nullptr && codes.factors == nullptr;
    for (int64_t row = 0; row < p.rows; row += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, p.rows - row);
      const bool is_there = is_plain && end - begin == kColumns;
      if (is_there && rows == kLanes) {  // as below, in registers
        for (int64_t k = begin; k < end; k += kLanes) {
          vf square[kLanes];
#pragma GCC unroll 16
          for (int r = 0; r < kLanes; ++r) square[r] = load(p.x + (row + r) * p.ldx + k);
          transpose(square);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(out + (k + i) * wide + row, square[i]);
        }
        continue;
      }
      float memory[kLanes][kColumns];
      if (!is_there) {
        std::memset(memory, 0, sizeof memory);
        for (int64_t r = 0; r < rows; ++r) {
          arrange_columns(codes, p.x + (row + r) * p.ldx, begin, end, memory[r] - begin);
        }
      }
      for (int64_t k = begin; k < end; k += kLanes) {
        vf square[kLanes] = {};
        for (int64_t r = 0; r < rows; ++r) {
          square[r] = load(is_there ? p.x + (row + r) * p.ldx + k : memory[r] + k - begin);
        }
        transpose(square);
        const int64_t count = std::min<int64_t>(kLanes, end - k);
        for (int64_t i = 0; i < count; ++i) store(out + (k + i) * wide + row, square[i]);
      }
    }
  });
  return out;
}

// Ask early for the values of the block whose first output is `first`.
inline void prefetch_outliers(const Matrix& weight, int64_t first) {
  const Codes& codes = *weight.codes;
  if (codes.outlier_first == nullptr) return;
  const int64_t end = codes.outlier_first[std::min<int64_t>(first + kBlock, weight.out)];
  for (int64_t e = codes.outlier_first[first]; e < end; e += 16) {
    __builtin_prefetch(codes.outlier_columns + e);
    __builtin_prefetch(codes.outlier_values + e);
  }
}

// What outliers of `outputs` outputs add to sums of `Groups` vectors of rows, [outputs][Groups]: a chain
// of additions for each vector, side by side.
template <int Groups>
inline void add_outliers_to_columns(const Codes& codes, const int64_t* firsts, int64_t outputs,
                                    const float* columns, int64_t wide,
                                    vf (&squares)[Groups][kLanes]) {
  for (int64_t o = 0; o < outputs; ++o) {
    vf sums[Groups];
    for (int g = 0; g < Groups; ++g) sums[g] = squares[g][o];
    for (int64_t e = firsts[o]; e < firsts[o + 1]; ++e) {
      const float* column = columns + codes.outlier_columns[e] * wide;
      const float value = codes.outlier_values[e];
      for (int g = 0; g < Groups; ++g) sums[g] = load(column + g * kLanes) * value + sums[g];
    }
    for (int g = 0; g < Groups; ++g) squares[g][o] = sums[g];
  }
}

// sums[rows][16] of the block whose first output is `first`; `columns` begins with the first row.
inline void add_outliers_by_rows(const Matrix& weight, int64_t first, const float* columns,
                                 int64_t wide, int64_t rows, float* sums) {
  const Codes& codes = *weight.codes;
  const int64_t* firsts = codes.outlier_first + first;
  const int64_t count = std::min<int64_t>(kBlock, weight.out - first);
  for (int64_t o = 0; o < count; o += kLanes) {
    const int64_t outputs = std::min<int64_t>(kLanes, count - o);
    if (firsts[o] == firsts[o + outputs]) continue;
    auto add = [&](int64_t row, auto groups) {
      vf squares[groups()][kLanes];
      float* of_rows = sums + row * kBlock + o;
      const int64_t some = std::min<int64_t>(groups() * kLanes, rows - row);
      if (some == groups() * kLanes) {
        for (int g = 0; g < groups(); ++g) {
#pragma GCC unroll 16
          for (int r = 0; r < kLanes; ++r) {
            squares[g][r] = load(of_rows + (g * kLanes + r) * kBlock);
          }
        }
      } else {
        std::memset(squares, 0, sizeof squares);
        for (int64_t r = 0; r < some; ++r) {
          squares[r / kLanes][r % kLanes] = load(of_rows + r * kBlock);
        }
      }
      for (int g = 0; g < groups(); ++g) transpose(squares[g]);
      add_outliers_to_columns<groups()>(codes, firsts + o, outputs, columns + row, wide, squares);
      for (int g = 0; g < groups(); ++g) transpose(squares[g]);
      for (int64_t r = 0; r < some; ++r) {
        store(of_rows + r * kBlock, squares[r / kLanes][r % kLanes]);
      }
    };
    int64_t row = 0;
    for (; row + kLanes < rows; row += 2 * kLanes) add(row, std::integral_constant<int, 2>());
    if (row < rows) add(row, std::integral_constant<int, 1>());
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
