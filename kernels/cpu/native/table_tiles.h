// Sums of blocks of entries of tables by tiles of bytes.
#pragma once
#include "int_tiles.h"
#include "table_rounding.h"
#include "table_units.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
static_assert(kVectors == 1);

// A unit's bytes, and inputs of 16 rows, or of `others` beside these: what tiles multiply at a time.
struct TableStep {
  const char* bytes;
  const char *inputs, *others;  // the latter may be null
  int64_t unit;

  // The tiles that come first for 64 columns from `k` on.
  void load(int64_t k) const {
    tile_load<6>(bytes + k * 16, 64);
    tile_load<7>(bytes + unit * 16 + k * 16, 64);
    tile_load<4>(inputs + k * 32, 64);
    tile_load<5>(others != nullptr ? others + k * 32 : inputs + k * 32 + 1024, 64);
  }

  // To tiles 0 to 3: of each 16 rows, the sums of upper bytes, and those of upper with lower ones, in
  // two parts where there are no others.
  void multiply(int64_t k) const {
    tile_dot_signed<0, 4, 6>();
    tile_dot_signed<1, 4, 7>();
    if (others == nullptr) {
      tile_dot_signed<2, 5, 6>();
      return;
    }
    tile_dot_signed<2, 5, 6>();
    tile_dot_signed<3, 5, 7>();
    tile_load<4>(inputs + k * 32 + 1024, 64);
    tile_dot_signed<1, 4, 6>();
    tile_load<5>(others + k * 32 + 1024, 64);
    tile_dot_signed<3, 5, 6>();
  }
};

// Adds that to sums of up to 16 rows, scaled. `Parts`: as many as the lower bytes have.
template <int Parts>
inline void add_table_parts(const uint32_t (*parts)[16 * kBlock], vf scales, const float* steps,
                            int64_t rows, float* sums) {
  const uint32_t *upper = parts[0], *lower = parts[1];
  for (int64_t i = 0; i < rows; ++i, upper += kBlock, lower += kBlock, sums += kBlock) {
    vu sum = (load_as<vu>(upper) << 8) + load_as<vu>(lower);
    if constexpr (Parts == 2) sum += load_as<vu>(lower + 16 * kBlock);
    store(sums, __builtin_convertvector((vi)sum, vf) * (scales * steps[i]) + load(sums));
  }
}

// sums[i][r][0:16]: what sum_many_tables makes of each of some blocks, whose inputs and units are the
// same; `rows` are at most kRowsOfCodes.
inline void sum_table_tiles(const TableBlock* blocks, int count, const RoundedTableRows& x, int64_t row,
                            int64_t rows, float (*sums)[kRowsOfCodes * kBlock]) {
  const int64_t unit = blocks[0].weight->codes->unit;
  const int64_t num_items = blocks[0].layout.num_units * count;
  // What is stored is loaded as a tile only when it has left the store buffer: so the next unit is
  // spread before one is multiplied.
  constexpr int kAhead = 2, kBuffers = kAhead + 1;
  alignas(64) char memory[kBuffers][2 * kMostUnit * kBlock];
  alignas(64) uint32_t parts[4][16 * kBlock];
  auto spread = [&](int64_t item) {
    const TableBlock& block = blocks[item % count];
    const char* codes = codes_of_unit(block.layout, block.block, item / count);
    with_table_kind(*block.weight->codes, [&](auto kind) {
      spread_tables<kind()>(block.tables, codes, unit, memory[item % kBuffers]);
    });
  };
  for (int i = 0; i < count; ++i) std::fill(sums[i], sums[i] + rows * kBlock, 0.0f);
  // While tiles are multiplied, what they made before is added up, and a further unit is spread; what
  // they are to multiply next is loaded before that, and what they made is stored after it: stores
  // that wait hold up all that comes behind them, above all loads of tiles.
  const int64_t groups = (rows + 31) / 32;
  auto step_at = [&](int64_t item, int64_t group) {
    const int64_t u = item / count, first = row + group * 32;
    const bool has_others = rows - group * 32 > 16;
    return TableStep{memory[item % kBuffers], x.at(first, u),
                     has_others ? x.at(first + 16, u) : nullptr, unit};
  };
  struct Waiting {
    vf scales;
    const float* steps;
    int64_t rows = 0;
    float* sums;
  } waiting;
  auto finish = [&] {
    if (waiting.rows > 16) {
      add_table_parts<1>(parts, waiting.scales, waiting.steps, 16, waiting.sums);
      add_table_parts<1>(parts + 2, waiting.scales, waiting.steps + 16, waiting.rows - 16,
                         waiting.sums + 16 * kBlock);
    } else {
      add_table_parts<2>(parts, waiting.scales, waiting.steps, waiting.rows, waiting.sums);
    }
  };
  for (int64_t item = 0; item < std::min<int64_t>(kAhead, num_items); ++item) spread(item);
  TableStep step = step_at(0, 0);
  step.load(0);
  for (int64_t item = 0; item < num_items; ++item) {
    const int64_t u = item / count;
    const vf scales = blocks[item % count].of_unit(u).scales[0];
    for (int64_t group = 0; group < groups; ++group) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      step.multiply(0);
      for (int64_t k = 64; k < unit; k += 64) {
        step.load(k);
        step.multiply(k);
      }
      const bool has_others = step.others != nullptr;
      const int64_t next = group + 1 < groups ? item : item + 1;
      if (next < num_items) {
        step = step_at(next, group + 1 < groups ? group + 1 : 0);
        step.load(0);
      }
      finish();
      if (group == 0 && item + kAhead < num_items) spread(item + kAhead);
      tile_store<0>(parts[0], 64);
      tile_store<1>(parts[1], 64);
      tile_store<2>(parts[2], 64);
      if (has_others) tile_store<3>(parts[3], 64);
      const int64_t r = group * 32;
      waiting = {scales, x.steps + u * x.rows + row + r, std::min<int64_t>(32, rows - r),
                 sums[item % count] + r * kBlock};
    }
  }
  finish();
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
