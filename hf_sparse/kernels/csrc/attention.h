// The attention of one head, on tiles as the matmuls leave them; part of kernels.cpp. Queries are in the lanes, so that
// the softmax over keys needs no sum across a vector.
#pragma once
#include "vectors.h"

namespace hf_sparse {
namespace {

constexpr int kMaxVectors = kManyRegisters ? 4 : 3;  // vectors of queries, times 4 or 6 keys or features: sums that fit
constexpr float kMasked = -__builtin_inff();

// Of so many keys or features, how many to take in one block. The more there are, the less often the other side is
// read. A tile has a multiple of 4 keys, so that none are left.
INLINE int64_t block_of(int64_t left) {
  if (kManyRegisters && (left >= 10 || left == 6)) return 6;
  return left >= 4 ? 4 : 1;
}

// QK: scores[key, query] = scale times the sum over features of key times query, for kKeys keys after each other.
template <int kKeys, int kVecs>
INLINE void qk(const float* __restrict query, const float* __restrict key, int tile, int size, float scale,
                  float* __restrict to) {
  Vec sum[kKeys][kVecs] = {};
  for (int d = 0; d < size; d++, query += tile, key += tile) {
    Vec q[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) q[v] = load(query + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kKeys; r++) {
      const Vec k = broadcast(key[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) sum[r][v] += k * q[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kKeys; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) store(to + r * tile + v * kLanes, sum[r][v] * broadcast(scale));
}

// PV: kPart features of the output: sums over keys of weight times value, over the sum of the weights.
template <int kPart, int kVecs>
INLINE void pv(const Attention& a, const float* __restrict weights, const float* __restrict values,
                          const float* __restrict inverse_sums, float* __restrict to) {
  Vec sum[kPart][kVecs] = {};
  for (int64_t start = 0; start < a.length; start += a.tile, values += a.step) {
    const int64_t keys = a.length - start < a.tile ? a.length - start : a.tile;
    for (int64_t j = 0; j < keys; j++, weights += a.tile) {
      Vec w[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++) {
        const Vec value = broadcast(values[r * a.tile + j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) store(to + r * a.tile + v * kLanes, sum[r][v] * load(inverse_sums + v * kLanes));
}

// Softmax: scores to weights that are still to be divided by their sum; returns one over it, and 0 where every key is
// masked.
INLINE Vec softmax(float* scores, const float* mask, int64_t length, int tile) {
  Vec maximum = broadcast(kMasked), sum = {};
  for (int64_t j = 0; j < length; j++) {
    Vec s = load(scores + j * tile);
    if (mask) {
      s += load(mask + j * tile);
      store(scores + j * tile, s);
    }
    maximum = s > maximum ? s : maximum;
  }
  const Vec from = maximum == broadcast(kMasked) ? Vec{} : maximum;
  for (int64_t j = 0; j < length; j++) {
    const Vec weight = exponential(load(scores + j * tile) - from);
    store(scores + j * tile, weight);
    sum += weight;
  }
  return maximum == broadcast(kMasked) ? Vec{} : broadcast(1.0f) / sum;
}

template <int kVecs>
INLINE void attend_columns(const Attention& a, const float* query, const float* key, const float* value, const float* mask,
                        float* scores, float* out) {
  for (int64_t start = 0; start < a.length; start += a.tile, key += a.step)
    for (int64_t j = 0, count; j < a.tile && start + j < a.length; j += count) {
      count = block_of(a.tile - j);
      float* to = scores + (start + j) * a.tile;
      if (count == 6) qk<6, kVecs>(query, key + j, a.tile, a.size, a.scale, to);
      if (count == 4) qk<4, kVecs>(query, key + j, a.tile, a.size, a.scale, to);
    }
  alignas(64) float inverse_sums[kVecs * kLanes];
  for (int v = 0; v < kVecs; v++)
    store(inverse_sums + v * kLanes,
          softmax(scores + v * kLanes, mask ? mask + v * kLanes : nullptr, a.length, a.tile));
  for (int64_t d = 0, count; d < a.size; d += count) {
    count = block_of(a.size - d);
    const float* from = value + d * a.tile;
    float* to = out + d * a.tile;
    if (count == 6) pv<6, kVecs>(a, scores, from, inverse_sums, to);
    if (count == 4) pv<4, kVecs>(a, scores, from, inverse_sums, to);
    if (count == 1) pv<1, kVecs>(a, scores, from, inverse_sums, to);
  }
}

void attend(const Attention& a, int64_t head, int64_t queries, const float* mask, float* scores, float* out) {
  const float* key = a.tiles + (a.inner + head * a.size) * a.tile;
  const float* value = key + a.inner * a.tile;
  const float* query = a.tiles + queries * a.step + head * a.size * a.tile;
  for (int at = 0; at < a.tile;) {
    const int left = (a.tile - at) / kLanes;
    const float* m = mask ? mask + at : nullptr;
    if (left >= 4 && kMaxVectors >= 4) {
      attend_columns<4>(a, query + at, key, value, m, scores + at, out + at);
      at += 4 * kLanes;
    } else if (left >= 3) {
      attend_columns<3>(a, query + at, key, value, m, scores + at, out + at);
      at += 3 * kLanes;
    } else if (left == 2) {
      attend_columns<2>(a, query + at, key, value, m, scores + at, out + at);
      at += 2 * kLanes;
    } else {
      attend_columns<1>(a, query + at, key, value, m, scores + at, out + at);
      at += kLanes;
    }
  }
}

}  // namespace
}  // namespace hf_sparse
