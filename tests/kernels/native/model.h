// Small models with random weights, as the library takes them and as plain numbers.
#pragma once
#include <deque>

#include "library.h"
#include "numbers.h"

namespace check {

using namespace quire;

// A weight [out, in], packed, and its values in rows.
struct Weight {
  Matrix matrix{};
  std::vector<float> values, bias;
  std::vector<uint16_t> halves, halves_tail;
  std::vector<float> floats, floats_tail;

  Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  // With random values of a size that keeps that of what is multiplied.
  void draw(Random& random, int64_t out, int64_t in, int32_t dtype, bool has_bias,
            bool is_packed = true);
  // With those that `values` holds.
  void set(int64_t out, int64_t in, int32_t dtype, bool is_packed = true);
};

struct NormWeights {
  Norm norm{};
  std::vector<float> weight, bias;

  void draw(Random& random, int32_t kind, int64_t size);
};

struct LayerWeights {
  Layer layer{};
  NormWeights attention_norm, mlp_norm, attention_post_norm, mlp_post_norm, q_norm, k_norm;
  Weight qkv, out, gate, up, down;
  std::vector<float> slopes, cos, sin;

  // After what is drawn has changed: what the library is to be told.
  void connect();
};

// What a model is made of; everything else is drawn.
struct Shape {
  int64_t hidden = 32;
  int64_t embedding = 32;
  int64_t inner = 48;
  int64_t vocab = 50;
  int num_layers = 1;
  int num_heads = 2, num_kv_heads = 1, head_dim = 16;
  int32_t dtype = kFloat32;
  int32_t cache_dtype = kFloat32;
  int32_t norm_kind = kRmsNorm;
  int32_t residual = kSequential;
  int32_t activation = kSilu;
  int32_t qk_norm_kind = kNoNorm;
  bool gated = true, post_norms = false, has_bias = false;
  bool embed_is_packed = false, has_positions = false, projects_out = false;
  int sliding_window = 0, rotary_dim = 0;
  bool interleaved = false, alibi = false;
  float softcap = 0, clip_qkv = 0, embedding_scale = 0, logits_softcap = 0;
  int64_t most_positions = 128;
};

Shape draw_shape(Random& random);

struct TinyModel {
  Shape shape;
  Model model{};
  std::deque<LayerWeights> layers;
  std::vector<Layer> table;  // as the library is handed them
  Weight embed, project_in, project_out, head;
  NormWeights final_norm;
  std::vector<float> positions;
  std::vector<uint16_t> positions_halves;

  TinyModel(Random& random, const Shape& shape);
  TinyModel(const TinyModel&) = delete;
  TinyModel& operator=(const TinyModel&) = delete;
  // After weights were set anew.
  void connect();
};

}  // namespace check
