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

// sums[rows][16] of the block whose first output is `first`; `columns` begins with the first row.
inline void add_outliers_by_rows(const Matrix& weight, int64_t first, const float* columns,
                                 int64_t wide, int64_t rows, float* sums) {
  const Codes& codes = *weight.codes;
  const int64_t* firsts = codes.outlier_first + first;
  const int64_t count = std::min<int64_t>(kBlock, weight.out - first);
  for (int64_t o = 0; o < count; o += kLanes) {
    const int64_t outputs = std::min<int64_t>(kLanes, count - o);
    if (firsts[o] == firsts[o + outputs]) continue;
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, rows - row);
      float* of_rows = sums + row * kBlock + o;
      vf square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        square[r] = r < some ? load(of_rows + r * kBlock) : all(0.0f);
      }
      transpose(square);
      for (int64_t i = 0; i < outputs; ++i) {
        vf sum = square[i];
        for (int64_t e = firsts[o + i]; e < firsts[o + i + 1]; ++e) {
          sum = load(columns + codes.outlier_columns[e] * wide + row) * codes.outlier_values[e] + sum;
        }
        square[i] = sum;
      }
      transpose(square);
      for (int64_t r = 0; r < some; ++r) store(of_rows + r * kBlock, square[r]);
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
