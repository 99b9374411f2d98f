// Int8 kernels whose tiles are parts of four vectors of tokens; included by int8_avx2.cpp and int8_neon.cpp, which define
// before:
//   kTokens                         tokens of a vector of sums
//   kVecsAtOnce(rows)               vectors of sums of so many rows that fit the registers: 2 or 4
//   kFp32                           the fp32 kernels of the instruction set
//   Sum                             int32 sums of one output for kTokens tokens
//   Ints, Floats                    int32 and fp32, kTokens of each
//   INLINE
//   round(x, inverse)               x * inverse rounded to integers, by way of x * inverse + 128: the bits of all instruction
//                                   sets must be the same
//   pack(ints[4], out)              4 kTokens bytes in the order that add_quad reads
//   add_quad<kRows, kFrom, kVecs>(in, columns, values, sum)
//                                   products of one quad and vectors kFrom to kFrom + kVecs of a part
//   finish(sum, scale, steps, bias, out)   out = sum * scale * steps + bias
//
// A part is feature-major: 4 kTokens bytes for feature 0, then for feature 1, ... Tokens that a narrow tile lacks are left out
// of the products, not of the memory. Inputs stay in the first cache without being cut in chunks of features, as those in
// fp32 are: a byte each, the part of 768 features is 24 kB with AVX2.
#pragma once
#include "int8.h"
#include "kernels.h"

namespace hf_sparse {
namespace {

constexpr int kPartTokens = 4 * kTokens;
// A token with smaller numbers counts as zeros: 127 divided by less could be infinite.
constexpr float kZero = 1e-30f;
constexpr int32_t kInfinity = 0x7f800000, kAllButSign = 0x7fffffff;

inline int at_most(int64_t value, int limit) { return value < limit ? int(value) : limit; }

int width(int tokens) { return tokens <= 0 ? kTokens : (tokens + kTokens - 1) / kTokens * kTokens; }

// Tiles of about the same size, so that the last does not compute for tokens that there are not.
int attention_width(int64_t length) {
  const int64_t tiles = (length + kInt8Tile - 1) / kInt8Tile;
  return tiles ? width(int((length + tiles - 1) / tiles)) : kTokens;
}

int64_t input_bytes(int64_t features, int tile) {
  return (tile + kPartTokens - 1) / kPartTokens * kPartTokens * features;
}

bool all_below(const uint16_t* columns, int64_t count, int32_t limit) {
  if (limit > 65535) return true;
  uint16_t too_large = 0;
  for (int64_t i = 0; i < count; i++) too_large |= columns[i] >= uint16_t(limit);
  return !too_large;
}

// What a token is to be multiplied by, and its step, from the bits of its largest size: those of NaN are the largest.
void scale_of(int32_t largest, float* inverse, float* step) {
  float size;
  __builtin_memcpy(&size, &largest, 4);
  const bool finite = largest < kInfinity, nonzero = finite && size >= kZero;
  *inverse = nonzero ? 127.0f / size : 0.0f;
  *step = nonzero ? size / 127.0f : finite ? 0.0f : __builtin_nanf("");
}

// The bits of the largest size: as integers they are ordered like the sizes, and compared in vectors.
int32_t largest_size(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t j = 0; j < count; j++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + j, 4);
    bits &= kAllButSign;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// kVecs vectors of tokens of each feature, `stride` floats apart, as bytes.
template <int kVecs>
void round_features(const float* from, int64_t stride, int64_t features, const float* inverse, uint8_t* to) {
  Floats factor[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; v++) __builtin_memcpy(&factor[v], inverse + v * kTokens, sizeof(Floats));
  for (int64_t j = 0; j < features; j++) {
    Ints steps[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      Floats x;
      __builtin_memcpy(&x, from + j * stride + v * kTokens, sizeof(Floats));
      steps[v] = round(x, factor[v]);
    }
    pack(steps, to + j * kPartTokens);
  }
}

template <int kVecs>
void largest_sizes(const float* from, int64_t stride, int64_t features, int32_t* out) {
  Ints largest[kVecs] = {};
  for (int64_t j = 0; j < features; j++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      Ints bits;
      __builtin_memcpy(&bits, from + j * stride + v * kTokens, sizeof(Ints));
      bits &= kAllButSign;
      largest[v] = bits > largest[v] ? bits : largest[v];
    }
  __builtin_memcpy(out, largest, sizeof(largest));
}

// Call use(Vecs<n>()) for the vectors that so many tokens of a part fill.
template <int kVecs>
struct Vecs {
  static constexpr int kCount = kVecs;
};
template <typename Use>
void with_vecs(int tokens, const Use& use) {
  switch (tokens / kTokens) {
    case 1:
      return use(Vecs<1>());
    case 2:
      return use(Vecs<2>());
    case 3:
      return use(Vecs<3>());
    default:
      return use(Vecs<4>());
  }
}

void round_part(const float* from, int64_t stride, int tokens, int64_t features, const float* inverse, uint8_t* to) {
  with_vecs(tokens, [&](auto vecs) { round_features<decltype(vecs)::kCount>(from, stride, features, inverse, to); });
}

void quantize_rows(const float* x, int64_t stride, int tokens, int64_t features, int tile, uint8_t* out, float* steps) {
  float inverse[kInt8Tile];
  for (int i = 0; i < tile; i++)
    scale_of(i < tokens ? largest_size(x + i * stride, features) : 0, inverse + i, steps + i);
  constexpr int64_t kFeatures = 64;
  alignas(64) float transposed[kFeatures * kPartTokens];
  for (int t = 0; t < tile; t += kPartTokens) {
    const int wide = at_most(tile - t, kPartTokens), here = tokens - t < 0 ? 0 : at_most(tokens - t, wide);
    for (int64_t j = 0; j < features; j += kFeatures) {
      const int64_t count = features - j < kFeatures ? features - j : kFeatures;
      kFp32.gather(x + t * stride + j, stride, here, count, wide, transposed);
      round_part(transposed, wide, wide, count, inverse + t, out + t * features + j * kPartTokens);
    }
  }
}

void quantize_tile(const float* in, int64_t features, int tile, uint8_t* out, float* steps) {
  for (int t = 0; t < tile; t += kPartTokens) {
    const int tokens = at_most(tile - t, kPartTokens);
    int32_t largest[kPartTokens];
    float inverse[kPartTokens];
    with_vecs(tokens, [&](auto vecs) { largest_sizes<decltype(vecs)::kCount>(in + t, tile, features, largest); });
    for (int i = 0; i < tokens; i++) scale_of(largest[i], inverse + i, steps + t + i);
    round_part(in + t, tile, tokens, features, inverse, out + t * features);
  }
}

// The micro-kernel: the outputs of each group for vectors kFrom to kFrom + kVecs of one part.
template <int kRows, int kFrom, int kVecs>
void panel(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first, int64_t last) {
  for (int64_t g = first; g < last; g++) {
    Sum sum[kRows][kVecs] = {};
    const uint16_t* columns = w.columns + 4 * int64_t(w.pointers[g]);
    const int8_t* values = w.values + 4 * kRows * int64_t(w.pointers[g]);
    for (int64_t left = w.pointers[g + 1] - int64_t(w.pointers[g]); left > 0; left--, columns += 4, values += 4 * kRows)
      add_quad<kRows, kFrom, kVecs>(in, columns, values, sum);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const int64_t row = g * kRows + r;
      const bool real = row < w.out_features;
      const float scale = real ? w.scales[row] : 0.0f, bias = real && w.bias ? w.bias[row] : 0.0f;
      float* to = out + ((g - first) * kRows + r) * tile + kFrom * kTokens;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++)
        finish(sum[r][v], scale, steps + (kFrom + v) * kTokens, bias, to + v * kTokens);
    }
  }
}

template <int kRows>
void matmul_of(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first,
               int64_t last) {
  constexpr int kAtOnce = kVecsAtOnce(kRows);
  for (int t = 0; t < tile; t += kPartTokens, in += w.in_features * int64_t(kPartTokens)) {
    with_vecs(at_most(tile - t, kPartTokens), [&](auto vecs) {
      constexpr int kVecs = decltype(vecs)::kCount, kFirst = kVecs < kAtOnce ? kVecs : kAtOnce;
      panel<kRows, 0, kFirst>(w, in, tile, steps + t, out + t, first, last);
      if constexpr (kVecs > kFirst)
        panel<kRows, kFirst, kVecs - kFirst>(w, in, tile, steps + t, out + t, first, last);
    });
  }
}

void matmul(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first,
            int64_t last) {
  if (w.rows == 1) return matmul_of<1>(w, in, tile, steps, out, first, last);
  if (w.rows == 2) return matmul_of<2>(w, in, tile, steps, out, first, last);
  return matmul_of<4>(w, in, tile, steps, out, first, last);
}

void store_rows(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride) {
  kFp32.scatter(in, tile, features, tokens, y, stride);
}

constexpr Int8Kernels kTiles = {&kFp32,    width,         attention_width, input_bytes, all_below, quantize_rows,
                                quantize_tile, matmul, store_rows};

}  // namespace
}  // namespace hf_sparse
