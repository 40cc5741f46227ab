// Sums of blocks of entries of tables by tiles of bytes.
#pragma once
#include "int_tiles.h"
#include "table_rounding.h"
#include "table_units.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
static_assert(kVectors == 1);

// Adds what a unit's bytes make of up to 16 rows, or 32, of which the first is `row`.
template <int As>
inline void add_table_tiles(const char* bytes, int64_t unit, const UnitScales& scales,
                            const RoundedRows& x, int64_t row, int64_t rows, int64_t u,
                            float* sums) {
  alignas(64) uint32_t parts[2 * As][16 * kBlock];
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (As == 2) {
    tile_zero<2>();
    tile_zero<3>();
  }
  const char* inputs = x.row(row) + u * 2 * unit;
  for (int64_t k = 0; k < unit; k += 64, inputs += 64, bytes += 1024) {
    tile_load<6>(bytes, 64);
    tile_load<4>(inputs, x.stride);
    tile_dot_signed<0, 4, 6>();
    tile_load<7>(bytes + unit * 16, 64);
    tile_dot_signed<1, 4, 7>();
    tile_load<5>(inputs + unit, x.stride);
    tile_dot_signed<1, 5, 6>();
    if constexpr (As == 2) {
      tile_load<4>(inputs + 16 * x.stride, x.stride);
      tile_dot_signed<2, 4, 6>();
      tile_dot_signed<3, 4, 7>();
      tile_load<5>(inputs + unit + 16 * x.stride, x.stride);
      tile_dot_signed<3, 5, 6>();
    }
  }
  tile_store<0>(parts[0], 64);
  tile_store<1>(parts[1], 64);
  if constexpr (As == 2) {
    tile_store<2>(parts[2], 64);
    tile_store<3>(parts[3], 64);
  }
  const float* steps = x.steps + u * x.rows + row;
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* part = parts[r / 16 * 2] + r % 16 * kBlock;
    const vu sum = (load_as<vu>(part) << 8) + load_as<vu>(part + 16 * kBlock);
    add_scaled((vi)sum, scales, 0, steps[r], sums + r * kBlock);
  }
}

// sums[i][r][0:16]: what sum_many_tables makes of each of some blocks, whose inputs and units are the
// same; `rows` are at most kRowsOfCodes.
inline void sum_table_tiles(const TableBlock* blocks, int count, const RoundedRows& x, int64_t row,
                            int64_t rows, float (*sums)[kRowsOfCodes * kBlock]) {
  const int64_t unit = blocks[0].weight->codes->unit;
  const int64_t num_items = blocks[0].layout.num_units * count;
  // What is stored is loaded as a tile only when it has left the store buffer: so the next unit is
  // spread before one is multiplied.
  alignas(64) char memory[2][2 * kMostUnit * kBlock];
  auto spread = [&](int64_t item) {
    const TableBlock& block = blocks[item % count];
    const char* codes = codes_of_unit(block.layout, block.block, item / count);
    with_table_kind(*block.weight->codes, [&](auto kind) {
      spread_tables<kind()>(block.tables, codes, unit, memory[item % 2]);
    });
  };
  for (int i = 0; i < count; ++i) std::fill(sums[i], sums[i] + rows * kBlock, 0.0f);
  spread(0);
  for (int64_t item = 0; item < num_items; ++item) {
    if (item + 1 < num_items) spread(item + 1);
    const int64_t u = item / count;
    const UnitScales scales = blocks[item % count].of_unit(u);
    for (int64_t r = 0; r < rows; r += 32) {
      const int64_t some = std::min<int64_t>(32, rows - r);
      float* to = sums[item % count] + r * kBlock;
      if (some <= 16) {
        add_table_tiles<1>(memory[item % 2], unit, scales, x, row + r, some, u, to);
      } else {
        add_table_tiles<2>(memory[item % 2], unit, scales, x, row + r, some, u, to);
      }
    }
  }
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
