#include "reference.h"

namespace check {
namespace {

// A term that is rounded further: errors are spread evenly, and that bound is twice the largest.
Estimate blurred(Estimate x, double bound) {
  return {x.value, x.variance + square(0.3 * bound * x.value)};
}

// A function of a known slope at most, and its own roundings.
Estimate with_slope(Estimate x, double value, double slope, double roundings) {
  return rounded(value, square(slope) * x.variance, roundings);
}

Estimate tanh_of(Estimate x) { return with_slope(x, std::tanh(x.value), 1.0, 8); }

Estimate soft_capped(Estimate x, float cap) {
  return cap > 0 ? tanh_of(x / cap) * Estimate(cap) : x;
}

Row normalized(const Norm& norm, const Row& x) {
  if (norm.kind == kNoNorm) return x;
  const auto size = static_cast<double>(x.size());
  Estimate mean;
  if (norm.kind == kLayerNorm) {
    Sum total;
    for (const Estimate& each : x) total.add(each);
    mean = total.result() / size;
  }
  Row away;
  Sum squares;
  for (const Estimate& each : x) {
    away.push_back(norm.kind == kLayerNorm ? each - mean : each);
    squares.add(away.back() * away.back());
  }
  const Estimate power = squares.result() / size + Estimate(norm.eps);
  const double value = 1 / std::sqrt(power.value);
  const Estimate factor = rounded(value, square(value * 0.5 / power.value) * power.variance, 3);
  Row result;
  for (size_t i = 0; i < x.size(); ++i) {
    Estimate y = away[i] * factor;
    if (norm.weight != nullptr) y = y * Estimate(norm.weight[i]);
    if (norm.bias != nullptr) y = y + Estimate(norm.bias[i]);
    result.push_back(y);
  }
  return result;
}

void rotate(const Layer& layer, int64_t position, Estimate* head) {
  const int half = layer.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    Estimate& a = head[layer.interleaved ? 2 * i : i];
    Estimate& b = head[layer.interleaved ? 2 * i + 1 : half + i];
    const Estimate cos = layer.cos[position * half + i], sin = layer.sin[position * half + i];
    const Estimate old = a;
    a = a * cos - b * sin;
    b = b * cos + old * sin;
  }
}

// Bring a key or a value of one head to what its codes stand for.
void round_to_codes(Estimate* row, int dim, int32_t dtype, bool is_rounded_again) {
  double largest = 0, off = 0;
  for (int d = 0; d < dim; ++d) {
    largest = std::max(largest, std::fabs(row[d].value));
    off = std::max(off, std::sqrt(row[d].variance));
  }
  const double scale = largest / (dtype == kInt8 ? 127 : 448);
  if (scale == 0) return;
  // Relatively, and with room: it is one error for the whole row.
  const double scale_off = 4 * off / largest + kUnit;
  for (int d = 0; d < dim; ++d) {
    const Estimate x{row[d].value, row[d].variance + square(scale_off * row[d].value)};
    row[d] = as_code(x, scale, dtype == kInt8);
    row[d].variance += square((scale_off + kUnit) * row[d].value);
    if (is_rounded_again) row[d] = as_bfloat16(row[d]);
  }
}

// Queries, keys and values of a token, as attention finds them.
Row prepared(const Layer& layer, Row qkv, int64_t position, const Rounding& rounding) {
  const int dim = layer.head_dim, num_keys = layer.num_kv_heads;
  if (layer.clip_qkv > 0) {
    for (Estimate& x : qkv) {
      x.value = std::clamp(x.value, -double{layer.clip_qkv}, double{layer.clip_qkv});
    }
  }
  for (int h = 0; h < layer.num_heads + num_keys; ++h) {
    const auto head = qkv.begin() + h * dim;
    const Row normed = normalized(h < layer.num_heads ? layer.q_norm : layer.k_norm,
                                  Row(head, head + dim));
    std::copy(normed.begin(), normed.end(), head);
    if (layer.rotary_dim > 0) rotate(layer, position, &*head);
  }
  if (layer.cache_dtype == kBFloat16) {
    for (size_t i = layer.num_heads * dim; i < qkv.size(); ++i) qkv[i] = as_bfloat16(qkv[i]);
  } else if (layer.cache_dtype != kFloat32) {
    for (size_t i = layer.num_heads * dim; i < qkv.size(); i += dim) {
      round_to_codes(&qkv[i], dim, layer.cache_dtype, rounding.attention > 0);
    }
  }
  return qkv;
}

// What query head `h` at the last position of `tokens` sees.
void attend(const Layer& layer, const std::vector<Row>& tokens, int64_t position, int h,
            const Rounding& rounding, Estimate* out) {
  const int64_t dim = layer.head_dim;
  const int64_t kv_head = h / (layer.num_heads / layer.num_kv_heads);
  const int64_t key = (layer.num_heads + kv_head) * dim;
  const int64_t value = key + layer.num_kv_heads * dim;
  const int64_t window = layer.sliding_window;
  const double blur = rounding.of_attention(layer.cache_dtype);
  const int64_t first = window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
  Row scores;
  for (int64_t j = first; j <= position; ++j) {
    Sum products;
    for (int64_t d = 0; d < dim; ++d) {
      const Estimate query = tokens[position][h * dim + d] * Estimate(layer.scale);
      // Twice as much: a query's rounding is one error for all keys.
      products.add(blurred(query, 2 * blur) * tokens[j][key + d]);
    }
    Estimate score = soft_capped(products.result(), layer.softcap);
    if (layer.alibi_slopes != nullptr) {
      score = score + Estimate(layer.alibi_slopes[h]) * Estimate(static_cast<double>(j - position));
    }
    scores.push_back(score);
  }
  double most = -HUGE_VAL;
  for (const Estimate& score : scores) most = std::max(most, score.value);
  // A running maximum scales what went before once for every 64 keys.
  const double scalings = 8.0 * static_cast<double>(position / 64 + 2);
  Row weights;
  Sum weights_sum;
  for (const Estimate& score : scores) {
    const double weight = std::exp(score.value - most);
    const double variance = score.variance + square(kUnit * (most - score.value));
    weights.push_back(rounded(weight, square(weight) * variance, 8 + scalings));
    weights_sum.add(weights.back());
  }
  const Estimate total = weights_sum.result();
  for (int64_t d = 0; d < dim; ++d) {
    Sum terms;
    for (int64_t j = first; j <= position; ++j) {
      terms.add(blurred(weights[j - first], blur) * tokens[j][value + d]);
    }
    const Estimate sum = terms.result();
    const double result = sum.value / total.value;
    out[d] = rounded(result, (sum.variance + square(result) * total.variance) / square(total.value),
                     3);
  }
}

Row sum_of(const Row& a, const Row& b) {
  Row sum;
  for (size_t i = 0; i < a.size(); ++i) sum.push_back(a[i] + b[i]);
  return sum;
}

Row mlp(const LayerWeights& w, const Row& input, const Rounding& rounding) {
  Row inner = multiply(input, w.up, rounding);
  if (w.layer.gated) {
    const Row gate = multiply(input, w.gate, rounding);
    for (size_t i = 0; i < inner.size(); ++i) {
      inner[i] = activate(gate[i], w.layer.activation) * inner[i];
    }
  } else {
    for (Estimate& x : inner) x = activate(x, w.layer.activation);
  }
  return normalized(w.layer.mlp_post_norm, multiply(inner, w.down, rounding));
}

void run_layer(const LayerWeights& w, std::vector<Row>& x, const Rounding& rounding) {
  const Layer& layer = w.layer;
  std::vector<Row> tokens;
  for (size_t t = 0; t < x.size(); ++t) {
    const Row input = layer.residual == kPost ? x[t] : normalized(layer.attention_norm, x[t]);
    tokens.push_back(prepared(layer, multiply(input, w.qkv, rounding), t, rounding));
  }
  for (size_t t = 0; t < x.size(); ++t) {
    Row attended(layer.num_heads * layer.head_dim);
    for (int h = 0; h < layer.num_heads; ++h) {
      attend(layer, tokens, t, h, rounding, &attended[h * layer.head_dim]);
    }
    const Row before = x[t];
    x[t] = sum_of(x[t], normalized(layer.attention_post_norm, multiply(attended, w.out, rounding)));
    if (layer.residual == kPost) {
      x[t] = normalized(layer.attention_norm, x[t]);
      x[t] = normalized(layer.mlp_norm, sum_of(x[t], mlp(w, x[t], rounding)));
    } else if (layer.residual == kParallel) {
      const Norm& norm = layer.mlp_norm.kind == kNoNorm ? layer.attention_norm : layer.mlp_norm;
      x[t] = sum_of(x[t], mlp(w, normalized(norm, before), rounding));
    } else {
      x[t] = sum_of(x[t], mlp(w, normalized(layer.mlp_norm, x[t]), rounding));
    }
  }
}

}  // namespace

Estimate activate(Estimate x, int32_t kind) {
  const double v = x.value;
  const double size = std::fabs(v);
  auto sigmoid = [](double t) { return 1 / (1 + std::exp(-t)); };
  switch (kind) {
    case kSilu:
      return with_slope(x, v * sigmoid(v), 1.1, 8 + size);
    case kGelu:
      return with_slope(x, v * 0.5 * std::erfc(-v * std::sqrt(0.5)), 1.13,
                        16 + 4 * std::min(v * v, 200.0));
    case kGeluTanh: {
      const double t = 0.79788456 * (v + 0.044715 * v * v * v);
      return {v * 0.5 * (1 + std::tanh(t)), square(1.13) * x.variance + square(16 * kUnit * v)};
    }
    case kQuickGelu:
      return with_slope(x, v * sigmoid(1.702 * v), 1.1, 8 + 4 * size);
    case kRelu:
      return {std::max(v, 0.0), x.variance};
    case kReluSquared: {
      const Estimate y(std::max(v, 0.0), x.variance);
      return y * y;
    }
    default:
      return tanh_of(x);
  }
}

Row multiply(const Row& x, const Weight& weight, const Rounding& rounding) {
  const Matrix& matrix = weight.matrix;
  const double blur = rounding.of_product(matrix.dtype);
  Row result;
  for (int64_t o = 0; o < matrix.out; ++o) {
    Sum sum;
    if (!weight.bias.empty()) sum.add(weight.bias[o]);
    for (int64_t k = 0; k < matrix.in; ++k) {
      const double w = weight.values[o * matrix.in + k];
      const Estimate input = blurred(x[k], blur);
      sum.add({input.value * w, input.variance * square(w)});
    }
    result.push_back(sum.result());
  }
  return result;
}

std::vector<Row> forward(const TinyModel& m, const std::vector<int64_t>& ids,
                         const Rounding& rounding) {
  const int64_t width = m.shape.embedding, hidden = m.shape.hidden;
  std::vector<Row> x;
  for (size_t t = 0; t < ids.size(); ++t) {
    const auto row = m.embed.values.begin() + ids[t] * width;
    Row token(row, row + width);
    if (m.shape.embedding_scale != 0) {
      for (Estimate& each : token) each = each * Estimate(m.shape.embedding_scale);
    }
    if (width != hidden) token = multiply(token, m.project_in, rounding);
    if (m.shape.has_positions) {
      for (int64_t i = 0; i < hidden; ++i) {
        token[i] = token[i] + Estimate(m.positions[t * hidden + i]);
      }
    }
    x.push_back(token);
  }
  for (const LayerWeights& layer : m.layers) run_layer(layer, x, rounding);
  for (Row& row : x) row = normalized(m.model.final_norm, row);
  return x;
}

Row logits(const TinyModel& m, const float* hidden, const Rounding& rounding) {
  Row x(hidden, hidden + m.shape.hidden);
  if (m.shape.projects_out) x = multiply(x, m.project_out, rounding);
  x = multiply(x, m.head, rounding);
  for (Estimate& each : x) each = soft_capped(each, m.shape.logits_softcap);
  return x;
}

}  // namespace check
