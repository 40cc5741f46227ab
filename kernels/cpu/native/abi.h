// What Python hands over: plain structs, mirrored field by field in quire/kernels/cpu/structs.py.
// Pointers stay owned by the caller; sizes count elements. A null pointer stands for "has none".
#pragma once
#include <cstdint>

namespace quire {

inline int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

enum Dtype : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kInt8 = 2,
  kInt4 = 3,
  kFloat8 = 4,  // e4m3, without infinities
  kTable4 = 5,
};
enum NormKind : int32_t { kNoNorm = 0, kRmsNorm = 1, kLayerNorm = 2 };
enum Activation : int32_t {
  kSilu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kQuickGelu = 3,
  kRelu = 4,
  kReluSquared = 5,
  kTanh = 6,
};
// How a layer's gate and up projection are read: by one product, or, where they are not kept alike,
// one after the other.
enum Gated : int32_t { kNoGate = 0, kGatedAtOnce = 1, kGatedApart = 2 };
enum Residual : int32_t { kSequential = 0, kParallel = 1, kPost = 2 };

struct Norm {
  int32_t kind;
  float eps;
  const float* weight;  // with its offset added
  const float* bias;
};

// What a weight in codes has besides: quire/kernels/quantized.py says what each part means. Its
// blocks of 16 outputs lie `block_bytes` apart, the last filled up with outputs whose scales are
// zero. A block is a head and then its units, which are `unit` columns each, the last filled up.
// Without `scales_units` the head is float scales[16]; else there is none, and each unit begins with
// its own float scales[16]. With `has_zeros` int16 zeros[16] follow the scales, wherever these are.
//
// int8 and fp8 codes lie as [unit / 4][16 outputs][4 inputs], int4 and those of one table as
// [unit / 8][16] words whose bytes have the first four inputs in their lower halves. Where outputs
// have tables, a block has these behind its head; how they and their codes lie is in
// table_layout.h.
struct Codes {
  int64_t unit;            // a multiple of 8
  int64_t block_bytes;
  int32_t scales_units;
  int32_t has_zeros;
  const int32_t* order;    // [in]: which input each column is of; null: its own
  const float* factors;    // [in], by column: what inputs are multiplied with; null: nothing
  const float* tables;     // [16], or [round_up(out, 16)][16] with `has_tables`
  int32_t has_tables;
  int32_t has_bfloat16_tables;  // they lie as table_layout.h says; there is one scale per output
  int32_t has_subnormals;  // fp8 codes, more than a few of them
  int32_t rounds_to_bfloat16;  // inputs of fp8 codes, where it is faster so
  int32_t rounds_to_int8;  // inputs, by the row's largest, or by:
  float activation_scale;  // 0: by the row's largest
  const int64_t* outlier_first;  // [out + 1], null: there are none
  const int32_t* outlier_columns;  // columns, not inputs
  const float* outlier_values;
};

// A weight [out, in] in blocks of 16 output features. float32: [in][16] per block. bfloat16:
// [in / 2][16][2]. The last block, when it is not full, stands apart, its missing rows zero.
struct Matrix {
  const void* blocks;
  const void* tail;
  const float* bias;  // [round_up(out, 16)]
  int64_t in;
  int64_t out;
  int32_t dtype;
  const Codes* codes = nullptr;  // null: the weight is no weight in codes
};

// Some outputs of a projection that gain by an adapter, and what makes their share.
struct DeltaSlice {
  Matrix b;              // [its outputs, rank]; of bfloat16, an odd rank has one more input
  int64_t first_output;  // a multiple of 16; no two slices have a block of outputs in common
  int64_t first_rank;
  int64_t rank;
};

// What an adapter does to a projection: y = factor * (x @ weight^T + gain) + bias, before the
// weight's own bias, where the gain of a slice is (scales * (x @ a^T))[its ranks] @ b^T. All zeros:
// nothing. An up projection that has a gate has no `a`: the gate's stands for both.
struct Delta {
  Matrix a;             // [all ranks, in]
  const float* scales;  // [round_up(all ranks, 16)]
  const DeltaSlice* slices;
  int64_t num_slices;
  const float* bias;    // [round_up(out, 16)]
  const float* factor;  // [round_up(out, 16)]
};

// Places of deltas among those of their layer.
enum Projection : int32_t { kQkv, kOut, kGate, kUp, kDown, kNumProjections };

// An adapter; all zeros: none.
struct Adapter {
  const Delta* deltas;  // [num_layers * kNumProjections + 1], the last being the output matrix's
  int64_t width;        // [round_up(all ranks, 16)] of the delta that has the most
  Matrix embed;         // [vocab][embedding_size] in blocks, in the model's stead, if it has any
  Matrix embed_a;       // blocks is [vocab][rank]
  Matrix embed_b;       // blocks is [rank][embedding_size]
  float embed_scale;    // of what these two add to a token's embedding
};

// Rows that are to be brought into blocks, and where these go: the last block filled up with zeros,
// and likewise the last pair of inputs.
struct Packing {
  const void* rows;  // [out][in]
  void* blocks;
  int64_t in;
  int64_t out;
  int32_t dtype;
};

// A weight in codes as quire/kernels/quantized.py has it, and the blocks that it is brought into, or
// that are brought back into it.
struct CodesPacking {
  void* codes;     // [out], `row_bytes` apart
  float* scales;   // [out][num_groups]
  int16_t* zeros;  // [out][num_groups], where the blocks have some
  void* blocks;
  int64_t in;
  int64_t out;
  int64_t row_bytes;
  int64_t num_groups;
  int64_t units_per_group;
  int32_t dtype;
  const Codes* layout;
};

// One expert of a mixture.
struct Expert {
  Matrix gate;  // gated ones only
  Matrix up;
  Matrix down;
  int32_t gated;  // a Gated
};

// Experts, of which a router chooses `per_token` for each token; `num_held` of them are here, from
// `first_held` on, and the others on other ranks. The router's matrix is in float32, and
// has, with `has_shared_gate`, one more row: what the sigmoid of its product is multiplied with is
// what the layer's own gate, up and down projection make of every token.
struct Mixture {
  const Expert* experts;  // [num_held]
  Matrix router;  // [num_experts, or one more, hidden_size]
  int32_t num_experts;
  int32_t per_token;
  int32_t is_normalized;
  int32_t has_shared_gate;
  int64_t width;        // between an expert's projections
  int64_t most_inputs;  // of any of its matrices; this and what follows are for quire_measure
  int64_t row_bytes;    // of an input, once it is rounded for a product
  int32_t first_held;
  int32_t num_held;
};

struct Layer {
  Norm attention_norm;
  Norm mlp_norm;
  Norm attention_post_norm;
  Norm mlp_post_norm;
  Norm q_norm;
  Norm k_norm;
  Matrix qkv;
  Matrix out;
  Matrix gate;  // gated MLPs only; with a mixture, these three are of an expert that all tokens have
  Matrix up;
  Matrix down;
  const Mixture* mixture;  // null: there is one MLP
  int32_t residual;
  int32_t activation;
  int32_t gated;  // a Gated
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t sliding_window;  // 0: none
  int32_t rotary_dim;      // 0: none
  int32_t interleaved;
  float scale;
  float softcap;   // 0: none
  float clip_qkv;  // 0: none
  int32_t cache_dtype;  // of int8 and float8, rows have a float scale behind their codes
  const float* alibi_slopes;
  const float* cos;  // [max_position][rotary_dim / 2]
  const float* sin;
  void* key_cache;  // [num_slots][num_kv_heads][head_dim, or head_dim + 4 in codes]
  void* value_cache;
};

class Comm;  // comm.h

// Of a model that several ranks share, what is here of it. Of the embedding and of the output matrix
// that are the tokens from `first_token` on; layers, heads and MLPs are only those that are here.
struct Model {
  const Layer* layers;
  int32_t num_layers;
  int32_t dtype;       // of embeddings
  int64_t hidden_size;
  int64_t embedding_size;
  int32_t embed_is_packed;
  float embedding_scale;  // 0: none
  Matrix embed;           // not packed: blocks is [vocab][embedding_size]
  const void* positions;  // [.][hidden_size], row 0 being position 0, or null
  Matrix project_in;
  Matrix project_out;
  Matrix head;
  Norm final_norm;
  float logits_softcap;  // 0: none
  const Adapter* adapters;  // by slot
  int64_t first_token;
  Comm* comm;  // null: what layers make needs not be added up
};

struct Batch {
  const int64_t* input_ids;
  const int64_t* positions;
  const int64_t* slot_mapping;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  int64_t block_table_stride;
  int32_t block_size;
  int32_t num_seqs;
  int64_t num_tokens;
  float* hidden;  // out: [num_tokens][hidden_size]
  const int32_t* adapter_slots;  // [num_tokens], -1: none; null: nobody has one
  const float* hidden_in;  // [num_tokens][hidden_size]: what the layers before made; null: these are
                           // the first, and tokens are looked up
};

// Rows of logits, `stride` numbers apart.
struct Logits {
  const float* data;
  int64_t stride;
  int64_t num_rows;
  int64_t vocab;
};

// What each row is drawn by; see Backend.sample_tokens in quire/kernels/interface.py.
struct Draw {
  const double* temperature;
  const int64_t* top_k;
  const double* top_p;
  const double* min_p;
  const double* uniform;
};

// Logits to be lowered, and by what; see Backend.apply_penalties there.
struct Penalties {
  const int64_t* rows;
  const int64_t* token_ids;
  const float* counts;
  const float* presence;
  const float* frequency;
  const float* repetition;
  int64_t num_entries;
};

}  // namespace quire
