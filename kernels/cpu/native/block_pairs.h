// Two blocks of weights that rows are multiplied with at once: neighbours, or, where there is a
// factor, one of either matrix. The second may be missing.
#pragma once
#include "gemm.h"

namespace quire {
namespace QUIRE_ISA {

constexpr int64_t kPairWidth = 2 * kBlock;

// Sums [rows][32] of `count` blocks, to their places; `first` is the first one's first output.
inline void finish_pair(const Product& p, int64_t first, int count, float* sums, int64_t row,
                        int64_t rows) {
  const bool is_gated = p.factor != nullptr;
  adapt(p, false, first, row, rows, sums, kPairWidth);
  if (count == 2) {
    adapt(p, is_gated, is_gated ? first : first + kBlock, row, rows, sums + kBlock, kPairWidth);
  }
  for (int64_t r = 0; r < rows; ++r, sums += kPairWidth) {
    float* y = p.y + (row + r) * p.ldy + first;
    finish_row(p, sums, sums + kBlock, first, y);
    if (!is_gated && count == 2) {
      finish_row(p, sums + kBlock, nullptr, first + kBlock, y + kBlock);
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
