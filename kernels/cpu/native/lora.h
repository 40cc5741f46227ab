// What adapters add to a product: inputs are shrunk to a few numbers, of which outputs take what an
// adapter says (Hu et al., arXiv:2106.09685). Rows of one batch have different adapters, or none.
//
// All of it in float32, by the same multiplications and additions in the same order on however many
// rows: inputs ascending, ranks ascending. A row that has no adapter is not touched.
#pragma once
#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "plan.h"
#include "team.h"

namespace quire {
namespace QUIRE_ISA {

// Rows of one adapter that are computed at once: enough for their sums not to wait for each other.
#if defined(__AVX512F__) || defined(QUIRE_WIDE)
constexpr int kMostAdapted = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kMostAdapted = 4;
#else
constexpr int kMostAdapted = 2;
#endif

// Call `with` with the number of rows, 1 to `Most`, as a constant.
template <int Most = kMostAdapted, typename With>
inline void with_rows(int64_t rows, With with) {
  if constexpr (Most > 1) {
    if (rows < Most) {
      with_rows<Most - 1>(rows, with);
      return;
    }
  }
  with(std::integral_constant<int, Most>{});
}

template <int Rows>
inline void add_inputs(const float* const (&x)[Rows], int64_t k, const vf (&factor)[kVectors],
                       vf (&acc)[Rows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const float input = x[r][k];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = factor[v] * input + acc[r][v];
  }
}

// acc[r] += sum over k of x[r][k] * block[k]: `x` are rows that lie anywhere.
template <int Rows>
inline void add_rows(const float* const (&x)[Rows], int64_t depth, const float* block,
                     vf (&acc)[Rows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    vf factor[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = load(block + k * kBlock + v * kLanes);
    add_inputs<Rows>(x, k, factor, acc);
  }
}

// The same; of an odd number of inputs, the second of the last pair is not looked at.
template <int Rows>
inline void add_rows(const float* const (&x)[Rows], int64_t depth, const uint16_t* block,
                     vf (&acc)[Rows][kVectors]) {
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* w = block + k * kBlock;
    __builtin_prefetch(w + 1024);
    vf factor[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = widen_low(load_as<vu>(w + 2 * v * kLanes));
    add_inputs<Rows>(x, k, factor, acc);
    if (k + 1 == depth) return;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = widen_high(load_as<vu>(w + 2 * v * kLanes));
    add_inputs<Rows>(x, k + 1, factor, acc);
  }
}

// What one block of ranks makes of the inputs of some rows.
template <int Rows, typename W>
inline void shrink_rows(const AdapterPlan& plan, const int64_t* rows, const Delta& delta,
                        int64_t first_rank, const W* block, const float* x, int64_t ldx) {
  const float* inputs[Rows];
  vf acc[Rows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    inputs[r] = x + rows[r] * ldx;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = all(0.0f);
  }
  add_rows<Rows>(inputs, delta.a.in, block, acc);
  const float* scales = delta.scales + first_rank;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    float* out = plan.shrunk + rows[r] * plan.width + first_rank;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out + v * kLanes, acc[r][v] * load(scales + v * kLanes));
    }
  }
}

// The same of all rows of a group.
template <typename W>
inline void shrink_group(const AdapterPlan& plan, const AdapterGroup& group, const Delta& delta,
                         int64_t first_rank, const W* block, const float* x, int64_t ldx) {
  const int64_t* rows = plan.rows.data() + group.first;
  for (int64_t i = 0; i < group.count; i += kMostAdapted) {
    with_rows(std::min<int64_t>(kMostAdapted, group.count - i), [&](auto count) {
      shrink_rows<count()>(plan, rows + i, delta, first_rank, block, x, ldx);
    });
  }
}

// Shrink the inputs of a product for its delta of that number, on all threads of the team.
inline void shrink(Thread& thread, const AdapterPlan& plan, int64_t number, const float* x,
                   int64_t ldx) {
  int64_t most_blocks = 0;
  for (const AdapterGroup& group : plan.groups) {
    const int64_t num_ranks = group.adapter->deltas[number].a.out;
    most_blocks = std::max(most_blocks, padded(num_ranks, kBlock) / kBlock);
  }
  if (most_blocks == 0) return;
  const int64_t num_groups = static_cast<int64_t>(plan.groups.size());
  thread.share(num_groups * most_blocks, [&](int64_t item) {
    const AdapterGroup& group = plan.groups[item / most_blocks];
    const Delta& delta = group.adapter->deltas[number];
    const int64_t b = item % most_blocks, first_rank = b * kBlock;
    if (first_rank >= delta.a.out) return;
    if (delta.a.dtype == kFloat32) {
      shrink_group(plan, group, delta, first_rank, block_of<float>(delta.a, b), x, ldx);
      return;
    }
    const uint16_t* block = block_of<uint16_t>(delta.a, b);
    if (group.count > 2 * kMostAdapted) {
      const float* wide = widen_block(block, delta.a.in, thread.scratch());
      shrink_group(plan, group, delta, first_rank, wide, x, ldx);
    } else {
      shrink_group(plan, group, delta, first_rank, block, x, ldx);
    }
  });
}

// Outputs `first` to first + 15 gain by at most one slice: the one that is returned.
inline const DeltaSlice* slice_of(const Delta& delta, int64_t first) {
  for (const DeltaSlice* s = delta.slices; s < delta.slices + delta.num_slices; ++s) {
    if (first >= s->first_output && first < s->first_output + s->b.out) return s;
  }
  return nullptr;
}

// Ask early for what `adapt` is going to read: a few lines of each adapter, too short a way for the
// CPU to see where it leads.
inline void prefetch_gains(const AdapterPlan& plan, int64_t number, int64_t first) {
  const Adapter* before = nullptr;
  for (const AdapterGroup& group : plan.groups) {
    if (group.adapter == before) continue;
    before = group.adapter;
    const DeltaSlice* slice = slice_of(group.adapter->deltas[number], first);
    if (slice == nullptr) continue;
    const int64_t width = slice->b.dtype == kFloat32 ? 4 : 2;
    const int64_t b = (first - slice->first_output) / kBlock;
    const char* block = width == 4
                            ? reinterpret_cast<const char*>(block_of<float>(slice->b, b))
                            : reinterpret_cast<const char*>(block_of<uint16_t>(slice->b, b));
    for (int64_t at = 0; at < slice->b.in * kBlock * width; at += 64) {
      __builtin_prefetch(block + at, 0, 2);
    }
  }
}

// Some rows of one adapter: what their inputs were shrunk to, and sums of 16 outputs.
template <int Rows>
struct AdaptedRows {
  const float* shrunk[Rows];
  float* values[Rows];
};

template <int Rows, typename W>
inline void add_gains(const AdaptedRows<Rows>& rows, int64_t rank, const W* block) {
  vf acc[Rows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(rows.values[r] + v * kLanes);
  }
  add_rows<Rows>(rows.shrunk, rank, block, acc);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(rows.values[r] + v * kLanes, acc[r][v]);
  }
}

// What a delta makes of sums. `slice` is the one that these outputs gain by, or null.
template <int Rows>
inline void adapt_rows(const Delta& delta, const DeltaSlice* slice, int64_t first,
                       AdaptedRows<Rows>& rows) {
  if (slice != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) rows.shrunk[r] += slice->first_rank;
    const int64_t b = (first - slice->first_output) / kBlock;
    if (slice->b.dtype == kFloat32) {
      add_gains<Rows>(rows, slice->rank, block_of<float>(slice->b, b));
    } else {
      add_gains<Rows>(rows, slice->rank, block_of<uint16_t>(slice->b, b));
    }
  }
  if (delta.factor == nullptr && delta.bias == nullptr) return;
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < kBlock; i += kLanes) {
      vf v = load(rows.values[r] + i);
      if (delta.factor != nullptr) v = v * load(delta.factor + first + i);
      if (delta.bias != nullptr) v = v + load(delta.bias + first + i);
      store(rows.values[r] + i, v);
    }
  }
}

// What adapters make of sums of a product, before its bias: values[r][0:16], `ld` apart, of `count`
// rows from `row` on. Those of one adapter are computed together, wherever they are among these.
inline void adapt(const AdapterPlan& plan, int64_t number, int64_t first, int64_t row,
                  int64_t count, float* values, int64_t ld) {
  const int64_t end = row + count;
  for (int64_t r = row; r < end; ++r) {
    if (plan.of_row[r] == nullptr || plan.before[r] >= row) continue;
    const Delta& delta = plan.of_row[r]->deltas[number];
    const DeltaSlice* slice = slice_of(delta, first);
    for (int64_t next = r; next >= 0 && next < end;) {
      AdaptedRows<kMostAdapted> rows;
      int found = 0;
      for (; found < kMostAdapted && next >= 0 && next < end; next = plan.after[next]) {
        rows.shrunk[found] = plan.shrunk + next * plan.width;
        rows.values[found++] = values + (next - row) * ld;
      }
      with_rows(found, [&](auto rows_there) {
        AdaptedRows<rows_there()> those;
        std::copy_n(rows.shrunk, rows_there(), those.shrunk);
        std::copy_n(rows.values, rows_there(), those.values);
        adapt_rows<rows_there()>(delta, slice, first, those);
      });
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
