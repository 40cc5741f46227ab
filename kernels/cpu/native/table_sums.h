// Products with weights that have a table for each output, 32 of whose inputs lie together.
//
// Codes that lie side by side are of one output, so here the lanes of a sum are inputs: what comes
// out of a table needs not be turned around. A row's sum of an output is made of as many as there
// are lanes for it, each in ascending order, and these are added up in the end. That is the same
// whatever the number of rows, but not the same on every CPU.
#pragma once
#include "gemm.h"
#include "table_codes.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(__AVX512F__)
#define QUIRE_TABLE_SUMS

// The tables of 16 outputs. A group is what vectors are of: here one output.
class Tables {
 public:
  static constexpr int kGroups = 16;
  static constexpr int kSums = 24;  // at once: as many as there are registers for

  explicit Tables(const float* tables) : tables_(tables) {}

  // Call `use` with inputs that are a vector of values apart, and these.
  template <typename Use>
  void look_up(int group, const char* codes, Use use) const {
    const char* own = codes + place_among_outputs(group) * 16;
    const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
    const __m512 table = _mm512_loadu_ps(tables_ + group * 16);
    use(0, (vf)_mm512_permutexvar_ps(low, table));  // which takes four bits of an index
    use(16, (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), table));
  }

  static vf inputs(const float* x) { return load(x); }

  // What the lanes of all groups' sums add up to.
  static void add_up(vf (&sums)[kGroups], float* out) {
    transpose(sums);
#pragma GCC unroll 4
    for (int half = kGroups / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    store(out, sums[0]);
  }

 private:
  const float* tables_;
};

#elif defined(__AVX2__) && !defined(QUIRE_WIDE)
#define QUIRE_TABLE_SUMS

// The same; a group is two outputs, 4 apart, four inputs of each.
class Tables {
 public:
  static constexpr int kGroups = 8;
  static constexpr int kSums = 8;

  explicit Tables(const float* tables) {
    for (int group = 0; group < kGroups; ++group) {
      const float* table = tables + (group / 4 * 8 + group % 4) * 16;
      __m256i other[4];
      split_table(table, planes_[group]);
      split_table(table + 4 * 16, other);
      for (int i = 0; i < 4; ++i) {
        planes_[group][i] = _mm256_blend_epi32(planes_[group][i], other[i], 0xf0);
      }
    }
  }

  template <typename Use>
  void look_up(int group, const char* codes, Use use) const {
#pragma GCC unroll 2
    for (int phase = 0; phase < 2; ++phase) {
      const __m256i own = codes_of_phase(codes + 32 * group, phase);
      const Halves halves = quire::QUIRE_ISA::look_up(planes_[group], own);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        use(16 * phase + 8 * i, (vf)_mm256_unpacklo_epi16(halves.lower[i], halves.upper[i]));
        use(16 * phase + 8 * i + 4, (vf)_mm256_unpackhi_epi16(halves.lower[i], halves.upper[i]));
      }
    }
  }

  static vf inputs(const float* x) {
    return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
  }

  static void add_up(vf (&sums)[kGroups], float* out) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vf* four = sums + 4 * v;
      vf pairs[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        pairs[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(four[2 * i], four[2 * i + 1]) +
                   shuffle<2, 10, 3, 11, 6, 14, 7, 15>(four[2 * i], four[2 * i + 1]);
      }
      store(out + 8 * v, shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[0], pairs[1]) +
                             shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[0], pairs[1]));
    }
  }

 private:
  __m256i planes_[kGroups][4];
};

#endif

#if defined(QUIRE_TABLE_SUMS)
inline bool has_table_sums(const Matrix& weight) {
  return weight.dtype == kTable4 && weight.codes->has_tables && !weight.codes->scales_units &&
         inputs_together(*weight.codes) == kTablesTogether;
}

constexpr int64_t kBytesTogether = kTablesTogether * 8;
constexpr int kMostTableRows = Tables::kSums / 2;

// The greatest power of two that is not above a number.
constexpr int power_of_two(int most) { return most < 2 ? 1 : 2 * power_of_two(most / 2); }

// sums[r][group]: what some groups of a block make of `Rows` rows, lane by lane.
template <int Rows>
inline void sum_lanes(const Tables& tables, const char* block, const float* x, int64_t ldx,
                      int64_t depth, vf (*sums)[Tables::kGroups]) {
  constexpr int kAtOnce = std::min(Tables::kGroups, power_of_two(Tables::kSums / Rows));
  for (int first = 0; first < Tables::kGroups; first += kAtOnce) {
    vf acc[kAtOnce][Rows];
#pragma GCC unroll 16
    for (int g = 0; g < kAtOnce; ++g) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) acc[g][r] = all(0.0f);
    }
    const char* codes = block;
    auto add = [&](const float* inputs, int64_t ld) {
#pragma GCC unroll 16
      for (int g = 0; g < kAtOnce; ++g) {
        tables.look_up(first + g, codes, [&](int offset, vf values) {
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r) {
            acc[g][r] = values * Tables::inputs(inputs + r * ld + offset) + acc[g][r];
          }
        });
      }
    };
    int64_t k = 0;
    for (; k + kTablesTogether <= depth; k += kTablesTogether, codes += kBytesTogether) {
      if (first == 0) {
#pragma GCC unroll 4
        for (int line = 0; line < kBytesTogether; line += 64) {
          __builtin_prefetch(codes + kCodesAhead + line);
        }
      }
      add(x + k, ldx);
    }
    if (k < depth) {
      float rest[Rows][kTablesTogether] = {};
      for (int r = 0; r < Rows; ++r) std::copy(x + r * ldx + k, x + r * ldx + depth, rest[r]);
      add(rest[0], kTablesTogether);
    }
#pragma GCC unroll 16
    for (int g = 0; g < kAtOnce; ++g) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) sums[r][first + g] = acc[g][r];
    }
  }
}

// sums[r][0:16]: what block `b` makes of rows `row` to row + rows - 1, at most kMostTableRows.
inline void sum_tables(const Matrix& weight, const Product& p, int64_t b, int64_t row, int64_t rows,
                       float* sums) {
  const Codes& codes = *weight.codes;
  const char* block = codes_block(weight, b);
  const float* scales = reinterpret_cast<const float*>(block);
  const char* first_codes = block + layout_of(codes, weight.in, weight.dtype).head;
  const Tables tables(codes.tables + b * kBlock * 16);
  const float* x = p.x + row * p.ldx;
  vf lanes[kMostTableRows][Tables::kGroups];
  with_rows<kMostTableRows>(rows, [&](auto count) {
    sum_lanes<count()>(tables, first_codes, x, p.ldx, weight.in, lanes);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* out = sums + r * kBlock;
    Tables::add_up(lanes[r], out);
    for (int v = 0; v < kBlock; v += kLanes) store(out + v, load(out + v) * load(scales + v));
  }
  add_outliers(weight, b * kBlock, x, p.ldx, rows, sums);
}

// The product of all rows; a factor has such tables, too.
inline void multiply_tables(Thread& thread, const Product& p) {
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t passes = (p.rows + kMostTableRows - 1) / kMostTableRows;
  const int64_t step = (p.rows + passes - 1) / passes;
  thread.share(num_blocks, [&](int64_t b) {
    const int64_t first = b * kBlock;
    float values[kMostTableRows * kBlock], factors[kMostTableRows * kBlock];
    prefetch_gains(p, first);
    for (int64_t row = 0; row < p.rows; row += step) {
      const int64_t rows = std::min(step, p.rows - row);
      sum_tables(*p.weight, p, b, row, rows, values);
      adapt(p, false, first, row, rows, values, kBlock);
      if (p.factor != nullptr) {
        sum_tables(*p.factor, p, b, row, rows, factors);
        adapt(p, true, first, row, rows, factors, kBlock);
      }
      for (int64_t r = 0; r < rows; ++r) {
        finish_row(p, values + r * kBlock, factors + r * kBlock, first,
                   p.y + (row + r) * p.ldy + first);
      }
    }
  });
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
