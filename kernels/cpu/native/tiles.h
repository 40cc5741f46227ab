// Instructions that compilers' vectors have no operator for: dot products of pairs of bfloat16
// (AVX512-BF16), and of tiles of these or of bytes (AMX-BF16, AMX-INT8).
//
// QUIRE_EMULATE computes what they would, on any CPU: bit by bit as their descriptions in the
// Intel 64 and IA-32 Architectures Software Developer's Manual say. Denormals are zero, on the way
// in and on the way out; each addition rounds to nearest even. VDPBF16PS adds the upper product of
// a pair, then the lower. TDPBF16PS sums the lower products of 16 pairs, and the upper ones, adds
// up both sums, and that to what the tile held.
#pragma once
#include "simd.h"

#if !defined(QUIRE_EMULATE) && defined(QUIRE_PAIRS)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

#if defined(QUIRE_EMULATE)
inline vf flush(vf x) {
  const vf size = x < 0.0f ? -x : x;
  return size < std::numeric_limits<float>::min() ? (vf)((vu)x & 0x80000000u) : x;
}
inline vf add_product(vf a, vf b, vf acc) { return flush(flush(a) * flush(b) + flush(acc)); }
#endif

#if defined(QUIRE_PAIRS)
// acc + what each pair of `a` makes of the pair of `b` beside it.
inline vf add_pairs(vf acc, vu a, vu b) {
#if defined(QUIRE_EMULATE)
  acc = add_product(widen_high(a), widen_high(b), acc);
  return add_product(widen_low(a), widen_low(b), acc);
#else
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
}
#endif

#if !defined(QUIRE_TILES)

struct TileSession {
  TileSession() {}
  ~TileSession() {}
};

#elif defined(QUIRE_EMULATE)

struct Tiles {
  bool ready = false;
  alignas(64) uint32_t rows[8][16][16];
};
inline thread_local Tiles the_tiles;

inline uint32_t (&tile_rows(int tile))[16][16] {
  if (!the_tiles.ready) __builtin_trap();  // as a CPU would
  return the_tiles.rows[tile];
}

struct TileSession {
  TileSession() {
    the_tiles.ready = true;
    std::memset(the_tiles.rows, 0, sizeof the_tiles.rows);
  }
  ~TileSession() { the_tiles.ready = false; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int Tile>
inline void tile_zero() {
  std::memset(tile_rows(Tile), 0, sizeof the_tiles.rows[Tile]);
}

template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(tile_rows(Tile)[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile_rows(Tile)[r], 64);
  }
}

template <int Sums, int A, int B>
inline void tile_dot() {
  static_assert(kLanes == 16);
  vf b_lower[16], b_upper[16];
  for (int k = 0; k < 16; ++k) {
    const vu pairs = load_as<vu>(tile_rows(B)[k]);
    b_lower[k] = flush(widen_low(pairs));
    b_upper[k] = flush(widen_high(pairs));
  }
  for (int r = 0; r < 16; ++r) {
    const vu pairs = load_as<vu>(tile_rows(A)[r]);
    const vf a_lower = flush(widen_low(pairs)), a_upper = flush(widen_high(pairs));
    vf lower = all(0.0f), upper = all(0.0f);
    for (int k = 0; k < 16; ++k) {
      lower = flush(b_lower[k] * a_lower[k] + lower);
      upper = flush(b_upper[k] * a_upper[k] + upper);
    }
    uint32_t* sums = tile_rows(Sums)[r];
    const vf sum = flush(flush(load_as<vf>(sums)) + flush(lower + upper));
    std::memcpy(sums, &sum, sizeof sum);
  }
}

// Bytes: of A signed or not, of B signed.
template <typename T, int Sums, int A, int B>
inline void tile_dot_bytes() {
  for (int k = 0; k < 16; ++k) {
    const vu fours = load_as<vu>(tile_rows(B)[k]);
    for (int i = 0; i < 4; ++i) {
      const vi b = (vi)(fours << (24 - 8 * i)) >> 24;
      for (int r = 0; r < 16; ++r) {
        const int32_t a = reinterpret_cast<const T*>(tile_rows(A)[r])[4 * k + i];
        uint32_t* sums = tile_rows(Sums)[r];
        const vi sum = load_as<vi>(sums) + b * a;
        std::memcpy(sums, &sum, sizeof sum);
      }
    }
  }
}

template <int Sums, int A, int B>
inline void tile_dot_signed() {
  tile_dot_bytes<int8_t, Sums, A, B>();
}

template <int Sums, int A, int B>
inline void tile_dot_unsigned() {
  tile_dot_bytes<uint8_t, Sums, A, B>();
}

#else

// How tiles are seen: 16 rows of 64 bytes, all 8 of them.
struct TileShape {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShape) == 64);
alignas(64) inline constexpr TileShape kTileShape{};

// For its life, this thread has tiles.
struct TileSession {
  TileSession() { asm volatile("ldtilecfg %0" ::"m"(kTileShape)); }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

template <int Sums, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

// Bytes: of A signed or not, of B signed.
template <int Sums, int A, int B>
inline void tile_dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

template <int Sums, int A, int B>
inline void tile_dot_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

#endif

#if defined(QUIRE_TILES)
constexpr int64_t kTile = 16 * 32;  // numbers

// Sums in tiles 0 to 3, those of one A beside each other; As in 4 and 5, Bs in 6 and 7.

template <int As, int Bs>
inline void zero_sums() {
  tile_zero<0>();
  if constexpr (Bs == 2) tile_zero<1>();
  if constexpr (As == 2) tile_zero<2>();
  if constexpr (As == 2 && Bs == 2) tile_zero<3>();
}

template <int As, int Bs>
inline void load_sums(const float* sums, int64_t ld) {
  tile_load<0>(sums, 4 * ld);
  if constexpr (Bs == 2) tile_load<1>(sums + 16, 4 * ld);
  if constexpr (As == 2) tile_load<2>(sums + 16 * ld, 4 * ld);
  if constexpr (As == 2 && Bs == 2) tile_load<3>(sums + 16 * ld + 16, 4 * ld);
}

template <int As, int Bs>
inline void store_sums(float* sums, int64_t ld) {
  tile_store<0>(sums, 4 * ld);
  if constexpr (Bs == 2) tile_store<1>(sums + 16, 4 * ld);
  if constexpr (As == 2) tile_store<2>(sums + 16 * ld, 4 * ld);
  if constexpr (As == 2 && Bs == 2) tile_store<3>(sums + 16 * ld + 16, 4 * ld);
}

// Tiles that lie one after the other, `step` numbers apart, each of 16 rows `stride` bytes apart.
struct TileRow {
  const uint16_t* first[2];
  int64_t stride;
  int64_t step;
};

// Add `count` products of tiles, in order. Bs, which then lie without a gap, are asked for `Ahead`
// tiles early, but not beyond the last; 0: they are near.
template <int As, int Bs, int Ahead>
inline void add_tiles(const TileRow& a, const TileRow& b, int64_t count) {
  const uint16_t *a0 = a.first[0], *a1 = a.first[1], *b0 = b.first[0], *b1 = b.first[1];
  const int64_t a_stride = a.stride, b_stride = b.stride, a_step = a.step, b_step = b.step;
  auto add = [&] {
    tile_load<6>(b0, b_stride);
    tile_load<4>(a0, a_stride);
    tile_dot<0, 4, 6>();
    if constexpr (Bs == 2) {
      tile_load<7>(b1, b_stride);
      tile_dot<1, 4, 7>();
    }
    if constexpr (As == 2) {
      tile_load<5>(a1, a_stride);
      tile_dot<2, 5, 6>();
      a1 += a_step;
    }
    if constexpr (As == 2 && Bs == 2) tile_dot<3, 5, 7>();
    a0 += a_step;
    b0 += b_step;
    if constexpr (Bs == 2) b1 += b_step;
  };
  if constexpr (Ahead > 0) {
    for (; count > Ahead; --count) {
#pragma GCC unroll 16
      for (int line = 0; line < 16; ++line) {
        __builtin_prefetch(b0 + Ahead * 512 + line * 32);
        if constexpr (Bs == 2) __builtin_prefetch(b1 + Ahead * 512 + line * 32);
      }
      add();
    }
  }
  for (; count > 0; --count) add();
}

// Call `with` with the numbers of tiles, 1 or 2 of each, as constants.
template <typename With>
inline void with_counts(int64_t as, int64_t bs, With with) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if (as >= 2) {
    bs >= 2 ? with(two, two) : with(two, one);
  } else {
    bs >= 2 ? with(one, two) : with(one, one);
  }
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
