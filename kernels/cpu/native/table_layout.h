// How codes of a table lie in a unit. See Codes in abi.h.
#pragma once
#include "abi.h"

namespace quire {

// With one table, four inputs lie together: a lookup of bytes and two rounds of interleaving within
// 16 of them bring the floats of 16 outputs into order. With a table for each output, 32 do: 16
// bytes have 32 codes of one output, and its neighbour is the one 4 further on, beside which it is
// wanted in a vector of 8. Units that are no multiple of 32 have 8 together.
constexpr int kTablesTogether = 32;

inline int64_t inputs_together(const Codes& codes) {
  if (!codes.has_tables) return 4;
  return codes.unit % kTablesTogether == 0 ? kTablesTogether : 8;
}

inline int64_t place_among_outputs(int64_t output) {
  return output / 8 * 8 + output % 4 * 2 + output / 4 % 2;
}

// Where a code lies in its unit: the byte, counted from its output's place, and which half of it.
struct Nibble {
  int64_t byte;
  int shift;
};

// Of input `k` of a unit.
inline Nibble table_place(const Codes& codes, int64_t k) {
  const int64_t count = inputs_together(codes), half = count / 2, at = k % count;
  const int64_t byte = codes.has_tables ? at % half : at % half * 8;
  return {k / count * count * 8 + byte, at < half ? 0 : 4};
}

inline int64_t place_of_output(const Codes& codes, int64_t output) {
  if (codes.has_tables) return place_among_outputs(output) * (inputs_together(codes) / 2);
  return output / 4 % 2 * 16 + output / 8 * 4 + output % 4;
}

}  // namespace quire
