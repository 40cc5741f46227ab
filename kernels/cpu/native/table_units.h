// A unit of a block of codes that stand for entries of tables: its entries as whole numbers, bytes of
// four inputs for each of 16 outputs.
#pragma once
#include <utility>

#include "blocks.h"
#include "codes.h"
#include "int_units.h"

namespace quire {
namespace QUIRE_ISA {

// How tables and codes belong together: one table; a table for each output, with codes that lie by
// output, or that do not.
enum class TableKind { kOne, kByOutput, kScattered };

inline TableKind table_kind(const Codes& codes) {
  if (!codes.has_tables) return TableKind::kOne;
  return lies_by_output(codes) ? TableKind::kByOutput : TableKind::kScattered;
}

// Call `with` with a kind as a constant.
template <typename With>
inline void with_table_kind(const Codes& codes, With with) {
  switch (table_kind(codes)) {
    case TableKind::kOne:
      with(std::integral_constant<TableKind, TableKind::kOne>());
      return;
    case TableKind::kByOutput:
      with(std::integral_constant<TableKind, TableKind::kByOutput>());
      return;
    case TableKind::kScattered:
      with(std::integral_constant<TableKind, TableKind::kScattered>());
  }
}

// Inputs that are looked up together, the bytes of their codes, and those of tables.
template <TableKind Kind>
constexpr int64_t kInputsOfStep = Kind == TableKind::kByOutput ? kTablesTogether : 8;
template <TableKind Kind>
constexpr int64_t kBytesOfStep = 8 * kInputsOfStep<Kind>;
template <TableKind Kind>
constexpr int64_t kTableMemory = Kind == TableKind::kOne ? 128 : kTableBytes;

// One table as all outputs want it: 64 upper bytes and 64 lower ones, which are 16 four times.
struct OneTable {
  alignas(64) char bytes[128] = {};
  float scale = 0.0f;

  explicit OneTable(const Codes& codes) {
    if (codes.has_tables) return;
    const WholeTable table = whole_table(codes.tables);
    for (int i = 0; i < 64; i += 16) {
      std::memcpy(bytes + i, table.upper, 16);
      std::memcpy(bytes + 64 + i, table.lower, 16);
    }
    scale = table.scale;
  }
};

// A block, and the tables that belong to it.
struct TableBlock {
  const Matrix* weight;
  int64_t number;
  CodesLayout layout;
  const char* block;
  const char* tables;
  vf scales[kVectors];  // of tables

  TableBlock() = default;
  TableBlock(const Matrix& weight, const OneTable& one, int64_t number)
      : weight(&weight),
        number(number),
        layout(layout_of(*weight.codes, weight.in, weight.dtype)),
        block(codes_block(weight, number)),
        tables(one.bytes) {
    const bool has_tables = weight.codes->has_tables;
    if (has_tables) tables = block + layout.head - kTableBytes;
    const float* from = reinterpret_cast<const float*>(tables - kTableScales);
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = has_tables ? load(from + v * kLanes) : all(one.scale);
    }
  }

  // Of a unit, or ones where scales are the block's.
  UnitScales of_unit(int64_t u) const {
    const char* from = block + layout.head + u * layout.unit_bytes;
    UnitScales result{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      result.scales[v] =
          layout.front > 0 ? load_as<vf>(from + v * kLanes * 4) * scales[v] : all(1.0f);
    }
    return result;
  }
};

// Bytes of a table of 16, within each 16 bytes; indices are below 16.
inline vu look_up(vu table, vu indices) {
#if defined(__AVX512BW__)
  return (vu)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
#elif defined(__AVX2__) && !defined(QUIRE_WIDE)
  return (vu)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
#elif defined(__aarch64__) && !defined(QUIRE_WIDE)
  return (vu)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)indices);
#else
  uint8_t from[4 * kLanes], at[4 * kLanes];
  std::memcpy(from, &table, sizeof from);
  std::memcpy(at, &indices, sizeof at);
  for (int i = 0; i < 4 * kLanes; ++i) at[i] = from[i / 16 * 16 + at[i]];
  return load_as<vu>(at);
#endif
}

template <typename Index, int... Lane>
inline vu pick(vu a, vu b, Index index, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(Lane)...);
#else
  constexpr vi kLane = {index(Lane)...};
  return __builtin_shuffle(a, b, kLane);
#endif
}

// Four numbers of 32 bits in each 16 bytes of four vectors: number `j` of vector `i` becomes number
// `i` of vector `j`.
inline void transpose_fours(vu (&v)[4]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  constexpr auto low = [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes; };
  constexpr auto high = [](int i) { return i / 4 * 4 + 2 + i % 4 / 2 + i % 2 * kLanes; };
  constexpr auto low_two = [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes; };
  constexpr auto high_two = [](int i) { return i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * kLanes; };
  const vu a = pick(v[0], v[1], low, lanes), b = pick(v[2], v[3], low, lanes);
  const vu c = pick(v[0], v[1], high, lanes), d = pick(v[2], v[3], high, lanes);
  v[0] = pick(a, b, low_two, lanes);
  v[1] = pick(a, b, high_two, lanes);
  v[2] = pick(c, d, low_two, lanes);
  v[3] = pick(c, d, high_two, lanes);
}

// Call `use` with the numbers of four inputs of a step, from 0 on, and the upper and the lower bytes
// of their entries, of vector `v` of the outputs.
template <TableKind Kind, typename Use>
inline void look_up_step(const char* tables, const char* codes, int v, Use use) {
  const int64_t first = v * kLanes * 4;
  if constexpr (Kind == TableKind::kOne) {
    const vu upper = load_as<vu>(tables), lower = load_as<vu>(tables + 64);
    const vu both = load_as<vu>(codes + first);
    const vu low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
    use(0, look_up(upper, low), look_up(lower, low));
    use(1, look_up(upper, high), look_up(lower, high));
  } else if constexpr (Kind == TableKind::kByOutput) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vu upper[4], lower[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vu both = load_as<vu>(codes + j * 64 + first);
        const vu own = (half == 0 ? both : both >> 4) & 0x0f0f0f0fu;
        upper[j] = look_up(load_as<vu>(tables + j * 128 + first), own);
        lower[j] = look_up(load_as<vu>(tables + j * 128 + 64 + first), own);
      }
      transpose_fours(upper);
      transpose_fours(lower);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) use(4 * half + j, upper[j], lower[j]);
    }
  } else {
    for (int half = 0; half < 2; ++half) {
      char upper[4 * kLanes], lower[4 * kLanes];
      for (int i = 0; i < 4 * kLanes; ++i) {
        const char* table = tables + table_of_output(v * kLanes + i / 4);
        const int code = static_cast<uint8_t>(codes[first + i]) >> 4 * half & 15;
        upper[i] = table[code];
        lower[i] = table[64 + code];
      }
      use(half, load_as<vu>(upper), load_as<vu>(lower));
    }
  }
}

// A unit's entries as bytes, [unit / 4][16 outputs][4]: all upper ones, then all lower ones.
template <TableKind Kind>
inline void spread_tables(const char* tables, const char* codes, int64_t unit, char* bytes) {
  for (int64_t k = 0; k < unit; k += kInputsOfStep<Kind>, codes += kBytesOfStep<Kind>) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kBytesOfStep<Kind>; line += 64) {
      __builtin_prefetch(codes + kCodesAhead + line);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      look_up_step<Kind>(tables, codes, v, [&](int four, vu upper, vu lower) {
        char* to = bytes + (k / 4 + four) * 64 + v * kLanes * 4;
        std::memcpy(to, &upper, sizeof upper);
        std::memcpy(to + unit * 16, &lower, sizeof lower);
      });
    }
  }
}

// Bytes with signs as pairs of 16 bits: the first and the third of each four, and the others.
inline void widen_fours(vu fours, vu (&pairs)[2]) { widen_codes<false>(fours, pairs); }

// A unit's entries as pairs of 16 bits, [unit / 2][16 outputs]: all upper ones, then all lower ones.
template <TableKind Kind>
inline void widen_tables(const char* tables, const char* codes, int64_t unit, uint32_t* wide) {
  for (int64_t k = 0; k < unit; k += kInputsOfStep<Kind>, codes += kBytesOfStep<Kind>) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kBytesOfStep<Kind>; line += 64) {
      __builtin_prefetch(codes + kCodesAhead + line);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      look_up_step<Kind>(tables, codes, v, [&](int four, vu upper, vu lower) {
        uint32_t* to = wide + (k / 2 + 2 * four) * kBlock + v * kLanes;
        vu pairs[2];
        widen_fours(upper, pairs);
        std::memcpy(to, &pairs[0], sizeof(vu));
        std::memcpy(to + kBlock, &pairs[1], sizeof(vu));
        to += unit / 2 * kBlock;
        widen_fours(lower, pairs);
        std::memcpy(to, &pairs[0], sizeof(vu));
        std::memcpy(to + kBlock, &pairs[1], sizeof(vu));
      });
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
