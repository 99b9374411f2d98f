// Compares every operator of every instruction set with sums in double, through the C interface alone: for machines
// that have no Python here, such as an emulated one.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../hf_sparse/kernels/csrc/kernels.h"

using hf_sparse::Norm;
using hf_sparse::Weight;
extern "C" const char* hf_sparse_isa(int place);
extern "C" int hf_sparse_linear(int, const Weight*, const float*, float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_ffn(int, const Weight*, const Weight*, const Weight*, const Norm*, const float*, float*, int64_t,
                             int32_t, int32_t);

static std::mt19937 bits(0);
static float number() { return float(int(bits() % 2001) - 1000) / 1000; }

struct Packed {
  std::vector<float> dense, values, bias;
  std::vector<uint8_t> columns;
  std::vector<int32_t> pointers;
  Weight weight;

  Packed(int out, int in, int rows, int percent) : dense(size_t(out) * in), bias(out) {
    const int chunk = 128, groups = (out + rows - 1) / rows;
    for (float& each : bias) each = number();
    for (int c = 0; c < (in + chunk - 1) / chunk; c++) {
      pointers.push_back(int32_t(columns.size()));
      for (int g = 0; g < groups; g++) {
        for (int j = 0; j < chunk && c * chunk + j < in; j++) {
          if (int(bits() % 100) >= percent) continue;
          columns.push_back(uint8_t(j));
          for (int r = 0; r < rows; r++) {
            const bool inside = g * rows + r < out;
            values.push_back(inside ? number() : 0.0f);
            if (inside) dense[size_t(g * rows + r) * in + c * chunk + j] = values.back();
          }
        }
        pointers.push_back(int32_t(columns.size()));
      }
    }
    weight = {values.data(), columns.data(), pointers.data(), bias.data(), int64_t(columns.size()), rows, out, in, chunk};
  }

  std::vector<double> times(const std::vector<double>& x, int tokens) const {
    const int out = weight.out_features, in = weight.in_features;
    std::vector<double> y(size_t(tokens) * out);
    for (int t = 0; t < tokens; t++)
      for (int o = 0; o < out; o++) {
        double sum = bias[o];
        for (int i = 0; i < in; i++) sum += x[size_t(t) * in + i] * dense[size_t(o) * in + i];
        y[size_t(t) * out + o] = sum;
      }
    return y;
  }
};

static double activated(double x, int act) {
  switch (act) {
    case 1:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case 2:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case 3:
      return x > 0 ? x : 0;
    case 4:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

// The layer norm of a + b, of weight `scale` and bias 0.5.
static std::vector<double> normed(const std::vector<double>& a, const std::vector<double>& b, const std::vector<float>& scale) {
  const size_t width = scale.size();
  std::vector<double> y(a.size());
  for (size_t t = 0; t < a.size(); t += width) {
    double mean = 0, squares = 0;
    for (size_t i = t; i < t + width; i++) mean += (a[i] + b[i]) / double(width);
    for (size_t i = t; i < t + width; i++) squares += std::pow(a[i] + b[i] - mean, 2) / double(width);
    for (size_t i = t; i < t + width; i++)
      y[i] = (a[i] + b[i] - mean) / std::sqrt(squares + 0.1) * scale[i - t] + 0.5;
  }
  return y;
}

static double worst = 0;
static void compare(const std::vector<float>& found, const std::vector<double>& wanted) {
  double most = 1;
  for (double each : wanted) most = std::fmax(most, std::fabs(each));
  for (size_t i = 0; i < found.size(); i++) {
    const double off = std::fabs(found[i] - wanted[i]) / most;
    worst = off > worst || off != off ? off : worst;
  }
}

int main() {
  const int tokens[] = {1, 2, 3, 7, 16, 33, 65, 130}, sizes[] = {1, 5, 33, 129, 260};
  const char* name;
  for (int isa = 0; !(name = hf_sparse_isa(isa)) || *name; isa++) {
    if (!name) continue;
    for (int rows = 1; rows <= 16; rows *= 2)
      for (int out : sizes)
        for (int in : sizes)
          for (int count : tokens) {
            const int percent = int(bits() % 101), act = int(bits() % 5), threads = 1 + int(bits() % 2);
            Packed first(out, in, rows, percent), second(out, in, rows, percent);
            Packed down(in, out, rows == 16 ? 1 : rows * 2, percent);
            std::vector<float> x(size_t(count) * in), y(size_t(count) * out), z(size_t(count) * in);
            for (float& each : x) each = number();
            const std::vector<double> exact(x.begin(), x.end());
            std::vector<double> hidden = first.times(exact, count);
            for (double& each : hidden) each = activated(each, act);
            int bad = hf_sparse_linear(isa, &first.weight, x.data(), y.data(), count, act, threads);
            compare(y, hidden);
            bad |= hf_sparse_ffn(isa, &first.weight, nullptr, &down.weight, nullptr, x.data(), z.data(), count, act, threads);
            compare(z, down.times(hidden, count));
            const std::vector<float> halves(down.bias.size(), 0.5f);
            const Norm norm{down.bias.data(), halves.data(), 0.1f};
            if (count >= 16 * threads) {
              bad |= hf_sparse_ffn(isa, &first.weight, nullptr, &down.weight, &norm, x.data(), z.data(), count, act, threads);
              compare(z, normed(exact, down.times(hidden, count), down.bias));
            }
            const std::vector<double> gate = second.times(exact, count);
            for (size_t i = 0; i < hidden.size(); i++) hidden[i] *= gate[i];
            bad |= hf_sparse_ffn(isa, &first.weight, &second.weight, &down.weight, nullptr, x.data(), z.data(), count, act,
                                 threads);
            compare(z, down.times(hidden, count));
            if (bad) return std::printf("%s: a valid weight was refused\n", name), 1;
          }
    std::printf("%s: at most %.1e from the sums in double\n", name, worst);
    if (!(worst < 1e-5)) return std::puts("WRONG"), 1;
    worst = 0;
  }
  std::puts("all right");
}
