#include "model.h"

#include <cstdio>
#include <cstdlib>

namespace check {

void Weight::draw(Random& random, int64_t out, int64_t in, int32_t dtype, bool has_bias,
                  bool is_packed) {
  const float size = 1.0f / std::sqrt(static_cast<float>(in));
  values.resize(out * in);
  for (float& x : values) x = random.normal() * size;
  bias.clear();
  if (has_bias) {
    bias.resize((out + 15) / 16 * 16);
    for (int64_t i = 0; i < out; ++i) bias[i] = random.normal() * 0.3f;
  }
  set(out, in, dtype, is_packed);
}

void Weight::set(int64_t out, int64_t in, int32_t dtype, bool is_packed) {
  matrix = {};
  matrix.in = in;
  matrix.out = out;
  matrix.dtype = dtype;
  matrix.bias = bias.empty() ? nullptr : bias.data();
  void* tail;
  if (dtype == kBFloat16) {
    halves.resize(out * in);
    for (int64_t i = 0; i < out * in; ++i) {
      halves[i] = to_bfloat16(values[i]);
      values[i] = widen(halves[i]);
    }
    halves_tail.assign(16 * in, 0);
    matrix.blocks = halves.data();
    tail = halves_tail.data();
  } else {
    floats = values;
    floats_tail.assign(16 * in, 0.0f);
    matrix.blocks = floats.data();
    tail = floats_tail.data();
  }
  if (!is_packed) return;
  matrix.tail = tail;
  if (quire_pack(const_cast<void*>(matrix.blocks), out, in, dtype, tail, 1) != 0) {
    std::fputs("quire_pack failed\n", stderr);
    std::exit(2);
  }
}

void NormWeights::draw(Random& random, int32_t kind, int64_t size) {
  norm = {};
  norm.kind = kind;
  if (kind == kNoNorm) return;
  norm.eps = random.one_of({1e-5f, 1e-2f, 0.3f});
  weight.resize(size);
  for (float& x : weight) x = 1.0f + 0.2f * random.normal();
  if (!random.one_in(5)) norm.weight = weight.data();
  if (kind != kLayerNorm || random.one_in(4)) return;
  bias.resize(size);
  for (float& x : bias) x = 0.2f * random.normal();
  norm.bias = bias.data();
}

void LayerWeights::connect() {
  layer.attention_norm = attention_norm.norm;
  layer.mlp_norm = mlp_norm.norm;
  layer.attention_post_norm = attention_post_norm.norm;
  layer.mlp_post_norm = mlp_post_norm.norm;
  layer.q_norm = q_norm.norm;
  layer.k_norm = k_norm.norm;
  layer.qkv = qkv.matrix;
  layer.out = out.matrix;
  layer.gate = gate.matrix;
  layer.up = up.matrix;
  layer.down = down.matrix;
  layer.alibi_slopes = slopes.empty() ? nullptr : slopes.data();
  layer.cos = cos.data();
  layer.sin = sin.data();
}

Shape draw_shape(Random& random) {
  Shape s;
  s.dtype = random.one_of<int32_t>({kFloat32, kBFloat16});
  s.cache_dtype = random.one_of<int32_t>({s.dtype, kFloat32, kBFloat16, kInt8, kFloat8});
  // A bfloat16 weight has an even number of inputs.
  const int64_t odd = s.dtype == kFloat32 ? random.between(0, 1) : 0;
  s.hidden = 2 * random.between(8, 24) + odd;
  s.embedding = random.one_in(5) ? 2 * random.between(4, 20) : s.hidden;
  s.inner = 2 * random.between(5, 35) + odd;
  s.vocab = random.between(20, 70);
  s.num_layers = static_cast<int>(random.between(1, 2));
  s.num_kv_heads = static_cast<int>(random.between(1, 2));
  s.num_heads = s.num_kv_heads * static_cast<int>(random.one_of({1, 2, 3, 5}));
  s.head_dim = random.one_of({16, 16, 24, 64, 80});
  s.norm_kind = random.one_of<int32_t>({kRmsNorm, kLayerNorm});
  s.residual = random.one_of<int32_t>({kSequential, kSequential, kParallel, kPost});
  s.activation = static_cast<int32_t>(random.between(kSilu, kTanh));
  s.qk_norm_kind = random.one_of<int32_t>({kNoNorm, kNoNorm, kRmsNorm, kLayerNorm});
  s.gated = random.one_in(2);
  s.post_norms = s.residual != kParallel && random.one_in(4);
  s.has_bias = random.one_in(2);
  s.embed_is_packed = random.one_in(2);
  s.has_positions = random.one_in(4);
  s.projects_out = random.one_in(4);
  s.sliding_window = random.one_in(3) ? static_cast<int>(random.between(1, 90)) : 0;
  if (random.one_in(2)) s.rotary_dim = random.one_of({2, 6, s.head_dim / 2, s.head_dim});
  s.interleaved = random.one_in(3);
  s.alibi = random.one_in(4);
  s.softcap = random.one_in(3) ? random.one_of({0.5f, 5.0f, 50.0f}) : 0.0f;
  s.clip_qkv = random.one_in(5) ? 1.0f : 0.0f;
  s.embedding_scale = random.one_in(4) ? 1.7f : 0.0f;
  s.logits_softcap = random.one_in(3) ? 3.0f : 0.0f;
  return s;
}

static void draw_layer(Random& random, const Shape& s, LayerWeights& w) {
  Layer& layer = w.layer;
  layer.residual = s.residual;
  layer.activation = s.activation;
  layer.gated = s.gated;
  layer.num_heads = s.num_heads;
  layer.num_kv_heads = s.num_kv_heads;
  layer.head_dim = s.head_dim;
  layer.sliding_window = s.sliding_window;
  layer.rotary_dim = s.rotary_dim;
  layer.interleaved = s.interleaved;
  layer.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  layer.softcap = s.softcap;
  layer.clip_qkv = s.clip_qkv;
  layer.cache_dtype = s.cache_dtype;
  w.attention_norm.draw(random, s.norm_kind, s.hidden);
  const bool shares_norm = s.residual == kParallel && random.one_in(2);
  w.mlp_norm.draw(random, shares_norm ? kNoNorm : s.norm_kind, s.hidden);
  w.attention_post_norm.draw(random, s.post_norms ? s.norm_kind : kNoNorm, s.hidden);
  w.mlp_post_norm.draw(random, s.post_norms ? s.norm_kind : kNoNorm, s.hidden);
  w.q_norm.draw(random, s.qk_norm_kind, s.head_dim);
  w.k_norm.draw(random, s.qk_norm_kind, s.head_dim);
  const int64_t attended = s.num_heads * s.head_dim;
  const int64_t qkv = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim;
  w.qkv.draw(random, qkv, s.hidden, s.dtype, s.has_bias);
  w.out.draw(random, s.hidden, attended, s.dtype, s.has_bias);
  if (s.gated) w.gate.draw(random, s.inner, s.hidden, s.dtype, s.has_bias);
  w.up.draw(random, s.inner, s.hidden, s.dtype, s.has_bias);
  w.down.draw(random, s.hidden, s.inner, s.dtype, s.has_bias);
  if (s.alibi) {
    for (int h = 0; h < s.num_heads; ++h) w.slopes.push_back(std::exp2(-1.0f - h));
  }
  for (int64_t p = 0; p < s.most_positions; ++p) {
    for (int i = 0; i < s.rotary_dim / 2; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / s.rotary_dim);
      w.cos.push_back(static_cast<float>(std::cos(angle)));
      w.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  w.connect();
}

TinyModel::TinyModel(Random& random, const Shape& s) : shape(s) {
  for (int i = 0; i < s.num_layers; ++i) draw_layer(random, s, layers.emplace_back());
  embed.draw(random, s.vocab, s.embedding, s.dtype, false, s.embed_is_packed);
  for (float& x : embed.values) x *= std::sqrt(static_cast<float>(s.embedding));
  embed.set(s.vocab, s.embedding, s.dtype, s.embed_is_packed);
  if (s.embedding != s.hidden) {
    project_in.draw(random, s.hidden, s.embedding, s.dtype, s.has_bias);
  }
  const int64_t last = s.projects_out ? 18 : s.hidden;
  if (s.projects_out) project_out.draw(random, last, s.hidden, s.dtype, s.has_bias);
  head.draw(random, s.vocab, last, s.dtype, s.has_bias);
  final_norm.draw(random, random.one_in(4) ? int32_t{kNoNorm} : s.norm_kind, s.hidden);
  if (s.has_positions) {
    for (int64_t i = 0; i < s.most_positions * s.hidden; ++i) {
      positions_halves.push_back(to_bfloat16(random.normal()));
      positions.push_back(widen(positions_halves.back()));
    }
  }
  connect();
}

void TinyModel::connect() {
  table.clear();
  for (LayerWeights& each : layers) {
    each.connect();
    table.push_back(each.layer);
  }
  model.layers = table.data();
  model.num_layers = shape.num_layers;
  model.dtype = shape.dtype;
  model.hidden_size = shape.hidden;
  model.embedding_size = shape.embedding;
  model.embed_is_packed = shape.embed_is_packed;
  model.embedding_scale = shape.embedding_scale;
  model.embed = embed.matrix;
  if (shape.has_positions) {
    model.positions = shape.dtype == kBFloat16 ? static_cast<const void*>(positions_halves.data())
                                               : positions.data();
  }
  model.project_in = project_in.matrix;
  model.project_out = project_out.matrix;
  model.head = head.matrix;
  model.final_norm = final_norm.norm;
  model.logits_softcap = shape.logits_softcap;
}

}  // namespace check
