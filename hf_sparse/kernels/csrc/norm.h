// Residual and layer norm of a tile; part of kernels.cpp. Tokens are in the lanes, so that sums over features need no sum
// across a vector.
#pragma once
#include "vectors.h"

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

}  // namespace
}  // namespace hf_sparse
