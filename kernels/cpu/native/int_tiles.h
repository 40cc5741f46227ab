// Sums of a block of integer codes by tiles of bytes. Inputs of 16 bits go in two: 256 times what the
// upper bytes make and what the lower ones make is the sum that pairs of 16 bits have.
#pragma once
#include "int_units.h"
#include "rounding.h"
#include "tiles.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
// A unit of 4-bit codes as bytes, which are tiles of it.
inline void spread_unit(const char* codes, int64_t unit, char* bytes) {
  for (int64_t i = 0; i < unit / 8; ++i, codes += 64, bytes += 128) {
    __builtin_prefetch(codes + kCodesAhead);
    const vu both = load_as<vu>(codes);
    const vu low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
    std::memcpy(bytes, &low, 64);
    std::memcpy(bytes + 64, &high, 64);
  }
}

// Adds what the tiles of a unit make of up to 16 rows, or 32, of which the first is `row`. `Ahead`:
// the tiles that far on are asked for, a few at a time: memory takes no more at once.
template <bool To8Bits, int As, int Ahead>
inline void add_unit_tiles(const char* tiles, int64_t unit, const UnitScales& scales,
                           const RoundedRows& x, int64_t row, int64_t rows, int64_t u,
                           float* sums) {
  alignas(64) int32_t parts[2 * As][16 * kBlock];
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (As == 2) {
    tile_zero<2>();
    tile_zero<3>();
  }
  const char* inputs = x.row(row) + u * 2 * unit;
  for (int64_t k = 0; k < unit; k += 64, inputs += 128, tiles += 1024) {
    if constexpr (Ahead > 0) {
#pragma GCC unroll 16
      for (int line = 0; line < 1024; line += 64) __builtin_prefetch(tiles + Ahead + line);
    }
    tile_load<6>(tiles, 64);
    tile_load<4>(inputs, x.stride);
    tile_dot_signed<0, 4, 6>();
    if constexpr (As == 2) {
      tile_load<5>(inputs + 16 * x.stride, x.stride);
      tile_dot_signed<2, 5, 6>();
    }
    if constexpr (To8Bits) continue;
    tile_load<4>(inputs + 64, x.stride);
    tile_dot_unsigned<1, 4, 6>();
    if constexpr (As == 2) {
      tile_load<5>(inputs + 64 + 16 * x.stride, x.stride);
      tile_dot_unsigned<3, 5, 6>();
    }
  }
  tile_store<0>(parts[0], 64);
  tile_store<1>(parts[1], 64);
  if constexpr (As == 2) {
    tile_store<2>(parts[2], 64);
    tile_store<3>(parts[3], 64);
  }
  const float* steps = x.steps + u * x.rows + row;
  const int32_t* totals = x.totals + u * x.rows + row;
  for (int64_t r = 0; r < rows; ++r) {
    vi sum = load_as<vi>(parts[r / 16 * 2] + r % 16 * kBlock);
    if constexpr (!To8Bits) sum = sum * 256 + load_as<vi>(parts[r / 16 * 2 + 1] + r % 16 * kBlock);
    if (scales.has_zeros) sum -= scales.zeros[0] * totals[r];
    add_scaled(sum, scales, 0, steps[r], sums + r * kBlock);
  }
}

// Blocks that are gone over side by side, unit by unit: so a unit's inputs are near for all but the
// first of them.
constexpr int kTileBlocks = 4;

struct CodeBlocks {
  const Matrix* weights[kTileBlocks];  // laid out alike
  const char* blocks[kTileBlocks];
  int count = 0;

  void add(const Matrix& weight, int64_t b) {
    weights[count] = &weight;
    blocks[count++] = codes_block(weight, b);
  }
};

// sums[i][r][0:16]: what sum_many makes of each of some blocks, of inputs as bytes; `rows` are at
// most kRowsOfCodes.
template <bool Nibbles, bool To8Bits>
inline void sum_tiles(const CodeBlocks& all, const CodesLayout& layout, const RoundedRows& x,
                      int64_t row, int64_t rows, float (*sums)[kRowsOfCodes * kBlock]) {
  static_assert(kVectors == 1);
  const int64_t unit = all.weights[0]->codes->unit;
  alignas(64) char bytes[kMostUnit * kBlock];
  for (int64_t u = 0; u < layout.num_units; ++u) {
    for (int i = 0; i < all.count; ++i) {
      const UnitScales scales = load_scales(*all.weights[i], layout, all.blocks[i], u);
      const char* tiles = codes_of_unit(layout, all.blocks[i], u);
      if constexpr (Nibbles) {
        spread_unit(tiles, unit, bytes);
        tiles = bytes;
      }
      for (int64_t r = 0; r < rows; r += 32) {
        const int64_t some = std::min<int64_t>(32, rows - r);
        float* to = sums[i] + r * kBlock;
        constexpr int kAhead = Nibbles ? 0 : kCodesAhead;
        if (some <= 16) {
          add_unit_tiles<To8Bits, 1, kAhead>(tiles, unit, scales, x, row + r, some, u, to);
        } else if (r == 0) {
          add_unit_tiles<To8Bits, 2, kAhead>(tiles, unit, scales, x, row + r, some, u, to);
        } else {
          add_unit_tiles<To8Bits, 2, 0>(tiles, unit, scales, x, row + r, some, u, to);
        }
      }
    }
  }
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
