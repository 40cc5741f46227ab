#include "plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "codes.h"
#include "experts.h"

namespace quire {

namespace {
// Numbers that partial results may take at most: beyond, there is work enough for all threads.
constexpr int64_t kMostPartial = 1 << 23;

// Call `with` with every matrix that rows are multiplied with.
template <typename With>
void each_matrix(const Model& model, With with) {
  with(model.head);
  with(model.project_in);
  with(model.project_out);
  for (int32_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    for (const Matrix* m : {&layer.qkv, &layer.out, &layer.gate, &layer.up, &layer.down}) with(*m);
  }
}

// Bytes of a row of inputs, once it is rounded, split, or brought into order, for a product.
int64_t row_bytes(const Matrix& m) {
  if (m.dtype == kTable4) {
    return rounded_table_row_bytes(*m.codes, m.in) + outlier_row_bytes(*m.codes, m.in);
  }
  if (m.dtype == kFloat8) {
    return arranged_row_bytes(*m.codes, m.in) + split_row_bytes(m.in);
  }
  if (m.codes != nullptr) return rounded_row_bytes(*m.codes, m.in);
  return padded(m.in, kDepth) * 2;
}
}  // namespace

void measure(Mixture& mixture) {
  auto see = [&](const Matrix& m) {
    mixture.most_inputs = std::max(mixture.most_inputs, m.in);
    mixture.row_bytes = std::max(mixture.row_bytes, row_bytes(m));
  };
  see(mixture.router);
  for (const Expert* e = mixture.experts; e < mixture.experts + mixture.num_held; ++e) {
    see(e->gate);
    see(e->up);
    see(e->down);
  }
}

AttentionPlan plan_attention(const Model& model, const Batch& batch, int num_threads) {
  AttentionPlan plan;
  int64_t most_heads = 0, least_kv_heads = INT32_MAX, width = 0;
  for (int32_t i = 0; i < model.num_layers; ++i) {
    most_heads = std::max<int64_t>(most_heads, model.layers[i].num_heads);
    width = std::max(width, padded(model.layers[i].head_dim, 16) + 2);
    least_kv_heads = std::min<int64_t>(least_kv_heads, model.layers[i].num_kv_heads);
  }
  int64_t num_pieces = 0;
  for (int32_t i = 0; i < batch.num_seqs; ++i) {
    const int32_t count = batch.query_start_loc[i + 1] - batch.query_start_loc[i];
    num_pieces += (count + kQueries - 1) / kQueries;
  }
  plan.num_heads = most_heads;
  // Splitting costs a pass over what the parts gave: only where threads would stand idle else.
  const bool splits = num_threads > 1 && num_pieces * least_kv_heads < 4 * num_threads;
  for (int32_t i = 0; i < batch.num_seqs; ++i) {
    const int32_t count = batch.query_start_loc[i + 1] - batch.query_start_loc[i];
    for (int32_t first = 0; first < count; first += kQueries) {
      const int32_t num_queries = std::min(kQueries, count - first);
      const int32_t end = batch.seq_lens[i] - count + first + num_queries;
      const int32_t num_parts = (end + kPart - 1) / kPart;
      const int64_t partial_rows = num_parts * num_queries * most_heads;
      const bool fits = (plan.partial_rows + partial_rows) * width <= kMostPartial;
      if (!splits || num_parts == 1 || !fits) {
        plan.pieces.push_back({i, first, num_queries, -1, 0});
        continue;
      }
      plan.merges.push_back({i, first, num_queries, num_parts, plan.partial_rows});
      for (int32_t part = 0; part < num_parts; ++part) {
        plan.pieces.push_back({i, first, num_queries, part, plan.partial_rows});
        plan.partial_rows += num_queries * most_heads;
      }
    }
  }
  // The longest first: what is left for last is short.
  std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [&](const Piece& a, const Piece& b) {
    auto length = [&](const Piece& p) {
      return p.part < 0 ? batch.seq_lens[p.sequence] : kPart;
    };
    return length(a) > length(b);
  });
  return plan;
}

AdapterPlan plan_adapters(const Model& model, const int32_t* slots, int64_t num_rows) {
  // More would be shrunk by one thread while others stand idle.
  constexpr int64_t kMostTogether = 32;
  AdapterPlan plan;
  if (slots == nullptr) return plan;
  for (int64_t row = 0; row < num_rows; ++row) {
    const Adapter* adapter = slots[row] < 0 ? nullptr : model.adapters + slots[row];
    if (adapter != nullptr && adapter->deltas == nullptr) adapter = nullptr;
    plan.of_row.push_back(adapter);
    if (adapter == nullptr) continue;
    plan.rows.push_back(row);
    plan.width = std::max(plan.width, adapter->width);
  }
  std::stable_sort(plan.rows.begin(), plan.rows.end(), [&](int64_t a, int64_t b) {
    return plan.of_row[a] < plan.of_row[b];
  });
  plan.before.assign(num_rows, -1);
  plan.after.assign(num_rows, -1);
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const Adapter* adapter = plan.of_row[plan.rows[i]];
    AdapterGroup* last = plan.groups.empty() ? nullptr : &plan.groups.back();
    if (last != nullptr && last->adapter == adapter) {
      plan.before[plan.rows[i]] = plan.rows[i - 1];
      plan.after[plan.rows[i - 1]] = plan.rows[i];
    }
    if (last != nullptr && last->adapter == adapter && last->count < kMostTogether) {
      ++last->count;
    } else {
      plan.groups.push_back({adapter, static_cast<int64_t>(i), 1});
    }
  }
  return plan;
}

int64_t scratch_size(const Model& model) {
  // Of products, two blocks of 16 outputs, widened.
  int64_t widest = 0;
  each_matrix(model, [&](const Matrix& m) { widest = std::max(widest, m.in); });
  each_mixture(model, [&](const Mixture& m) { widest = std::max(widest, m.most_inputs); });
  int64_t size = 2 * 16 * widest;
  for (int32_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    const int64_t rows = padded(kQueries * (layer.num_heads / layer.num_kv_heads), 16);
    const int64_t wide = padded(layer.head_dim, 16);
    size = std::max(size, 3 * rows * wide + 2 * wide * kChunk + rows * kChunk + 4 * rows);
  }
  return size;
}

int64_t halves_size(const Model& model, int64_t num_rows) {
  int64_t widest = 0;
  each_matrix(model, [&](const Matrix& m) { widest = std::max(widest, row_bytes(m)); });
  each_mixture(model, [&](const Mixture& m) { widest = std::max(widest, m.row_bytes); });
  return padded(num_rows, 16) * widest / 4;
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, size_ * sizeof(float));
}

float* Memory::reserve(int64_t num_floats) {
  if (num_floats > size_) {
    if (data_ != nullptr) munmap(data_, size_ * sizeof(float));
    data_ = nullptr;
    size_ = 0;
    void* found = mmap(nullptr, num_floats * sizeof(float), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<float*>(found);
    size_ = num_floats;
  }
  return data_;
}

}  // namespace quire
