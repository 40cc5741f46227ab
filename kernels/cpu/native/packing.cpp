// Weights in codes: into blocks, and back.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "codes.h"
#include "library.h"
#include "table_layout.h"
#include "team.h"

namespace quire {
namespace {

// 8 codes of 4 bits, from the order of their inputs to that of a block: the first four in the low
// halves of its bytes, the others in the high ones.
uint32_t interleave(uint32_t codes) {
  auto spread = [](uint32_t v) {
    v = (v | v << 8) & 0x00ff00ff;
    return (v | v << 4) & 0x0f0f0f0f;
  };
  return spread(codes & 0xffff) | spread(codes >> 16) << 4;
}

uint32_t deinterleave(uint32_t codes) {
  auto gather = [](uint32_t v) {
    v &= 0x0f0f0f0f;
    v = (v | v >> 4) & 0x00ff00ff;
    return (v | v >> 8) & 0xffff;
  };
  return gather(codes) | gather(codes >> 4) << 16;
}

// 4 bytes of every row at a time: 4 columns, or 8 of half a byte. `codes` is a unit's; `count` says
// how many bytes of its rows there are.
void pack_unit(const CodesPacking& p, const char* rows, int64_t num_rows, int64_t count,
               char* codes) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const char* row = rows + r * p.row_bytes;
    for (int64_t i = 0; i < count; i += 4) {
      uint32_t four = 0;
      std::memcpy(&four, row + i, std::min<int64_t>(4, count - i));
      if (p.dtype != kInt8 && p.dtype != kFloat8) four = interleave(four);
      std::memcpy(codes + (i / 4 * 16 + r) * 4, &four, 4);
    }
  }
}

void unpack_unit(const CodesPacking& p, const char* codes, int64_t num_rows, int64_t count,
                 char* rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    char* row = rows + r * p.row_bytes;
    for (int64_t i = 0; i < count; i += 4) {
      uint32_t four;
      std::memcpy(&four, codes + (i / 4 * 16 + r) * 4, 4);
      if (p.dtype != kInt8 && p.dtype != kFloat8) four = deinterleave(four);
      std::memcpy(row + i, &four, std::min<int64_t>(4, count - i));
    }
  }
}

// Codes that lie by output, one by one.
void pack_table_unit(const CodesPacking& p, const char* rows, int64_t num_rows, int64_t count,
                     char* codes) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const char* row = rows + r * p.row_bytes;
    for (int64_t i = 0; i < 2 * count; ++i) {
      const Nibble place = table_place(*p.layout, i, r);
      const int code = static_cast<uint8_t>(row[i / 2]) >> i % 2 * 4 & 15;
      codes[place.byte] |= static_cast<char>(code << place.shift);
    }
  }
}

void unpack_table_unit(const CodesPacking& p, const char* codes, int64_t num_rows, int64_t count,
                       char* rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    char* row = rows + r * p.row_bytes;
    for (int64_t i = 0; i < 2 * count; ++i) {
      const Nibble place = table_place(*p.layout, i, r);
      const int code = static_cast<uint8_t>(codes[place.byte]) >> place.shift & 15;
      row[i / 2] = static_cast<char>(i % 2 == 0 ? code : row[i / 2] | code << 4);
    }
  }
}

// The tables of outputs `first` to first + num_rows - 1.
void pack_tables(const CodesPacking& p, int64_t first, int64_t num_rows, char* to) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (p.layout->has_bfloat16_tables) {
      const BFloat16Table table =
          bfloat16_table(p.layout->tables + (first + r) * 16, p.scales[first + r]);
      std::memcpy(to + kTableScales + r * sizeof table, &table, sizeof table);
      continue;
    }
    const WholeTable table = whole_table(p.layout->tables + (first + r) * 16);
    std::memcpy(to + r * sizeof(float), &table.scale, sizeof(float));
    char* bytes = to + kTableScales + table_of_output(r);
    std::memcpy(bytes, table.upper, 16);
    std::memcpy(bytes + 64, table.lower, 16);
  }
}

// Call `with` with each unit's number, the bytes before it in a row, how many of a row there are,
// and where its codes lie.
template <typename With>
void each_unit(const CodesPacking& p, char* block, With with) {
  const CodesLayout layout = layout_of(*p.layout, p.in, p.dtype);
  const int64_t step = (layout.unit_bytes - layout.front) / 16;
  for (int64_t u = 0; u < layout.num_units; ++u) {
    char* unit = block + layout.head + u * layout.unit_bytes;
    with(u, u * step, std::min(step, p.row_bytes - u * step), unit + layout.front);
  }
}

// The same with each group's number and where its scales lie, as often as they do.
template <typename With>
void each_scales(const CodesPacking& p, char* block, With with) {
  const CodesLayout layout = layout_of(*p.layout, p.in, p.dtype);
  const int64_t count = p.layout->scales_units ? layout.num_units : 1;
  for (int64_t u = 0; u < count; ++u) {
    const int64_t at = layout.front > 0 ? layout.head + u * layout.unit_bytes : 0;
    with(u / p.units_per_group, block + at);
  }
}

void pack_block(const CodesPacking& p, int64_t b) {
  const int64_t first = b * 16, num_rows = std::min<int64_t>(16, p.out - first);
  char* block = static_cast<char*>(p.blocks) + b * p.layout->block_bytes;
  const char* rows = static_cast<const char*>(p.codes) + first * p.row_bytes;
  std::memset(block, 0, p.layout->block_bytes);
  each_unit(p, block, [&](int64_t, int64_t at, int64_t count, char* codes) {
    const auto pack = lies_by_output(*p.layout) ? pack_table_unit : pack_unit;
    pack(p, rows + at, num_rows, count, codes);
  });
  if (p.layout->has_tables) {
    const CodesLayout layout = layout_of(*p.layout, p.in, p.dtype);
    pack_tables(p, first, num_rows, block + layout.head - kTableScales - kTableBytes);
  }
  each_scales(p, block, [&](int64_t group, char* to) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t from = (first + r) * p.num_groups + group;
      std::memcpy(to + r * 4, p.scales + from, 4);
      if (p.layout->has_zeros) std::memcpy(to + 64 + r * 2, p.zeros + from, 2);
    }
  });
}

void unpack_block(const CodesPacking& p, int64_t b) {
  const int64_t first = b * 16, num_rows = std::min<int64_t>(16, p.out - first);
  char* block = static_cast<char*>(p.blocks) + b * p.layout->block_bytes;
  char* rows = static_cast<char*>(p.codes) + first * p.row_bytes;
  each_unit(p, block, [&](int64_t, int64_t at, int64_t count, const char* codes) {
    const auto unpack = lies_by_output(*p.layout) ? unpack_table_unit : unpack_unit;
    unpack(p, codes, num_rows, count, rows + at);
  });
  each_scales(p, block, [&](int64_t group, const char* from) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t to = (first + r) * p.num_groups + group;
      std::memcpy(p.scales + to, from + r * 4, 4);
      if (p.layout->has_zeros) std::memcpy(p.zeros + to, from + 64 + r * 2, 2);
    }
  });
}

template <typename Each>
int for_each_block(const CodesPacking& p, int num_threads, Each each) {
  try {
    run_team(std::max(num_threads, 1), 1, nullptr, 0, [&](Thread& thread) {
      thread.share(padded(p.out, 16) / 16, [&](int64_t b) { each(p, b); });
    });
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}

}  // namespace
}  // namespace quire

using namespace quire;

QUIRE_API int quire_pack_codes(const CodesPacking* packing, int num_threads) {
  return for_each_block(*packing, num_threads, pack_block);
}

QUIRE_API int quire_unpack_codes(const CodesPacking* packing, int num_threads) {
  return for_each_block(*packing, num_threads, unpack_block);
}
