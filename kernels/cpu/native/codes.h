// How a block of a weight in codes lies, and the inputs that it is multiplied with. See Codes in
// abi.h.
#pragma once
#include "abi.h"
#include "table_layout.h"

namespace quire {

// Bytes.
struct CodesLayout {
  int64_t num_units;
  int64_t head;        // before the first unit
  int64_t front;       // of a unit, before its codes
  int64_t unit_bytes;  // from one to the next
};

inline CodesLayout layout_of(const Codes& codes, int64_t in, int32_t dtype) {
  const bool halves = dtype == kInt4 || dtype == kTable4;
  const int64_t scales = 16 * sizeof(float) + (codes.has_zeros ? 16 * sizeof(int16_t) : 0);
  const int64_t front = codes.scales_units ? scales : 0;
  const int64_t tables = dtype == kTable4 && codes.has_tables ? kTableScales + kTableBytes : 0;
  return {padded(in, codes.unit) / codes.unit, scales - front + tables, front,
          front + codes.unit * (halves ? 8 : 16)};
}

// Of a row of inputs, once it is rounded for integer codes: 16 bits for each column, and for each
// unit the step of its numbers and their sum.
inline int64_t rounded_row_bytes(const Codes& codes, int64_t in) {
  const int64_t columns = padded(in, codes.unit);
  return padded(2 * columns + 8 * (columns / codes.unit), 64);
}

// The same for entries of tables, whose inputs take twice as much where they are pairs.
inline int64_t rounded_table_row_bytes(const Codes& codes, int64_t in) {
  const int64_t columns = padded(in, codes.unit);
  return padded(4 * columns + 8 * (columns / codes.unit), 64);
}

// And where these are wanted as they are besides: for outliers.
inline int64_t outlier_row_bytes(const Codes& codes, int64_t in) {
  return codes.outlier_first == nullptr ? 0 : padded(4 * in, 64);
}

// The same for codes that stand for floats: 32 bits for each column, where inputs are not taken as
// they are.
inline int64_t arranged_row_bytes(const Codes& codes, int64_t in) {
  return codes.order == nullptr && codes.factors == nullptr ? 0 : padded(4 * in, 64);
}

// And where they go in two, 16 bits each, 32 columns at a time.
inline int64_t split_row_bytes(int64_t in) { return 2 * 2 * padded(in, 32); }

}  // namespace quire
