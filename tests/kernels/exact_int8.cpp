// Compares the int8 operators of every instruction set with the same sums one by one: linear and feed-forward bit by bit, an
// attention, whose softmax is fp32, with doubles. Weights and inputs reach -127 and 127 everywhere, where sums of two
// products do not fit 16 bits unless a kernel takes care.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../hf_sparse/kernels/csrc/int8.h"
#include "../../hf_sparse/kernels/csrc/kernels.h"

using hf_sparse::Int8Weight;
using hf_sparse::Norm;
extern "C" const char* hf_sparse_isa(int);
extern "C" int hf_sparse_has_int8(int);
extern "C" int hf_sparse_int8_linear(int, const Int8Weight*, const float*, float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_int8_ffn(int, const Int8Weight*, const Int8Weight*, const Int8Weight*, const Norm*, const float*,
                                  float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_int8_attention(int, const Int8Weight*, const Int8Weight*, const Norm*, const float*, float*,
                                        const float*, int64_t, int64_t, int64_t, int32_t, float, int32_t);

typedef std::vector<float> Floats;

static std::mt19937 bits(0);
static float number() { return float(int(bits() % 2001) - 1000) / 1000; }

enum Kind { kRandom, kExtreme };

struct Packed {
  std::vector<int8_t> dense, values;
  std::vector<uint16_t> columns;
  std::vector<int32_t> pointers{0}, offsets;
  Floats scales, bias;
  Int8Weight weight;

  Packed(int out, int in, int rows, int percent, Kind kind)
      : dense(size_t(out) * in), offsets(out), scales(out), bias(out) {
    const bool one_sign = bits() % 2;
    for (int o = 0; o < out; o++) scales[o] = 0.001f * float(1 + bits() % 9), bias[o] = number();
    for (int g = 0; g * rows < out; g++) {
      std::vector<int> kept;
      for (int j = 0; j < in; j++)
        if (int(bits() % 100) < percent) kept.push_back(j);
      for (int j : kept)
        for (int o = g * rows; o < (g + 1) * rows && o < out; o++) {
          const int value = kind == kRandom ? int(bits() % 255) - 127 : one_sign || bits() % 2 ? 127 : -127;
          dense[size_t(o) * in + j] = int8_t(value);
          offsets[o] -= 128 * value;
        }
      for (size_t k = 0; k < kept.size(); k += 4) {
        for (int o = g * rows; o < (g + 1) * rows; o++)
          for (size_t i = k; i < k + 4; i++)
            values.push_back(i < kept.size() && o < out ? dense[size_t(o) * in + kept[i]] : int8_t(0));
        for (size_t i = k; i < k + 4; i++) columns.push_back(uint16_t(i < kept.size() ? kept[i] : 0));
      }
      pointers.push_back(int32_t(columns.size() / 4));
    }
    weight = {values.data(), columns.data(), pointers.data(),           scales.data(),
              offsets.data(), bias.data(),   int64_t(columns.size() / 4), rows, out, in};
  }

  Floats times(const Floats& x, int tokens) const {
    const int out = weight.out_features, in = weight.in_features;
    Floats y(size_t(tokens) * out);
    std::vector<int> steps(in);
    for (int t = 0; t < tokens; t++) {
      float largest = 0;
      bool finite = true;
      for (int i = 0; i < in; i++) {
        const float size = std::fabs(x[size_t(t) * in + i]);
        finite = finite && std::isfinite(size);
        largest = size > largest ? size : largest;
      }
      const float inverse = finite && largest >= 1e-30f ? 127.0f / largest : 0.0f;
      const float step = !finite ? NAN : largest >= 1e-30f ? largest / 127.0f : 0.0f;
      for (int i = 0; i < in; i++)
        steps[i] = finite ? int(std::nearbyint(std::fma(x[size_t(t) * in + i], inverse, 128.0f))) - 128 : 0;
      for (int o = 0; o < out; o++) {
        int32_t sum = 0;
        for (int i = 0; i < in; i++) sum += steps[i] * dense[size_t(o) * in + i];
        const float value = float(sum) * scales[o];
        y[size_t(t) * out + o] = std::fma(value, step, bias[o]);
      }
    }
    return y;
  }
};

static bool same(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

static Floats inputs(int tokens, int in, Kind kind) {
  Floats x(size_t(tokens) * in);
  const bool one_sign = bits() % 2;
  for (float& each : x) each = kind == kRandom ? number() : one_sign || bits() % 2 ? 3.0f : -3.0f;
  if (kind == kRandom && in && tokens > 2) x[in] = INFINITY, x[size_t(3) * in - 1] = NAN;
  return x;
}

static const char* check(int isa, int rows, int out, int in, int tokens) {
  const Kind kind = bits() % 2 ? kRandom : kExtreme;
  const int percent = int(bits() % 101), threads = 1 + int(bits() % 3);
  const Packed first(out, in, rows, percent, kind), second(out, in, rows, percent, kind);
  const Packed down(in, out, rows == 4 ? 1 : rows * 2, percent, kind);
  const Floats x = inputs(tokens, in, kind);
  Floats y(size_t(tokens) * out), z(x.size());
  Floats hidden = first.times(x, tokens);
  if (hf_sparse_int8_linear(isa, &first.weight, x.data(), y.data(), tokens, 0, threads) || !same(y, hidden))
    return "linear";
  for (float& each : hidden) each = each < 0 ? 0 : each;
  if (hf_sparse_int8_ffn(isa, &first.weight, nullptr, &down.weight, nullptr, x.data(), z.data(), tokens, 3, threads) ||
      !same(z, down.times(hidden, tokens)))
    return "feed-forward";
  const Floats gate = second.times(x, tokens);
  for (size_t i = 0; i < hidden.size(); i++) hidden[i] *= gate[i];
  if (hf_sparse_int8_ffn(isa, &first.weight, &second.weight, &down.weight, nullptr, x.data(), z.data(), tokens, 3, threads) ||
      !same(z, down.times(hidden, tokens)))
    return "gated feed-forward";
  return nullptr;
}

// The heads of one sequence, from queries, keys and values in fp32.
static std::vector<double> attended(const Floats& qkv, int tokens, int heads, int size, float scale) {
  const int inner = heads * size;
  std::vector<double> y(size_t(tokens) * inner);
  for (int h = 0; h < heads; h++)
    for (int t = 0; t < tokens; t++) {
      std::vector<double> weights(tokens);
      double most = -INFINITY, total = 0;
      for (int k = 0; k < tokens; k++) {
        for (int d = 0; d < size; d++)
          weights[k] += double(qkv[size_t(t) * 3 * inner + h * size + d]) * qkv[size_t(k) * 3 * inner + inner + h * size + d];
        weights[k] *= scale;
        most = std::fmax(most, weights[k]);
      }
      for (double& each : weights) total += each = std::exp(each - most);
      for (int k = 0; k < tokens; k++)
        for (int d = 0; d < size; d++)
          y[size_t(t) * inner + h * size + d] +=
              weights[k] / total * qkv[size_t(k) * 3 * inner + 2 * inner + h * size + d];
    }
  return y;
}

static const char* check_attention(int isa, int rows, int size, int tokens) {
  const int heads = 1 + int(bits() % 3), in = 33 + int(bits() % 50), inner = heads * size;
  const int threads = 1 + int(bits() % 3);
  const Packed qkv(3 * inner, in, rows, 30, kRandom), after(in, inner, rows, 60, kRandom);
  Floats x(size_t(tokens) * in), y(size_t(tokens) * inner), z(x.size());
  for (float& each : x) each = number();
  const std::vector<double> wanted = attended(qkv.times(x, tokens), tokens, heads, size, 0.3f);
  if (hf_sparse_int8_attention(isa, &qkv.weight, nullptr, nullptr, x.data(), y.data(), nullptr, 0, 1, tokens, heads, 0.3f,
                               threads))
    return "attention refused";
  for (size_t i = 0; i < y.size(); i++)
    if (!(std::fabs(y[i] - wanted[i]) < 1e-5)) return "attention";
  // Rounded from what this instruction set has found itself: the output layer is then the same bit by bit.
  if (hf_sparse_int8_attention(isa, &qkv.weight, &after.weight, nullptr, x.data(), z.data(), nullptr, 0, 1, tokens, heads,
                               0.3f, threads) ||
      !same(z, after.times(y, tokens)))
    return "attention with its output layer";
  return nullptr;
}

int main() {
  const char* name;
  for (int isa = 0; !(name = hf_sparse_isa(isa)) || *name; isa++) {
    if (!name) continue;
    if (!hf_sparse_has_int8(isa)) {
      std::printf("%s: no int8 kernels\n", name);
      continue;
    }
    for (int rows = 1; rows <= 4; rows *= 2) {
      for (int out : {1, 5, 33})
        for (int in : {1, 5, 130})
          for (int tokens : {1, 2, 7, 9, 16, 17, 25, 33, 47, 64, 65, 130})
            if (const char* wrong = check(isa, rows, out, in, tokens))
              return std::printf("%s: %s, %d rows, %d x %d, %d tokens: WRONG\n", name, wrong, rows, out, in, tokens), 1;
      for (int size : {4, 7, 16})
        for (int tokens : {1, 9, 33, 65, 130})
          if (const char* wrong = check_attention(isa, rows, size, tokens))
            return std::printf("%s: %s, %d rows, heads of %d, %d tokens: WRONG\n", name, wrong, rows, size, tokens), 1;
    }
    std::printf("%s: int8 bit by bit\n", name);
  }
  std::puts("all right");
}
