// GEMV of a weight with unstructured sparsity, for AVX-512; part of kernels.cpp.
//
// The values of a chunk lie one after the other whatever row they belong to, so they are multiplied 64 at a time without
// regard to rows, and summed by rows afterwards, from the first cache. Rows of a sparse weight have a value or two more
// than a register, or less: a loop over each of them would compute half for nothing and be predicted wrong as often. Read
// from the first to the last value, the weight also comes from memory as fast as memory gives it.
#pragma once
#include "vectors.h"

#ifdef __AVX512BW__
#include <immintrin.h>  // its functions are always inlined

namespace hf_sparse {
namespace {

// The inputs of a chunk in registers: 64 columns in each of kQuarters. A column beyond picks some other input; it cannot
// read outside.
template <int kQuarters>
struct Inputs {
#ifdef __AVX512VBMI__
  __m512i bytes[4][kQuarters];  // one instruction looks up 64 bytes out of 128: the four bytes of a float separately
  __m512i order;

  explicit Inputs(const float* x) {
    alignas(64) uint8_t planes[4][64 * kQuarters], spread[64];
    for (int i = 0; i < 64 * kQuarters; i += 16) {
      __m512i lookup = _mm512_loadu_si512(x + i);
      for (int b = 0; b < 4; b++) {
        _mm_store_si128(reinterpret_cast<__m128i*>(planes[b] + i), _mm512_cvtepi32_epi8(lookup));
        lookup = _mm512_srli_epi32(lookup, 8);
      }
    }
    for (int b = 0; b < 4; b++)
      for (int q = 0; q < kQuarters; q++) bytes[b][q] = _mm512_load_si512(planes[b] + 64 * q);
    // Interleaving works within quarters of a register: so that it ends in the order of the columns, they start in this.
    for (int i = 0; i < 64; i++) spread[i] = uint8_t(i % 16 / 4 * 16 + i / 16 * 4 + i % 4);
    order = _mm512_load_si512(spread);
  }

  __attribute__((always_inline)) __m512i byte(int b, __m512i columns) const {
    const __m512i low = _mm512_permutex2var_epi8(bytes[b][0], columns, bytes[b][1]);
    if constexpr (kQuarters == 2) return low;
    const __mmask64 upper = _mm512_movepi8_mask(columns);
    if constexpr (kQuarters == 3) return _mm512_mask_permutexvar_epi8(low, upper, columns, bytes[b][2]);
    if constexpr (kQuarters == 4)
      return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(bytes[b][2], columns, bytes[b][3]));
  }

  __attribute__((always_inline)) void look_up(__m512i columns, __m512 (&values)[4]) const {
    columns = _mm512_permutexvar_epi8(order, columns);
    const __m512i b0 = byte(0, columns), b1 = byte(1, columns), b2 = byte(2, columns), b3 = byte(3, columns);
    const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    values[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    values[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
  }
#else
  __m512 floats[4 * kQuarters];

  explicit Inputs(const float* x) {
    for (int i = 0; i < 4 * kQuarters; i++) floats[i] = _mm512_loadu_ps(x + 16 * i);
  }

  // A gather from memory took three times as long.
  template <int kTables>
  static __attribute__((always_inline)) __m512 lookup(const __m512* x, __m512i columns) {
    if constexpr (kTables == 2) return _mm512_permutex2var_ps(x[0], columns, x[1]);
    if constexpr (kTables > 2) {
      constexpr int kLow = kTables == 12 ? 8 : kTables / 2;  // a power of two: one bit of the column chooses
      const __mmask16 upper = _mm512_test_epi32_mask(columns, _mm512_set1_epi32(kLow * 16));
      return _mm512_mask_mov_ps(lookup<kLow>(x, columns), upper, lookup<kTables - kLow>(x + kLow, columns));
    }
  }

  __attribute__((always_inline)) void look_up(__m512i columns, __m512 (&values)[4]) const {
    values[0] = lookup<4 * kQuarters>(floats, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(columns)));
    values[1] = lookup<4 * kQuarters>(floats, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(columns, 1)));
    values[2] = lookup<4 * kQuarters>(floats, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(columns, 2)));
    values[3] = lookup<4 * kQuarters>(floats, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(columns, 3)));
  }
#endif
};

// The lowest `count` bits: all of them where there are fewer.
INLINE uint32_t low_mask(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Values first to last, each times its input.
template <int kQuarters>
INLINE void multiply_values(const Weight& w, const Inputs<kQuarters>& x, int64_t first, int64_t last, float* products) {
  constexpr int64_t kAhead = 1024;  // as many values are on their way from memory
  __m512 values[4];
  for (; first + 64 <= last; first += 64, products += 64) {
    __builtin_prefetch(w.columns + first + kAhead);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) __builtin_prefetch(w.values + first + kAhead + 16 * v);
    x.look_up(_mm512_loadu_si512(w.columns + first), values);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++)
      _mm512_storeu_ps(products + 16 * v, _mm512_mul_ps(values[v], _mm512_loadu_ps(w.values + first + 16 * v)));
  }
  if (first >= last) return;
  const int64_t left = last - first;
  x.look_up(_mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, w.columns + first), values);
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++)
    if (left > 16 * v) {
      const __mmask16 mask = __mmask16(low_mask(left - 16 * v));
      _mm512_storeu_ps(products + 16 * v, _mm512_mul_ps(values[v], _mm512_maskz_loadu_ps(mask, w.values + first + 16 * v)));
    }
}

// Nothing is read, or added, past `count`: 0 times an infinite input would be NaN.
INLINE __m512 masked_sum(const float* products, int64_t count) {
  const uint32_t mask = low_mask(count);
  __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(__mmask16(mask), products),
                             _mm512_maskz_loadu_ps(__mmask16(mask >> 16), products + 16));
  for (int64_t p = 32; __builtin_expect(p < count, 0); p += 16)
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(__mmask16(low_mask(count - p)), products + p));
  return sum;
}

// Place i of the result: the sum of all of s[i].
INLINE __m512 horizontal_sums(const __m512 (&s)[16]) {
  __m512 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[i], s[i + 8]), _mm512_unpackhi_ps(s[i], s[i + 8]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 4]), _mm512_unpackhi_ps(a[i], a[i + 4]));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  // Place 4 i + j has the sum of s[i + 4 j].
  const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(back, sums);
}

template <int kQuarters>
void gemv_unstructured(const Weight& w, const float* in, float* out, int64_t first, int64_t last) {
  constexpr int64_t kRoom = 4096;
  alignas(64) float products[kRoom + 64];
  for (int64_t i = first; i < last; i++) out[i] = w.bias ? w.bias[i] : 0.0f;
  const int64_t parts = chunks(w);
  for (int64_t c = 0; c < parts; c++) {
    const int32_t* pointers = w.pointers + c * (w.out_features + int64_t(1));
    const Inputs<kQuarters> x(in + c * w.chunk);
    for (int64_t row = first; row < last;) {
      // As many rows at once as have room: the fewer, the more often 64 values are not filled.
      int64_t rows = last - row < 64 ? last - row : 64;
      if (pointers[row + rows] - pointers[row] > kRoom) rows = rows < 16 ? rows : 16;
      const int64_t begin = pointers[row];
      const bool fits = pointers[row + rows] - begin <= kRoom;  // 16 rows of a chunk do, but for columns that come twice
      if (fits) multiply_values(w, x, begin, pointers[row + rows], products);
      for (int64_t r = 0; r < rows; r += 16) {
        __m512 sums[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
          sums[i] = _mm512_setzero_ps();
          if (r + i >= rows) continue;
          const int64_t from = pointers[row + r + i], to = pointers[row + r + i + 1];
          if (fits) {
            sums[i] = masked_sum(products + (from - begin), to - from);
          } else {
            for (int64_t p = from; p < to; p += kRoom) {
              const int64_t count = to - p < kRoom ? to - p : kRoom;
              multiply_values(w, x, p, p + count, products);
              sums[i] = _mm512_add_ps(sums[i], masked_sum(products, count));
            }
          }
        }
        const __mmask16 mask = __mmask16(low_mask(rows - r));
        float* to = out + row + r;
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), horizontal_sums(sums)));
      }
      row += rows;
    }
  }
}

}  // namespace
}  // namespace hf_sparse
#endif
