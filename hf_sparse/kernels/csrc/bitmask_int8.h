// Matmul of a weight that is stored as a bit for each entry and its nonzero values in int8; part of kernels.cpp.
//
// Inputs are rounded as they come. Both have a scale for each kScaled columns of a row, so that one large number costs its
// neighbors their digits and no others. 5.25 bits an entry come from memory at 50 % of zeros. Sums of kScaled products are
// exact in int32, those of groups are fp32.
#pragma once
#include "dense_gemv.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>  // its functions are always inlined
#endif

namespace hf_sparse {
namespace {

constexpr int64_t kWordsScaled = kScaled / 64;

// Inputs of all tokens as `bitmask_int8` reads them.
struct RoundedInputs {
  int8_t* steps;     // tokens x padded; with VNNI their sizes, as it multiplies unsigned by signed bytes
  uint64_t* signs;   // tokens x padded / 64: set where an input is negative
  float* scales;     // tokens x groups
  int64_t padded, groups;

  RoundedInputs(float* room, int64_t tokens, int64_t in)
      : padded((in + kScaled - 1) / kScaled * kScaled), groups(padded / kScaled) {
    signs = reinterpret_cast<uint64_t*>(room);
    steps = reinterpret_cast<int8_t*>(signs + tokens * padded / 64);
    scales = reinterpret_cast<float*>(steps + tokens * padded);
  }
};

void bitmask_int8_inputs(const float* x, int64_t tokens, int64_t in, float* room) {
  const RoundedInputs r(room, tokens, in);
  for (int64_t t = 0; t < tokens; t++, x += in)
    for (int64_t g = 0; g < r.groups; g++) {
      const int64_t from = g * kScaled, count = in - from < kScaled ? in - from : kScaled;
      float largest = 0.0f, broken = 0.0f;
      for (int64_t j = from; j < from + count; j++) {
        const float size = x[j] < 0 ? -x[j] : x[j];
        largest = size > largest ? size : largest;
        broken += x[j] * 0.0f;  // NaN for infinities and NaN
      }
      const float inverse = largest < 1e-30f || broken != 0.0f ? 0.0f : 127.0f / largest;
      r.scales[t * r.groups + g] = largest / 127.0f + broken;
      int8_t* steps = r.steps + t * r.padded + from;
      for (int64_t j = 0; j < kScaled; j++) {
        // Adding 1.5 * 2^23 rounds to an integer, half to even.
        const float magic = 12582912.0f, scaled = j < count ? x[from + j] * inverse : 0.0f;
        steps[j] = int8_t((scaled + magic) - magic);
      }
#ifdef __AVX512VNNI__
      for (int64_t w = 0; w < kWordsScaled; w++) {
        const __m512i all = _mm512_loadu_si512(steps + 64 * w);
        r.signs[(t * r.padded + from) / 64 + w] = _mm512_movepi8_mask(all);
        _mm512_storeu_si512(steps + 64 * w, _mm512_abs_epi8(all));
      }
#endif
    }
}

// kTokens tokens from `token` on, of one row.
template <int kTokens>
void row_int8(const BitmaskInt8& w, const RoundedInputs& x, int64_t token, int64_t row, float* y) {
  const uint64_t* bits = w.bits + row * x.groups * kWordsScaled;
  const float* scales = w.scales + row * x.groups;
  const int8_t* values = w.values + w.pointers[row];
  const int8_t* steps = x.steps + token * x.padded;
  const float* sizes = x.scales + token * x.groups;
#ifdef __AVX512VNNI__
  const uint64_t* signs = x.signs + token * x.padded / 64;
  const __m512i zero = _mm512_setzero_si512();
  __m512 sums[kTokens] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    __builtin_prefetch(values + 1024);
    __m512i spread[kWordsScaled];
#pragma GCC unroll 2
    for (int i = 0; i < kWordsScaled; i++) {
      const uint64_t each = bits[g * kWordsScaled + i];
      spread[i] = _mm512_maskz_expand_epi8(each, _mm512_loadu_si512(values));
      values += __builtin_popcountll(each);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
      __m512i sum = zero;
#pragma GCC unroll 2
      for (int i = 0; i < kWordsScaled; i++) {
        const uint64_t negative = signs[t * x.padded / 64 + g * kWordsScaled + i];
        const __m512i sizes_of = _mm512_loadu_si512(steps + t * x.padded + g * kScaled + 64 * i);
        sum = _mm512_dpbusd_epi32(sum, sizes_of, _mm512_mask_sub_epi8(spread[i], negative, zero, spread[i]));
      }
      const float scale = scales[g] * sizes[t * x.groups + g];
      sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), sums[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; t++)
    y[t * int64_t(w.out_features) + row] = horizontal_sum(Vec(sums[t])) + (w.bias ? w.bias[row] : 0.0f);
#else
  float sums[kTokens] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    int8_t spread[kScaled];
    for (int64_t j = 0; j < kScaled; j++) {
      const bool kept = bits[g * kWordsScaled + j / 64] >> j % 64 & 1;
      spread[j] = kept ? *values : int8_t(0);
      values += kept;
    }
    for (int t = 0; t < kTokens; t++) {
      const int8_t* input = steps + t * x.padded + g * kScaled;
      int32_t sum = 0;
      for (int64_t j = 0; j < kScaled; j++) sum += int32_t(spread[j]) * input[j];
      sums[t] += float(sum) * (scales[g] * sizes[t * x.groups + g]);
    }
  }
  for (int t = 0; t < kTokens; t++) y[t * int64_t(w.out_features) + row] = sums[t] + (w.bias ? w.bias[row] : 0.0f);
#endif
}

// Outputs first to last of y = round(x) w^T + bias; `room` as `bitmask_int8_inputs` leaves it.
void bitmask_int8(const BitmaskInt8& w, float* room, float* y, int64_t tokens, int64_t first, int64_t last) {
  const RoundedInputs x(room, tokens, w.in_features);
  for (int64_t row = first; row < last; row++) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) row_int8<8>(w, x, t, row, y + t * w.out_features);
    for (; t + 2 <= tokens; t += 2) row_int8<2>(w, x, t, row, y + t * w.out_features);
    if (t < tokens) row_int8<1>(w, x, t, row, y + t * w.out_features);
  }
}

}  // namespace
}  // namespace hf_sparse
