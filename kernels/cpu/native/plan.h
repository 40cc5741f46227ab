// What a step needs beside its tensors: the pieces of its attention, and memory.
#pragma once
#include <cstdint>
#include <vector>

#include "abi.h"

namespace quire {

constexpr int kChunk = 64;     // keys that are loaded together
constexpr int kPart = 512;     // keys that one piece goes over at least, if it has as many
constexpr int kQueries = 16;   // tokens of one sequence that are computed together
constexpr int kDepth = 32;     // inputs of a tile, in which products of bfloat16 are computed

// A run of queries of one sequence, to be computed over all parts of its keys, or over one part
// alone, whose result goes to the partial results from row `slot` on.
struct Piece {
  int32_t sequence;
  int32_t first_query;  // among the sequence's tokens of this step
  int32_t num_queries;
  int32_t part;  // -1: all
  int64_t slot;
};

// Pieces of one part each that make one result; their rows follow one another.
struct Merge {
  int32_t sequence;
  int32_t first_query;
  int32_t num_queries;
  int32_t num_parts;
  int64_t slot;
};

struct MixtureRows;  // experts.h

struct AttentionPlan {
  std::vector<Piece> pieces;
  std::vector<Merge> merges;
  int64_t num_heads = 0;  // rows of a query among the partial results, in any layer
  int64_t partial_rows = 0;
};

AttentionPlan plan_attention(const Model& model, const Batch& batch, int num_threads);

// Rows of one adapter, as far as they are computed together.
struct AdapterGroup {
  const Adapter* adapter;
  int64_t first;  // among AdapterPlan::rows
  int64_t count;
};

// Which rows of a batch have which adapter.
struct AdapterPlan {
  std::vector<const Adapter*> of_row;    // null: none
  std::vector<int64_t> before, after;    // each row's neighbours among its adapter's; -1: none
  std::vector<int64_t> rows;             // one group's after the other's
  std::vector<AdapterGroup> groups;      // those of one adapter follow one another
  int64_t width = 0;                     // of a shrunk row
  float* shrunk = nullptr;               // [num_rows][width]: of the product that is computed
};

// `slots` may be null: nobody has an adapter.
AdapterPlan plan_adapters(const Model& model, const int32_t* slots, int64_t num_rows);

// Rows of intermediate results. The MLP's lie where those of the attention lay.
struct Buffers {
  float* x;         // [num_tokens][hidden_size]: the residual stream
  float* normed;    // [num_tokens][hidden_size]
  float* second;    // [num_tokens][hidden_size]
  float* qkv;       // [num_tokens][widest qkv]
  float* attended;  // [num_tokens][widest attention]
  float* inner;     // [num_tokens][widest MLP or embedding]
  float* partial;   // [partial_rows][partial_width]: values, highest score, sum
  int64_t partial_width;
  uint16_t* halves;  // the input of a product, rounded to bfloat16, where that is done
  const AdapterPlan* adapters;  // null: no row has one
  const MixtureRows* mixture;   // null: no layer has experts
  float* summed;    // [num_tokens][hidden_size, or embedding_size]; null: there is one rank
  Comm* comm;
  int64_t exchange;  // the number of the step's first
};

constexpr int64_t kStretch = 4096;  // most logits of a row that are computed before a look at them

// What the likeliest tokens are found in, and where they go.
struct Likeliest {
  const float* hidden;
  const int64_t* indices;  // rows of it
  int64_t num_rows;
  float* rows;    // [num_rows][hidden_size]
  float* narrow;  // [num_rows][embedding_size]
  uint16_t* halves;
  float* logits;  // [num_rows][width]
  int64_t width;  // of a stretch
  int64_t* ids;
  float* highest;
  const AdapterPlan* adapters;  // of `rows`; null: none has one
};

// Numbers that one thread needs room for, at one item of any loop.
int64_t scratch_size(const Model& model);

// Numbers of 32 bits that so many rows of any product's input take when they are rounded.
int64_t halves_size(const Model& model, int64_t num_rows);

// Memory that only grows, and of which only what is written to is taken from the system. What it
// held is lost when it grows. It comes from the system itself: an allocator would keep what was
// outgrown.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();
  float* reserve(int64_t num_floats);

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace quire
