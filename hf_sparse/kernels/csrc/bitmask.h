// Matmul of a weight that is stored as a bit for each entry and its nonzero values; part of kernels.cpp.
//
// For weights of which half or more is zero, and few tokens: 9 bits an entry at 50 % come from memory instead of 32 where
// the values are bfloat16, 17 where they are fp32. One instruction spreads a register of values over their places
// (AVX-512 VBMI2; elsewhere tables or loops). Products and sums are fp32: a bfloat16 is the upper half of a float, so that
// the result is that of a dense fp32 matmul but for the order of the sums. Zeros are multiplied too: with several tokens
// it is a dense matmul whose weight comes packed.
#pragma once
#include "dense_gemv.h"
#include "unstructured_gemv.h"

#ifdef __AVX2__
#include <immintrin.h>  // its functions are always inlined
#elif HF_SPARSE_NEON
#include <arm_neon.h>  // likewise
#endif

namespace hf_sparse {
namespace {

constexpr int64_t kBits = 64;       // columns of one word of bits
constexpr int64_t kColumns = 1024;  // of a weight that are spread at a time: kSpreadRows of them fit the first cache
constexpr int kSpreadRows = 4;
constexpr int64_t kPanelFloats = 1 << 16;  // of inputs that the second cache has room for

INLINE int ones(uint64_t bits) { return __builtin_popcountll(bits); }

// Whether a row has a value for each column: packing stores the zeros of rows that have few, since their bits, which need
// not be read then, would take more bytes.
template <typename W>
INLINE bool is_whole(const W& w, int64_t row) {
  return w.pointers[row + 1] - w.pointers[row] == w.in_features;
}

INLINE float widened(float value) { return value; }
INLINE float widened(uint16_t value) {  // a bfloat16
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

#ifdef __AVX512F__
// What is read from memory once: in halves a Zen 4 gives 19 GB/s, in whole registers 17.
INLINE __m512i load_halves(const void* from) {
  const __m256i* at = static_cast<const __m256i*>(from);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(at)), _mm256_loadu_si256(at + 1), 1);
}
#endif

#ifdef __AVX512VBMI2__
// Of so many columns the even ones come out first, the halves of 32-bit lanes: inputs are kept in that order.
constexpr int kEvenFirst = 32;

INLINE const uint16_t* spread(uint64_t bits, const uint16_t* values, __m512 (&out)[4]) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const uint32_t half = uint32_t(bits >> 32 * h);
    const __m512i all = _mm512_maskz_expand_epi16(half, _mm512_loadu_si512(values));
    out[2 * h] = _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
    out[2 * h + 1] = _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(int(0xffff0000))));
    values += ones(half);
  }
  return values;
}

INLINE const float* spread(uint64_t bits, const float* values, __m512 (&out)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __mmask16 part = __mmask16(bits >> 16 * i);
    out[i] = _mm512_maskz_expand_ps(part, _mm512_loadu_ps(values));
    values += ones(part);
  }
  return values;
}

// The same of 64 values that are in their places.
INLINE const uint16_t* in_place(const uint16_t* values, __m512 (&out)[4]) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m512i all = load_halves(values + 32 * h);
    out[2 * h] = _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
    out[2 * h + 1] = _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(int(0xffff0000))));
  }
  return values + kBits;
}

INLINE const float* in_place(const float* values, __m512 (&out)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) out[i] = _mm512_loadu_ps(values + 16 * i);
  return values + kBits;
}

template <typename Value>
INLINE const Value* spread(uint64_t bits, const Value* values, float* out) {
  __m512 v[4];
  values = spread(bits, values, v);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + 16 * i, v[i]);
  return values;
}

// One token: what is spread stays in registers.
template <bool kWhole, typename Value>
INLINE float one_row(const uint64_t* bits, const Value* values, const float* x, int64_t words) {
  __m512 sums[4] = {};
  for (int64_t g = 0; g < words; g++, x += kBits) {
    if (!kWhole) __builtin_prefetch(values + 1024);
    __m512 v[4];
    values = kWhole ? in_place(values, v) : spread(bits[g], values, v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] = _mm512_fmadd_ps(v[i], _mm512_loadu_ps(x + 16 * i), sums[i]);
  }
  return horizontal_sum(Vec((sums[0] + sums[1]) + (sums[2] + sums[3])));
}
#else
#ifdef __AVX2__
constexpr int kEvenFirst = 16;

// For each byte of bits, where its eight columns find their value: as bytes of 16-bit values (0x80: nowhere, a zero), and as
// lanes of 32-bit values.
struct SpreadTable {
  alignas(16) uint8_t bytes[256][16];
  alignas(32) int32_t lanes[256][8];
  constexpr SpreadTable() : bytes(), lanes() {
    for (int bits = 0; bits < 256; bits++)
      for (int i = 0, next = 0; i < 8; i++) {
        const bool kept = bits >> i & 1;
        bytes[bits][2 * i] = kept ? uint8_t(2 * next) : 0x80;
        bytes[bits][2 * i + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
        lanes[bits][i] = kept ? next : 0x40000000;  // the second highest bit says that there is none
        next += kept;
      }
  }
};
constexpr SpreadTable kSpreadTable;

INLINE float added(__m256 sums) {
  __m128 part = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  part = _mm_add_ps(part, _mm_movehl_ps(part, part));
  return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
}

// Sixteen columns, the even ones first.
INLINE const uint16_t* spread(unsigned bits, const uint16_t* values, __m256 (&out)[2]) {
  const unsigned low = bits & 255, high = bits >> 8;
  const auto two = [](const void* first, const void* second) {
    return _mm256_loadu2_m128i(static_cast<const __m128i*>(second), static_cast<const __m128i*>(first));
  };
  const __m256i places = two(kSpreadTable.bytes[low], kSpreadTable.bytes[high]);
  const __m256i all = _mm256_shuffle_epi8(two(values, values + ones(low)), places);
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(int(0xffff0000))));
  return values + ones(bits);
}

INLINE const uint16_t* in_place(const uint16_t* values, __m256 (&out)[2]) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(int(0xffff0000))));
  return values + 16;
}

INLINE __m256i spread_byte(int bits, const float* values) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpreadTable.lanes[bits]));
  const __m256i found =
      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), lanes);
  return _mm256_andnot_si256(_mm256_srai_epi32(_mm256_slli_epi32(lanes, 1), 31), found);
}

INLINE const float* spread(unsigned bits, const float* values, __m256 (&out)[2]) {
  const unsigned low = bits & 255, high = bits >> 8;
  out[0] = _mm256_castsi256_ps(spread_byte(int(low), values));
  out[1] = _mm256_castsi256_ps(spread_byte(int(high), values + ones(low)));
  return values + ones(bits);
}

INLINE const float* in_place(const float* values, __m256 (&out)[2]) {
  out[0] = _mm256_loadu_ps(values);
  out[1] = _mm256_loadu_ps(values + 8);
  return values + 16;
}

template <typename Value>
INLINE const Value* spread(uint64_t bits, const Value* values, float* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256 v[2];
    values = spread(unsigned(bits >> 16 * i & 0xffff), values, v);
    _mm256_storeu_ps(out + 16 * i, v[0]);
    _mm256_storeu_ps(out + 16 * i + 8, v[1]);
  }
  return values;
}

// One token: what is spread stays in registers.
template <bool kWhole, typename Value>
INLINE float one_row(const uint64_t* bits, const Value* values, const float* x, int64_t words) {
  __m256 sums[4] = {};
  for (int64_t g = 0; g < words; g++, x += kBits) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      __m256 v[2];
      values = kWhole ? in_place(values, v) : spread(unsigned(bits[g] >> 16 * i & 0xffff), values, v);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const int to = i % 2 * 2 + h;
        sums[to] = _mm256_fmadd_ps(v[h], _mm256_loadu_ps(x + 16 * i + 8 * h), sums[to]);
      }
    }
  }
  return added((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
#else
constexpr int kEvenFirst = 0;

#if HF_SPARSE_NEON
// As above, in bytes: of eight 16-bit values for a byte of bits, of four 32-bit ones for half of one.
struct SpreadTable {
  alignas(16) uint8_t eight[256][16];
  alignas(16) uint8_t four[16][16];
  constexpr SpreadTable() : eight(), four() {
    for (int bits = 0; bits < 256; bits++)
      for (int i = 0, next = 0; i < 8; i++) {
        const bool kept = bits >> i & 1;
        for (int b = 0; b < 2; b++) eight[bits][2 * i + b] = kept ? uint8_t(2 * next + b) : 0x80;
        next += kept;
      }
    for (int bits = 0; bits < 16; bits++)
      for (int i = 0, next = 0; i < 4; i++) {
        const bool kept = bits >> i & 1;
        for (int b = 0; b < 4; b++) four[bits][4 * i + b] = kept ? uint8_t(4 * next + b) : 0x80;
        next += kept;
      }
  }
};
constexpr SpreadTable kSpreadTable;

INLINE const uint16_t* spread(uint64_t bits, const uint16_t* values, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const int byte = int(bits >> 8 * i & 255);
    const uint8x16_t packed = vreinterpretq_u8_u16(vld1q_u16(values));
    const uint16x8_t found = vreinterpretq_u16_u8(vqtbl1q_u8(packed, vld1q_u8(kSpreadTable.eight[byte])));
    vst1q_f32(out + 8 * i, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(found), 16)));
    vst1q_f32(out + 8 * i + 4, vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(found), 16)));
    values += ones(uint64_t(byte));
  }
  return values;
}

INLINE const float* spread(uint64_t bits, const float* values, float* out) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const int half = int(bits >> 4 * i & 15);
    const uint8x16_t packed = vreinterpretq_u8_f32(vld1q_f32(values));
    vst1q_f32(out + 4 * i, vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(kSpreadTable.four[half]))));
    values += ones(uint64_t(half));
  }
  return values;
}
#else
template <typename Value>
INLINE const Value* spread(uint64_t bits, const Value* values, float* out) {
  for (int i = 0; i < kBits; i++) {
    const bool kept = bits >> i & 1;
    out[i] = kept ? widened(*values) : 0.0f;
    values += kept;
  }
  return values;
}
#endif

template <typename Value>
INLINE const Value* in_place(const Value* values, float* out) {
  for (int i = 0; i < kBits; i++) out[i] = widened(values[i]);
  return values + kBits;
}

template <bool kWhole, typename Value>
INLINE float one_row(const uint64_t* bits, const Value* values, const float* x, int64_t words) {
  constexpr int kVecs = kBits / kLanes;
  Vec sums[kVecs] = {};
  for (int64_t g = 0; g < words; g++, x += kBits) {
    alignas(64) float row[kBits];
    values = kWhole ? in_place(values, row) : spread(bits[g], values, row);
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; i++) sums[i] += load(row + i * kLanes) * *reinterpret_cast<const LooseVec*>(x + i * kLanes);
  }
  Vec all = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVecs; i++) all += sums[i];
  return horizontal_sum(all);
}
#endif
#endif

// Rows of x, padded with zeros to whole words, in the order in which values of this type are spread.
void bitmask_inputs(const float* x, int64_t tokens, int64_t in, bool halves, float* out) {
  const int64_t padded = (in + kBits - 1) / kBits * kBits;
  constexpr int64_t kRun = kEvenFirst ? kEvenFirst : 2;
  const bool even_first = kEvenFirst && halves;
  for (int64_t t = 0; t < tokens; t++, x += in, out += padded) {
    for (int64_t j = 0; j < padded; j++) {
      const int64_t from = even_first ? j / kRun * kRun + j % (kRun / 2) * 2 + j % kRun / (kRun / 2) : j;
      out[j] = from < in ? x[from] : 0.0f;
    }
  }
}

// kRows spread rows times kTokens tokens, added to y.
template <int kRows, int kTokens>
INLINE void add_products(const float* rows, const float* x, int64_t stride, int64_t columns, float* y, int64_t out) {
  Vec sums[kRows][kTokens] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec w[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) w[r] = load(rows + r * kColumns + j);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      const Vec input = *reinterpret_cast<const LooseVec*>(x + t * stride + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) sums[r][t] += w[r] * input;
    }
  }
#ifdef __AVX512BW__
  if constexpr (kRows == 4 && kTokens == 4) {
    __m512 all[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) all[i] = sums[i % 4][i / 4];
    alignas(64) float added[16];
    store(added, Vec(horizontal_sums(all)));
    for (int t = 0; t < 4; t++) *reinterpret_cast<Quad*>(y + t * out) += *reinterpret_cast<Quad*>(added + 4 * t);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) y[t * out + r] += horizontal_sum(sums[r][t]);
}

template <int kRows>
void add_rows(const float* rows, const float* x, int64_t stride, int64_t tokens, int64_t columns, float* y, int64_t out) {
  constexpr int kTokens = kManyRegisters ? 4 : 2;
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    add_products<kRows, kTokens>(rows, x + t * stride, stride, columns, y + t * out, out);
  for (; t < tokens; t++) add_products<kRows, 1>(rows, x + t * stride, stride, columns, y + t * out, out);
}

// Up to kSpreadRows rows times some columns of all tokens, added to y; `at` has the next value of each row.
template <typename Value>
void add_block(const Bitmask& w, const Value* values, const float* x, float* y, int64_t tokens, int64_t row,
               int64_t count, int64_t from, int64_t columns, int32_t* at) {
  alignas(64) float rows[kSpreadRows * kColumns];
  const int64_t words = (int64_t(w.in_features) + kBits - 1) / kBits, padded = words * kBits, out = w.out_features;
  for (int64_t r = 0; r < count; r++) {
    const Value* next = values + at[row + r];
    for (int64_t g = 0; g < columns / kBits; g++)
      next = spread(w.bits[(row + r) * words + from / kBits + g], next, rows + r * kColumns + g * kBits);
    at[row + r] = int32_t(next - values);
  }
  if (count == kSpreadRows) return add_rows<kSpreadRows>(rows, x, padded, tokens, columns, y, out);
  for (int64_t r = 0; r < count; r++) add_rows<1>(rows + r * kColumns, x, padded, tokens, columns, y + r, out);
}

template <typename Value>
void bitmask_of(const Bitmask& w, const Value* values, const float* x, float* y, int64_t tokens, int64_t first,
                int64_t last, int32_t* at) {
  const int64_t words = (int64_t(w.in_features) + kBits - 1) / kBits, padded = words * kBits, out = w.out_features;
  if (tokens == 1) {
    for (int64_t row = first; row < last; row++) {
      const uint64_t* bits = w.bits + row * words;
      const Value* from = values + w.pointers[row];
      // What comes after the last column may be no number, which no input of zero takes away.
      const bool whole = is_whole(w, row) && w.in_features % kBits == 0;
      y[row] = whole ? one_row<true>(bits, from, x, words) : one_row<false>(bits, from, x, words);
      if (w.bias) y[row] += w.bias[row];
    }
    return;
  }
  for (int64_t row = first; row < last; row++) at[row] = w.pointers[row];
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t row = first; row < last; row++) y[t * out + row] = w.bias ? w.bias[row] : 0.0f;
  // All rows see the inputs of some columns, which stay in the second cache, before those of the next ones. Inputs that
  // stay there anyway are read to the end, and so is each row: memory gives it fastest from the first to the last value.
  const int64_t panel = tokens * padded <= kPanelFloats ? padded : kColumns;
  for (int64_t j = 0; j < padded; j += panel)
    for (int64_t row = first; row < last; row += kSpreadRows)
      for (int64_t k = j; k < padded && k < j + panel; k += kColumns)
        add_block(w, values, x + k, y + row, tokens, row, last - row < kSpreadRows ? last - row : kSpreadRows, k,
                  padded - k < kColumns ? padded - k : kColumns, at);
}

// Outputs first to last of y = x w^T + bias; x as `bitmask_inputs` leaves it, `at` has room for out_features.
void bitmask(const Bitmask& w, const float* x, float* y, int64_t tokens, int64_t first, int64_t last, int32_t* at) {
  if (w.halves) return bitmask_of(w, static_cast<const uint16_t*>(w.values), x, y, tokens, first, last, at);
  bitmask_of(w, static_cast<const float*>(w.values), x, y, tokens, first, last, at);
}

}  // namespace
}  // namespace hf_sparse
