// Blocks: how a packed weight lies, 16 output features at a time. See Matrix in abi.h.
#pragma once
#include "abi.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {

constexpr int kBlock = 16;  // output features per block of a packed weight
constexpr int kVectors = kBlock / kLanes;

template <typename W>
inline const W* block_of(const Matrix& a, int64_t index) {
  return index < a.out / kBlock ? static_cast<const W*>(a.blocks) + index * kBlock * a.in
                                : static_cast<const W*>(a.tail);
}

// From one block to the next.
inline int64_t block_bytes(const Matrix& a) {
  if (a.codes != nullptr) return a.codes->block_bytes;
  return kBlock * a.in * (a.dtype == kBFloat16 ? 2 : 4);
}

inline const float* widen_block(const uint16_t* block, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int v = 0; v < kBlock; v += kLanes) {
      const vu pairs = load_as<vu>(block + k * kBlock + 2 * v);
      store(out + k * kBlock + v, widen_low(pairs));
      store(out + (k + 1) * kBlock + v, widen_high(pairs));
    }
  }
  return out;
}

}  // namespace QUIRE_ISA
}  // namespace quire
