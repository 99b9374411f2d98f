// The attention of one head, on tiles as the products leave them; part of kernels.cpp. Queries are in the lanes, so that
// the softmax over keys needs no sum across a vector.
#pragma once
#include "vectors.h"

namespace hf_sparse {
namespace {

constexpr int kAtOnce = kManyRegisters ? 4 : 3;  // vectors of queries, times 4 or 6 keys or features: sums that fit
constexpr float kMasked = -__builtin_inff();

// Of so many keys or features, how many to take at once. The more there are, the less often the other side is read. A tile
// has a multiple of 4 keys, so that none are left.
INLINE int64_t at_once(int64_t left) {
  if (kManyRegisters && (left >= 10 || left == 6)) return 6;
  return left >= 4 ? 4 : 1;
}

// scores[key, query] = scale times the sum over features of key times query, for kKeys keys after each other.
template <int kKeys, int kVecs>
INLINE void score(const float* __restrict query, const float* __restrict key, int tile, int size, float scale,
                  float* __restrict to) {
  Vec sum[kKeys][kVecs] = {};
  for (int d = 0; d < size; d++, query += tile, key += tile) {
    Vec q[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) q[v] = load(query + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kKeys; r++) {
      const Vec k = splat(key[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) sum[r][v] += k * q[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kKeys; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) store(to + r * tile + v * kLanes, sum[r][v] * splat(scale));
}

// kPart features of the output: sums over keys of weight times value, over the sum of the weights.
template <int kPart, int kVecs>
INLINE void mix(const Attention& a, const float* __restrict weights, const float* __restrict values,
                          const float* __restrict shares, float* __restrict to) {
  Vec sum[kPart][kVecs] = {};
  for (int64_t start = 0; start < a.length; start += a.tile, values += a.step) {
    const int64_t here = a.length - start < a.tile ? a.length - start : a.tile;
    for (int64_t j = 0; j < here; j++, weights += a.tile) {
      Vec w[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++) {
        const Vec value = splat(values[r * a.tile + j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) store(to + r * a.tile + v * kLanes, sum[r][v] * load(shares + v * kLanes));
}

// Scores to weights that are still to be divided by their sum; returns one over it, and 0 where every key is masked.
INLINE Vec soften(float* scores, const float* mask, int64_t length, int tile) {
  Vec most = splat(kMasked), sum = {};
  for (int64_t j = 0; j < length; j++) {
    Vec s = load(scores + j * tile);
    if (mask) {
      s += load(mask + j * tile);
      store(scores + j * tile, s);
    }
    most = s > most ? s : most;
  }
  const Vec from = most == splat(kMasked) ? Vec{} : most;
  for (int64_t j = 0; j < length; j++) {
    const Vec weight = exponential(load(scores + j * tile) - from);
    store(scores + j * tile, weight);
    sum += weight;
  }
  return most == splat(kMasked) ? Vec{} : splat(1.0f) / sum;
}

template <int kVecs>
INLINE void attend_some(const Attention& a, const float* query, const float* key, const float* value, const float* mask,
                        float* scores, float* out) {
  for (int64_t start = 0; start < a.length; start += a.tile, key += a.step)
    for (int64_t j = 0, count; j < a.tile && start + j < a.length; j += count) {
      count = at_once(a.tile - j);
      float* to = scores + (start + j) * a.tile;
      if (count == 6) score<6, kVecs>(query, key + j, a.tile, a.size, a.scale, to);
      if (count == 4) score<4, kVecs>(query, key + j, a.tile, a.size, a.scale, to);
    }
  alignas(64) float shares[kVecs * kLanes];
  for (int v = 0; v < kVecs; v++)
    store(shares + v * kLanes,
          soften(scores + v * kLanes, mask ? mask + v * kLanes : nullptr, a.length, a.tile));
  for (int64_t d = 0, count; d < a.size; d += count) {
    count = at_once(a.size - d);
    const float* from = value + d * a.tile;
    float* to = out + d * a.tile;
    if (count == 6) mix<6, kVecs>(a, scores, from, shares, to);
    if (count == 4) mix<4, kVecs>(a, scores, from, shares, to);
    if (count == 1) mix<1, kVecs>(a, scores, from, shares, to);
  }
}

void attend(const Attention& a, int64_t head, int64_t queries, const float* mask, float* scores, float* out) {
  const float* key = a.tiles + (a.inner + head * a.size) * a.tile;
  const float* value = key + a.inner * a.tile;
  const float* query = a.tiles + queries * a.step + head * a.size * a.tile;
  for (int at = 0; at < a.tile;) {
    const int left = (a.tile - at) / kLanes;
    const float* m = mask ? mask + at : nullptr;
    if (left >= 4 && kAtOnce >= 4) {
      attend_some<4>(a, query + at, key, value, m, scores + at, out + at);
      at += 4 * kLanes;
    } else if (left >= 3) {
      attend_some<3>(a, query + at, key, value, m, scores + at, out + at);
      at += 3 * kLanes;
    } else if (left == 2) {
      attend_some<2>(a, query + at, key, value, m, scores + at, out + at);
      at += 2 * kLanes;
    } else {
      attend_some<1>(a, query + at, key, value, m, scores + at, out + at);
      at += kLanes;
    }
  }
}

}  // namespace
}  // namespace hf_sparse
