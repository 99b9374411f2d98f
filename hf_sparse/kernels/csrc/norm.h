// Residual and layer norm of a tile; part of kernels.cpp. Tokens are in the lanes, so that sums over features need no sum
// across a vector. And RMSNorm of a few tokens by rows.
#pragma once
#include "dense_gemv.h"

namespace hf_sparse {
namespace {

INLINE Vec square_root(Vec x) {
  Vec out;
  for (int i = 0; i < kLanes; i++) out[i] = __builtin_sqrtf(x[i]);
  return out;
}

template <int kVecs>
void normalize_columns(float* out, const float* residual, int64_t features, int tile, const Norm& norm) {
  Vec sum[kVecs] = {}, squares[kVecs] = {}, mean[kVecs], scale[kVecs];
  for (int64_t j = 0; j < features; j++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const int64_t at = j * tile + v * kLanes;
      const Vec x = load(out + at) + load(residual + at);
      store(out + at, x);
      sum[v] += x;
    }
  for (int v = 0; v < kVecs; v++) mean[v] = sum[v] * broadcast(1.0f / float(features));
  for (int64_t j = 0; j < features; j++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const Vec x = load(out + j * tile + v * kLanes) - mean[v];
      squares[v] += x * x;
    }
  for (int v = 0; v < kVecs; v++)
    scale[v] = broadcast(1.0f) / square_root(squares[v] * broadcast(1.0f / float(features)) + broadcast(norm.eps));
  for (int64_t j = 0; j < features; j++) {
    const Vec weight = broadcast(norm.weight[j]), bias = broadcast(norm.bias ? norm.bias[j] : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      float* at = out + j * tile + v * kLanes;
      store(at, (load(at) - mean[v]) * scale[v] * weight + bias);
    }
  }
}

void normalize(float* out, const float* residual, int64_t features, int tile, const Norm& norm) {
  int at = 0;
  for (; at + 4 * kLanes <= tile; at += 4 * kLanes)
    normalize_columns<4>(out + at, residual + at, features, tile, norm);
  for (; at < tile; at += kLanes) normalize_columns<1>(out + at, residual + at, features, tile, norm);
}

// y = x / sqrt(mean(x^2) + eps) * (weight + offset) of each row.
void rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t features, float eps, float offset) {
  for (int64_t row = 0; row < rows; row++, x += features, y += features) {
    Vec squares[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= features; j += 4 * kLanes)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const Vec value = *reinterpret_cast<const LooseVec*>(x + j + u * kLanes);
        squares[u] += value * value;
      }
    float sum = horizontal_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; j < features; j++) sum += x[j] * x[j];
    const float scale = 1.0f / __builtin_sqrtf(sum / float(features) + eps);
    for (int64_t i = 0; i < features; i++) y[i] = x[i] * scale * (weight[i] + offset);
  }
}

}  // namespace
}  // namespace hf_sparse
