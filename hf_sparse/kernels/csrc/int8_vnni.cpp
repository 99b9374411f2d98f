// The int8 kernels for AVX-512 with VNNI, whose one instruction multiplies 64 bytes and adds them up in fours. The four
// columns of a quad lie anywhere; their bytes are interleaved on the way into the registers, once for all rows of a block.
#include <immintrin.h>

#include "int8.h"
#include "kernels.h"

namespace hf_sparse {
namespace {

#define INLINE static inline __attribute__((always_inline))

// Tokens in a narrow tile; the others have kInt8Tile.
constexpr int kNarrowTile = 16;

// A token with smaller numbers counts as zeros: 127 divided by less could be infinite.
constexpr float kZero = 1e-30f;

INLINE __mmask16 finite(__m512 size) { return _mm512_cmp_ps_mask(size, _mm512_set1_ps(3.402823466e38f), _CMP_LE_OQ); }

// What 16 tokens are to be multiplied by, and their steps.
INLINE __m512 inverse_of(__m512 maximum, __mmask16 is_finite, float* steps) {
  const __m512 limit = _mm512_set1_ps(127.0f);
  const __mmask16 nonzero = is_finite & _mm512_cmp_ps_mask(maximum, _mm512_set1_ps(kZero), _CMP_GE_OQ);
  const __m512 step = _mm512_maskz_div_ps(nonzero, maximum, limit);
  _mm512_storeu_ps(steps, _mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")), is_finite, step));
  return _mm512_maskz_div_ps(nonzero, limit, maximum);
}

INLINE __m512i rounded(const float* from, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(from), inverse, _mm512_set1_ps(128.0f)));
}

// One feature of a tile as bytes. The packs put token 16 v + 4 l + k at 16 l + 4 v + k, which `load_quad` undoes.
template <int kVecs>
INLINE void round_feature(const float* from, const __m512 (&inverse)[kVecs], uint8_t* to) {
  if constexpr (kVecs == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(rounded(from, inverse[0])));
  } else {
    const __m512i low = _mm512_packs_epi32(rounded(from, inverse[0]), rounded(from + 16, inverse[1]));
    const __m512i high = _mm512_packs_epi32(rounded(from + 32, inverse[2]), rounded(from + 48, inverse[3]));
    _mm512_storeu_si512(to, _mm512_packus_epi16(low, high));
  }
}

INLINE __mmask16 low_mask(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

// Transpose 16 rows of 16 floats, in halves of the distance each time.
INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + k + 2]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// rows x cols floats, at most 16 of each, `from` apart, to columns `to` apart; what is missing is zero, or not written.
INLINE void transpose(const float* in, int64_t from, int64_t rows, int64_t cols, float* out, int64_t to, int64_t limit) {
  __m512 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    r[i] = i < rows ? _mm512_maskz_loadu_ps(low_mask(cols), in + i * from) : _mm512_setzero_ps();
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (i < cols) _mm512_mask_storeu_ps(out + i * to, low_mask(limit), r[i]);
}

template <int kVecs>
void quantize_rows_of(const float* x, int64_t stride, int tokens, int64_t features, uint8_t* out, float* steps) {
  constexpr int kTile = 16 * kVecs;
  float largest[kTile] = {};
  __mmask16 is_finite[kVecs];
  for (int i = 0; i < kTile; i++) {
    __mmask16 all_finite = 0xffff;
    if (i < tokens) {
      const float* row = x + i * stride;
      __m512 maximum[2] = {};
      int64_t j = 0;
      for (; j + 32 <= features; j += 32)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
          const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(row + j + 16 * k));
          all_finite &= finite(size);
          maximum[k] = _mm512_max_ps(maximum[k], size);
        }
      for (; j < features; j += 16) {
        const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(low_mask(features - j), row + j));
        all_finite &= finite(size);
        maximum[0] = _mm512_max_ps(maximum[0], size);
      }
      largest[i] = _mm512_reduce_max_ps(_mm512_max_ps(maximum[0], maximum[1]));
    }
    const __mmask16 bit = __mmask16(1u << i % 16);
    is_finite[i / 16] = (i % 16 ? is_finite[i / 16] : 0) | (all_finite == 0xffff ? bit : 0);
  }
  __m512 inverse[kVecs];
  for (int v = 0; v < kVecs; v++) inverse[v] = inverse_of(_mm512_loadu_ps(largest + 16 * v), is_finite[v], steps + 16 * v);
  float transposed[16 * kTile];  // 16 features of the tile
  for (int64_t j = 0; j < features; j += 16) {
    const int64_t count = features - j < 16 ? features - j : 16;
    for (int v = 0; v < kVecs; v++)
      transpose(x + 16 * v * stride + j, stride, tokens - 16 * v, count, transposed + 16 * v, kTile, 16);
    for (int i = 0; i < count; i++) round_feature(transposed + i * kTile, inverse, out + (j + i) * kTile);
  }
}

template <int kVecs>
void quantize_tile_of(const float* in, int64_t features, uint8_t* out, float* steps) {
  constexpr int kTile = 16 * kVecs;
  __m512 maximum[kVecs], inverse[kVecs];
  __mmask16 is_finite[kVecs];
  for (int v = 0; v < kVecs; v++) maximum[v] = _mm512_setzero_ps(), is_finite[v] = 0xffff;
  for (int64_t j = 0; j < features; j++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(in + j * kTile + 16 * v));
      is_finite[v] &= finite(size);
      maximum[v] = _mm512_max_ps(maximum[v], size);
    }
  for (int v = 0; v < kVecs; v++) inverse[v] = inverse_of(maximum[v], is_finite[v], steps + 16 * v);
  for (int64_t j = 0; j < features; j++) round_feature(in + j * kTile, inverse, out + j * kTile);
}

INLINE __m512i widened(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Four features of each token side by side: 16 tokens a register.
template <int kVecs>
INLINE void load_quad(const uint8_t* in, const uint16_t* columns, __m512i (&out)[kVecs]) {
  const uint8_t *a = in + columns[0] * 16 * kVecs, *b = in + columns[1] * 16 * kVecs;
  const uint8_t *c = in + columns[2] * 16 * kVecs, *d = in + columns[3] * 16 * kVecs;
  if constexpr (kVecs == 1) {
    const __m512i low = _mm512_or_si512(widened(a), _mm512_slli_epi32(widened(b), 8));
    out[0] = _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(widened(c), 16), _mm512_slli_epi32(widened(d), 24), 0xfe);
  } else {
    const __m512i wa = _mm512_loadu_si512(a), wb = _mm512_loadu_si512(b);
    const __m512i wc = _mm512_loadu_si512(c), wd = _mm512_loadu_si512(d);
    const __m512i ab = _mm512_unpacklo_epi8(wa, wb), ba = _mm512_unpackhi_epi8(wa, wb);
    const __m512i cd = _mm512_unpacklo_epi8(wc, wd), dc = _mm512_unpackhi_epi8(wc, wd);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(ba, dc);
    out[3] = _mm512_unpackhi_epi16(ba, dc);
  }
}

template <int kRows, int kVecs>
void gemm(const Int8Weight& w, const uint8_t* in, const float* steps, float* out, int64_t first, int64_t last) {
  constexpr int kTile = 16 * kVecs;
  for (int64_t g = first; g < last; g++) {
    __m512i sum[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const int64_t row = g * kRows + r;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) sum[r][v] = _mm512_set1_epi32(row < w.out_features ? w.offsets[row] : 0);
    }
    const int64_t end = w.pointers[g + 1];
    for (int64_t p = w.pointers[g]; p < end; p++) {
      __m512i x[kVecs];
      load_quad(in, w.columns + 4 * p, x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        int32_t four;
        __builtin_memcpy(&four, w.values + (p * kRows + r) * 4, 4);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; v++) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x[v], _mm512_set1_epi32(four));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const int64_t row = g * kRows + r;
      const bool real = row < w.out_features;
      const __m512 scale = _mm512_set1_ps(real ? w.scales[row] : 0.0f);
      const __m512 bias = _mm512_set1_ps(real && w.bias ? w.bias[row] : 0.0f);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), scale);
        float* to = out + ((g - first) * kRows + r) * kTile + 16 * v;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_loadu_ps(steps + 16 * v), bias));
      }
    }
  }
}

template <int kVecs>
void gemm_of_rows(const Int8Weight& w, const uint8_t* in, const float* steps, float* out, int64_t first, int64_t last) {
  if (w.rows == 1) return gemm<1, kVecs>(w, in, steps, out, first, last);
  if (w.rows == 2) return gemm<2, kVecs>(w, in, steps, out, first, last);
  return gemm<4, kVecs>(w, in, steps, out, first, last);
}

int width(int tokens) { return tokens <= kNarrowTile ? kNarrowTile : kInt8Tile; }
int attention_width(int64_t) { return kInt8Tile; }
int64_t input_bytes(int64_t features, int tile) { return features * tile; }

bool all_below(const uint16_t* columns, int64_t count, int32_t limit) {
  if (limit > 65535) return true;
  const __m512i end = _mm512_set1_epi16(short(limit));
  __mmask32 too_large = 0;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) too_large |= _mm512_cmpge_epu16_mask(_mm512_loadu_si512(columns + i), end);
  for (; i < count; i++) too_large |= columns[i] >= limit;
  return !too_large;
}

void quantize_rows(const float* x, int64_t stride, int tokens, int64_t features, int tile, uint8_t* out, float* steps) {
  tile == kNarrowTile ? quantize_rows_of<1>(x, stride, tokens, features, out, steps)
                      : quantize_rows_of<4>(x, stride, tokens, features, out, steps);
}

void quantize_tile(const float* in, int64_t features, int tile, uint8_t* out, float* steps) {
  tile == kNarrowTile ? quantize_tile_of<1>(in, features, out, steps) : quantize_tile_of<4>(in, features, out, steps);
}

void matmul(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first,
            int64_t last) {
  tile == kNarrowTile ? gemm_of_rows<1>(w, in, steps, out, first, last)
                      : gemm_of_rows<4>(w, in, steps, out, first, last);
}

void store_rows(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride) {
  for (int i = 0; i < tokens; i += 16)
    for (int64_t j = 0; j < features; j += 16) {
      const int64_t count = features - j < 16 ? features - j : 16, tokens_here = tokens - i < 16 ? tokens - i : 16;
      transpose(in + j * tile + i, tile, count, tokens_here, y + i * stride + j, stride, count);
    }
}

}  // namespace

extern const Int8Kernels kInt8Vnni = {&kAvx512,      width,         attention_width, input_bytes, all_below,
                                      quantize_rows, quantize_tile, matmul,          store_rows};

}  // namespace hf_sparse
