// Rows of tokens to tiles, and back; part of kernels.cpp.
#pragma once
#include "vectors.h"

namespace hf_sparse {
namespace {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define WIDE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, IntQuad{i, j, k, l})
#endif

// Transpose 4 rows of 4 floats, `from` apart, to 4 columns, `to` apart.
INLINE void transpose4(const float* in, int64_t from, float* out, int64_t to) {
  const Quad a = *reinterpret_cast<const Quad*>(in), b = *reinterpret_cast<const Quad*>(in + from);
  const Quad c = *reinterpret_cast<const Quad*>(in + 2 * from), d = *reinterpret_cast<const Quad*>(in + 3 * from);
  const Quad ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
  const Quad ef = SHUFFLE(a, b, 2, 6, 3, 7), gh = SHUFFLE(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Quad*>(out) = SHUFFLE(ab, cd, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(out + to) = SHUFFLE(ab, cd, 2, 3, 6, 7);
  *reinterpret_cast<Quad*>(out + 2 * to) = SHUFFLE(ef, gh, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(out + 3 * to) = SHUFFLE(ef, gh, 2, 3, 6, 7);
}

// Transpose kLanes rows of kLanes floats. Each step interleaves the halves of the rows, so that log2(kLanes)
// of them rotate every index (row, column) into (column, row); whole vectors, hence whole cache lines, are written.
#if HF_SPARSE_BYTES == 64 && defined(WIDE_SHUFFLE)
#define HF_SPARSE_TRANSPOSE16 1
INLINE void transpose16(const float* in, int64_t from, float* out, int64_t to) {
  Vec row[16], next[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) row[i] = *reinterpret_cast<const LooseVec*>(in + i * from);
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      next[2 * i] = WIDE_SHUFFLE(row[i], row[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = WIDE_SHUFFLE(row[i], row[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) *reinterpret_cast<LooseVec*>(out + i * to) = row[i];
}
#endif

// out[j, i] = in[i, j] for i < rows, j < cols, 32 columns at a time so that both sides stay in the first cache.
void transpose(const float* in, int64_t from, int64_t rows, int64_t cols, float* out, int64_t to) {
  for (int64_t c = 0; c < cols; c += 32) {
    const int64_t end = c + 32 < cols ? c + 32 : cols, whole = c + (end - c) / 4 * 4;
    int64_t i = 0;
#ifdef HF_SPARSE_TRANSPOSE16
    for (; i + 16 <= rows && end == c + 32; i += 16) {
      transpose16(in + i * from + c, from, out + c * to + i, to);
      transpose16(in + i * from + c + 16, from, out + (c + 16) * to + i, to);
    }
#endif
    for (; i + 4 <= rows; i += 4) {
      for (int64_t j = c; j < whole; j += 4) transpose4(in + i * from + j, from, out + j * to + i, to);
      for (int64_t j = whole; j < end; j++)
        for (int k = 0; k < 4; k++) out[j * to + i + k] = in[(i + k) * from + j];
    }
    for (; i < rows; i++)
      for (int64_t j = c; j < end; j++) out[j * to + i] = in[i * from + j];
  }
}

void gather(const float* x, int64_t stride, int tokens, int64_t features, int tile, float* out) {
  transpose(x, stride, tokens, features, out, tile);
  for (int64_t j = 0; tokens < tile && j < features; j++)
    for (int i = tokens; i < tile; i++) out[j * tile + i] = 0;
}

void scatter(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride) {
  // 64 features at a time: rows of the output are far apart, rows of the tile near.
  for (int64_t j = 0; j < features; j += 64) {
    const int64_t count = features - j < 64 ? features - j : 64;
    transpose(in + j * tile, tile, count, tokens, y + j, stride);
  }
}

}  // namespace
}  // namespace hf_sparse
