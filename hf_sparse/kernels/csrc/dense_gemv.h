// A few tokens times a weight by rows, such as that of an LM head: as fast as memory gives the weight if it is read from
// the first to the last value. Part of kernels.cpp.
#pragma once
#include "vectors.h"

namespace hf_sparse {
namespace {

INLINE float horizontal_sum(Vec value) {
  float part[kLanes];
  *reinterpret_cast<LooseVec*>(part) = value;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// Rows first to last of kTokens outputs. One row at a time: the more addresses are read at once, the less is fetched ahead.
template <int kTokens>
void gemv_rows(const float* weight, const float* bias, const float* x, float* y, int64_t in, int64_t out, int64_t first,
             int64_t last) {
  constexpr int kUnroll = kTokens == 1 ? 4 : kTokens < 5 ? 2 : 1;
  constexpr int64_t kStep = kUnroll * kLanes;
  for (int64_t row = first; row < last; row++) {
    const float* w = weight + row * in;
    Vec sums[kTokens][kUnroll] = {};
    int64_t j = 0;
    for (; j + kStep <= in; j += kStep)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; u++) {
        const Vec values = *reinterpret_cast<const LooseVec*>(w + j + u * kLanes);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t++)
          sums[t][u] += values * *reinterpret_cast<const LooseVec*>(x + t * in + j + u * kLanes);
      }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
      Vec all = sums[t][0];
#pragma GCC unroll 4
      for (int u = 1; u < kUnroll; u++) all += sums[t][u];
      float value = horizontal_sum(all);
      for (int64_t i = j; i < in; i++) value += w[i] * x[t * in + i];
      y[t * out + row] = value + (bias ? bias[row] : 0.0f);
    }
  }
}

template <int kTokens>
void gemv_tokens(int64_t tokens, const float* weight, const float* bias, const float* x, float* y, int64_t in, int64_t out,
         int64_t first, int64_t last) {
  if (tokens == kTokens) return gemv_rows<kTokens>(weight, bias, x, y, in, out, first, last);
  if constexpr (kTokens > 1) gemv_tokens<kTokens - 1>(tokens, weight, bias, x, y, in, out, first, last);
}

void dense_gemv(const float* weight, const float* bias, const float* x, float* y, int64_t tokens, int64_t in, int64_t out,
           int64_t first, int64_t last) {
  constexpr int64_t kMaxTokens = kManyRegisters ? 8 : 4, kRowsAtOnce = 8;  // rows that the next tokens find in the cache
  for (int64_t row = first; row < last; row += kRowsAtOnce) {
    const int64_t end = row + kRowsAtOnce < last ? row + kRowsAtOnce : last;
    for (int64_t t = 0; t < tokens; t += kMaxTokens)
      gemv_tokens<kMaxTokens>(tokens - t < kMaxTokens ? tokens - t : kMaxTokens, weight, bias, x + t * in, y + t * out, in,
                              out, row, end);
  }
}

}  // namespace
}  // namespace hf_sparse
