// Products with weights in e4m3 by tiles of bfloat16, of which a code is one.
//
// Inputs are rounded to bfloat16, as those of plain bfloat16 weights are, where the weight says that
// they may be. Else they go in two parts, x = upper + lower, each rounded: what is left is 2^-18 of
// an input. The parts' sums are added up before they are scaled. Of inputs below 1e-33, whose lower
// parts are subnormal, tiles hold the upper ones alone.
//
// An output of a part is summed up in a tile over all columns that have a scale in common, whatever
// the number of rows: bits are the same for one and for many.
#pragma once
#include "block_pairs.h"
#include "float_codes.h"
#include "tile_decoders.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
// Inputs as tiles: of groups of rows, for each 32 columns two tiles, the first of upper parts and the
// second of lower ones, or both of rounded inputs. Where one would do, there is one, in as many rows
// of it as are needed; further ones are whatever follows.
struct InputTiles {
  uint16_t* first;
  int64_t rows, wide, parts;

  int64_t group() const { return 32 / parts; }
  int64_t rows_of(int64_t row) const { return std::min(group(), rows - row / group() * group()); }
  bool are_few(int64_t row) const { return rows_of(row) * parts <= 16; }
  bool are_few_in_all() const { return rows * parts <= 16; }
  uint16_t* at(int64_t row, int64_t k) const {
    return first + row / group() * 32 * wide + k / kDepth * step(row) + row % group() * kDepth;
  }
  // Rows of tiles from upper parts to lower ones, and numbers from 32 columns to the next.
  int64_t lower(int64_t row) const { return are_few(row) ? rows_of(row) : 16; }
  int64_t step(int64_t row) const { return (are_few(row) ? rows_of(row) * parts : 32) * kDepth; }
};

// Columns `begin` to end - 1 of row `r`, `x`; `begin` is a multiple of 32.
inline void put_columns(const InputTiles& tiles, int64_t r, const float* x, int64_t begin,
                        int64_t end) {
  const int64_t lower = tiles.lower(r) * kDepth, step = tiles.step(r);
  const bool is_split = tiles.parts == 2;
  uint16_t* out = tiles.at(r, begin);
  for (int64_t k = begin; k < end; k += kDepth, out += step) {
    float rest[kDepth];
    const float* from = x + k;
    if (k + kDepth > end) {
      std::fill(std::copy(from, x + end, rest), rest + kDepth, 0.0f);
      from = rest;
    }
#pragma GCC unroll 2
    for (int i = 0; i < kDepth; i += kLanes) {
      const vf fours = load(from + i);
      const vf inputs =
          shuffle<0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15>(fours, fours);
      if (!is_split) {
        store_row(out + i, inputs);
        continue;
      }
      vf parts[2];
      split(inputs, parts[0], parts[1]);
      store_row(out + i, parts[0]);
      store_row(out + lower + i, parts[1]);
    }
  }
}

// Columns of a row that one thread takes at a time: so that threads share one row, too.
constexpr int64_t kColumnsAtOnce = 1024;

// Brings the inputs of a product in order, where `p.x` then points to, and to tiles.
inline InputTiles put_inputs(Thread& thread, Product& p, uint16_t* halves) {
  const Codes& codes = *p.weight->codes;
  const int64_t depth = p.weight->in, rows = p.rows, ldx = p.ldx;
  const float* x = p.x;
  float* arranged = nullptr;
  if (codes.order != nullptr || codes.factors != nullptr) {
    arranged = reinterpret_cast<float*>(halves);
    halves += padded(rows, 16) * arranged_row_bytes(codes, depth) / 2;
    p.x = arranged;
    p.ldx = depth;
  }
  const InputTiles tiles{halves, rows, padded(depth, kDepth), codes.rounds_to_bfloat16 ? 1 : 2};
  const int64_t pieces = (depth + kColumnsAtOnce - 1) / kColumnsAtOnce;
  thread.share(rows * pieces, [&](int64_t item) {
    const int64_t r = item / pieces, begin = item % pieces * kColumnsAtOnce;
    const int64_t end = std::min(depth, begin + kColumnsAtOnce);
    const float* from = x + r * ldx;
    if (arranged != nullptr) {
      float* to = arranged + r * depth;
      arrange_columns(codes, from, begin, end, to);
      from = to;
    }
    put_columns(tiles, r, from, begin, end);
  });
  return tiles;
}

constexpr int64_t kChunkBytes = kDepth * kBlock;

// Blocks that are gone over at once, and laid out alike: of one weight or two.
template <int Blocks>
struct Float8Blocks {
  const Matrix* weights[Blocks];
  const char* codes[Blocks];

  const Matrix& weight() const { return *weights[0]; }
  // What comes some time after the codes at `place`. What follows a block is gone over beside it: up
  // to the next of its weight's that is not.
  int64_t later(int64_t place) const {
    const int64_t block_bytes = weight().codes->block_bytes;
    const bool is_gated = Blocks > 1 && weights[0] != weights[1];
    place += kCodesAhead;
    if (place < block_bytes) return place;
    return place + block_bytes * (is_gated ? Blocks / 2 - 1 : Blocks - 1);
  }
  // Asks for a chunk of one block: memory takes few of them at once.
  void ask_for(int b, int64_t place) const {
#pragma GCC unroll 8
    for (int line = 0; line < kChunkBytes; line += 64) __builtin_prefetch(codes[b] + place + line);
  }
};

// Chunks are of 32 columns; those of a stretch have a scale in common.
inline int64_t num_chunks(const Matrix& weight) { return padded(weight.in, kDepth) / kDepth; }

inline int64_t chunks_of_stretch(const Matrix& weight) {
  return weight.codes->scales_units ? weight.codes->unit / kDepth : num_chunks(weight);
}

// Where the codes of 32 columns of a block lie, from one to the next.
class ChunkPlaces {
 public:
  explicit ChunkPlaces(const Matrix& weight) {
    const Codes& codes = *weight.codes;
    const CodesLayout layout = layout_of(codes, weight.in, weight.dtype);
    gap_ = layout.front;
    at_ = layout.head + layout.front;
    of_unit_ = left_ = chunks_of_stretch(weight);
  }
  int64_t at() const { return at_; }
  void next() {
    at_ += kChunkBytes;
    if (--left_ > 0) return;
    at_ += gap_;
    left_ = of_unit_;
  }

 private:
  int64_t at_, gap_, of_unit_, left_;
};

// What comes of 32 columns that lie at `place` to tiles, the blocks' one after the other. Of the last
// unit, columns may be missing that fill up the last 32.
template <typename Decoder, bool Asks, int Blocks>
inline void decode_chunk(const Float8Blocks<Blocks>& blocks, int64_t place, uint16_t* tiles) {
  const Codes& about = *blocks.weight().codes;
  const Decoder decoder(about, 0);
  const int64_t left = about.block_bytes - place, later = Asks ? blocks.later(place) : 0;
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b, tiles += kTile) {
    const char* codes = blocks.codes[b] + place;
    if constexpr (Asks) blocks.ask_for(b, later);
    if (left >= kChunkBytes) {
      decoder.decode(codes, tiles);
      continue;
    }
    char rest[kChunkBytes] = {};
    std::copy_n(codes, left, rest);
    decoder.decode(rest, tiles);
  }
}

// Sums of a group of rows: of two blocks in [32][32], or of twice two of up to 16 rows of tiles.
constexpr int64_t kGroupSums = 32 * kPairWidth;

// Adds products of `count` times 32 columns to tiles 0 to 3: those of `As` tiles of inputs with two
// blocks, or of one with four.
template <int As, int Blocks, typename Tiles>
inline void add_chunks(const uint16_t* x, int64_t step, int64_t count, Tiles tiles_of_next) {
  static_assert(As * Blocks <= 4);
  for (int64_t c = 0; c < count; ++c, x += step) {
    const uint16_t* tiles = tiles_of_next();
    tile_load<4>(x, 2 * kDepth);
    if constexpr (As == 2) tile_load<5>(x + kTile, 2 * kDepth);
    auto add = [&](auto number) {
      constexpr int b = number(), kWeights = 6 + b % 2;
      if constexpr (b < Blocks) {
        tile_load<kWeights>(tiles + b * kTile, 64);
        tile_dot<b, 4, kWeights>();
        if constexpr (As == 2) tile_dot<2 + b, 5, kWeights>();
      }
    };
    add(std::integral_constant<int, 0>());
    add(std::integral_constant<int, 1>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 3>());
  }
}

// What `count` chunks from `c` on add to the sums of the group that begins with `row`: [rows][32], or
// two of them 16 * 32 apart. These are sums only when a stretch of columns that have a scale in common
// ends; of a weight that is one stretch, they are what tiles hold until then.
template <int As, int Blocks, typename Tiles>
inline void add_piece(const Float8Blocks<Blocks>& blocks, const InputTiles& x, int64_t row,
                      int64_t c, int64_t count, float* sums, Tiles tiles_of_next) {
  constexpr int kPairs = Blocks == 4 ? 2 : 1, kOfPair = Blocks / kPairs;
  const Codes& codes = *blocks.weight().codes;
  const int64_t stretch = chunks_of_stretch(blocks.weight()), step = x.step(row);
  alignas(64) float own[kGroupSums];
  float* found = codes.scales_units ? own : sums;
  if (c % stretch == 0) {
    zero_sums<As * kPairs, kOfPair>();
  } else {
    load_sums<As * kPairs, kOfPair>(found, kPairWidth);
  }
  add_chunks<As, Blocks>(x.at(row, c * kDepth), step, count, tiles_of_next);
  store_sums<As * kPairs, kOfPair>(found, kPairWidth);
  if (c + count < num_chunks(blocks.weight()) && (c + count) % stretch != 0) return;
  const int64_t rows = x.rows_of(row), lower = x.lower(row) * kPairWidth;
  const int64_t unit = c / stretch * layout_of(codes, blocks.weight().in, kFloat8).unit_bytes;
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) {
    const float* scales = reinterpret_cast<const float*>(blocks.codes[b] + unit);
    const vf scale = load(scales) * Float8Tiles<false>::kScale;
    const int64_t place = b / kOfPair * 16 * kPairWidth + b % kOfPair * kBlock;
    for (int64_t at = place; at < place + rows * kPairWidth; at += kPairWidth) {
      vf sum = load(found + at);
      if (x.parts == 2) sum += load(found + at + lower);
      store(sums + at, c < stretch ? sum * scale : sum * scale + load(sums + at));
    }
  }
}

// The sums of all rows there are, one group: chunk by chunk, so that memory is read all the time.
template <typename Decoder, int As, int Blocks>
inline void sum_one_group(const Float8Blocks<Blocks>& blocks, const InputTiles& x, float* sums) {
  // What is stored is loaded as a tile only when it has left the store buffer: so the next chunk is
  // decoded before one is multiplied.
  alignas(64) uint16_t memory[2][Blocks * kTile];
  uint16_t *tiles = memory[0], *next_tiles = memory[1];
  const int64_t chunks = num_chunks(blocks.weight()), stretch = chunks_of_stretch(blocks.weight());
  ChunkPlaces place(blocks.weight());
  int64_t left = chunks;
  auto decode = [&] {
    if (left-- == 0) return;
    decode_chunk<Decoder, true>(blocks, place.at(), next_tiles);
    place.next();
  };
  decode();
  for (int64_t c = 0; c < chunks; c += stretch) {
    add_piece<As>(blocks, x, 0, c, std::min(stretch, chunks - c), sums, [&] {
      std::swap(tiles, next_tiles);
      decode();
      return tiles;
    });
  }
}

// Groups whose sums wait for each other while chunks are decoded once for them, and how many of these
// at a time: no more than stay near.
constexpr int64_t kGroupsAtOnce = 8, kChunksAtOnce = 8;

// The same for some groups.
template <typename Decoder, int Blocks>
inline void sum_groups(const Float8Blocks<Blocks>& blocks, const InputTiles& x, int64_t row,
                       int64_t rows, float* sums) {
  alignas(64) uint16_t memory[kChunksAtOnce * Blocks * kTile];
  const int64_t chunks = num_chunks(blocks.weight());
  const int64_t most = std::min(kChunksAtOnce, chunks_of_stretch(blocks.weight()));
  ChunkPlaces place(blocks.weight());
  for (int64_t c = 0, count; c < chunks; c += count) {
    count = std::min(most, chunks - c);
    const int64_t first = place.at();
    for (int64_t i = 0; i < count; ++i, place.next()) {
      decode_chunk<Decoder, false>(blocks, place.at(), memory + i * Blocks * kTile);
    }
    for (int64_t r = 0; r < rows; r += x.group()) {
      const uint16_t* tiles = memory;
      int64_t from = first;
      const int block = static_cast<int>(r / x.group());  // that is asked for by this group
      auto tiles_of_next = [&] {
        if (block < Blocks) {
          blocks.ask_for(block, blocks.later(from));
          from += kChunkBytes;
        }
        const uint16_t* next = tiles;
        tiles += Blocks * kTile;
        return next;
      };
      float* of_group = sums + r / x.group() * kGroupSums;
      if (x.are_few(row + r)) {
        add_piece<1>(blocks, x, row + r, c, count, of_group, tiles_of_next);
      } else {
        add_piece<2>(blocks, x, row + r, c, count, of_group, tiles_of_next);
      }
    }
  }
}

// Calls `finish` with each group's first row, their number, and their sums.
template <int Blocks, typename Decoder, typename Finish>
inline void multiply_float8_blocks(const Float8Blocks<Blocks>& blocks, const InputTiles& x,
                                   Finish finish) {
  alignas(64) float sums[kGroupsAtOnce * kGroupSums];
  if (x.are_few_in_all()) {
    sum_one_group<Decoder, 1>(blocks, x, sums);
    finish(0, x.rows, sums);
    return;
  }
  if constexpr (Blocks <= 2) {
    if (x.rows <= x.group()) {
      sum_one_group<Decoder, 2>(blocks, x, sums);
      finish(0, x.rows, sums);
      return;
    }
    for (int64_t row = 0; row < x.rows; row += kGroupsAtOnce * x.group()) {
      const int64_t rows = std::min(kGroupsAtOnce * x.group(), x.rows - row);
      sum_groups<Decoder>(blocks, x, row, rows, sums);
      for (int64_t r = 0; r < rows; r += x.group()) {
        finish(row + r, x.rows_of(row + r), sums + r / x.group() * kGroupSums);
      }
    }
  }
}

// Whether a product goes by tiles, whatever the number of rows.
inline bool has_float8_tiles(const Product& p) {
  const Codes& codes = *p.weight->codes;
  if (codes.scales_units && codes.unit % kDepth != 0) return false;
  if (p.factor == nullptr) return true;
  const Codes& others = *p.factor->codes;
  return p.factor->dtype == kFloat8 && others.unit == codes.unit &&
         others.scales_units == codes.scales_units;
}

template <typename Decoder>
inline void multiply_float8_tiles(Thread& thread, const Product& p, const InputTiles& x) {
  const bool is_gated = p.factor != nullptr;
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t at_once = 2 * kBlocksAtOnce, step = is_gated ? 1 : 2;
  const int64_t num_items = (num_blocks + at_once - 1) / at_once;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    // `count` blocks are one, a pair, or two pairs.
    auto multiply_at = [&](int64_t b, auto count) {
      Float8Blocks<count()> blocks;
      for (int i = 0; i < count(); ++i) {
        const int64_t number = is_gated ? b + i / 2 : b + i;
        blocks.weights[i] = is_gated && i % 2 == 1 ? p.factor : p.weight;
        blocks.codes[i] = codes_block(*blocks.weights[i], number);
        prefetch_gains(p, number * kBlock);
      }
      multiply_float8_blocks<count(), Decoder>(
          blocks, x, [&](int64_t row, int64_t rows, float* sums) {
            constexpr int kOfPair = count() == 1 ? 1 : 2;
            for (int i = 0; i < count(); i += kOfPair, sums += kGroupSums / 2) {
              const int64_t first = (is_gated ? b + i / 2 : b + i) * kBlock;
              for (int j = 0; j < kOfPair; ++j) {
                add_outliers(*blocks.weights[j], is_gated ? first : first + j * kBlock,
                             p.x + row * p.ldx, p.ldx, rows, sums + j * kBlock, kPairWidth);
              }
              finish_pair(p, first, kOfPair, sums, row, rows);
            }
          });
    };
    for (int64_t b = item * at_once; b < end;) {
      if (x.are_few_in_all() && b + 2 * step <= end) {
        multiply_at(b, std::integral_constant<int, 4>());
        b += 2 * step;
      } else if (is_gated || b + 1 < end) {
        multiply_at(b, std::integral_constant<int, 2>());
        b += step;
      } else {
        multiply_at(b++, std::integral_constant<int, 1>());
      }
    }
  });
}

inline void multiply_float8_tiles(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  Product p = product;
  const InputTiles x = put_inputs(thread, p, halves);
  if (p.weight->codes->has_subnormals ||
      (p.factor != nullptr && p.factor->codes->has_subnormals)) {
    multiply_float8_tiles<Float8Tiles<true>>(thread, p, x);
  } else {
    multiply_float8_tiles<Float8Tiles<false>>(thread, p, x);
  }
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
