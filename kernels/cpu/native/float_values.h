// Single values of codes that stand for floats, and rows of them.
#pragma once
#include <cstring>

#include "blocks.h"
#include "codes.h"
#include "table_layout.h"

namespace quire {
namespace QUIRE_ISA {

// e4m3 is float32 with fewer digits, but for the bias of its exponent: moved to their places, its
// bits make a number 2^-120 as large.
constexpr float kFloat8Bias = 0x1p120f;

inline float value_of_float8(uint8_t code) {
  const uint32_t bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * kFloat8Bias;
}

// Output `id` of a weight, as it would be dequantized.
inline void read_values(const Matrix& weight, int64_t id, float* out) {
  const Codes& codes = *weight.codes;
  const CodesLayout layout = layout_of(codes, weight.in, weight.dtype);
  const int64_t output = id % kBlock;
  const char* block = static_cast<const char*>(weight.blocks) + id / kBlock * codes.block_bytes;
  const float* table = codes.has_tables ? codes.tables + id * 16 : codes.tables;
  auto input = [&](int64_t column) {
    return codes.order != nullptr ? codes.order[column] : column;
  };
  for (int64_t column = 0; column < weight.in; ++column) {
    const int64_t k = column % codes.unit;
    const char* unit = block + column / codes.unit * layout.unit_bytes;
    const float* scales =
        reinterpret_cast<const float*>(codes.scales_units ? unit + layout.head : block);
    unit += layout.head + layout.front;
    float value;
    if (weight.dtype == kFloat8) {
      value = value_of_float8(unit[k / 4 * 64 + output * 4 + k % 4]);
    } else {
      const Nibble place = table_place(codes, k, output);
      value = table[static_cast<uint8_t>(unit[place.byte]) >> place.shift & 15];
    }
    out[input(column)] = value * scales[output];
  }
  if (codes.outlier_first != nullptr) {
    for (int64_t e = codes.outlier_first[id]; e < codes.outlier_first[id + 1]; ++e) {
      out[input(codes.outlier_columns[e])] += codes.outlier_values[e];
    }
  }
  if (codes.factors == nullptr) return;
  for (int64_t column = 0; column < weight.in; ++column) {
    out[input(column)] *= codes.factors[column];
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
