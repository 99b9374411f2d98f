// Matmul of a weight that is stored as a bit for each entry and its nonzero values in int8 or int4; part of kernels.cpp.
//
// Inputs are rounded to int8 as they come, with a scale for each kScaled columns; weights have scales too, so that one
// large number costs its neighbors their digits and no others. 5.25 bits an entry come from memory at 50 % of zeros, with
// int4 3.3. Sums of the products under one scale are exact in int32, those of all are fp32.
//
// Values are spread over their places by one instruction (AVX-512 VBMI2), or by a shuffle whose indexes a table has for
// each byte of bits (AVX2, NEON): not by pdep, which some processors with AVX2 have in microcode. Where unsigned bytes are
// multiplied by signed ones, the sizes of inputs are multiplied by weights that have taken their signs; sizes are at most
// 127, so that the sum of two products fits 16 bits.
#pragma once
#include "bitmask.h"

namespace hf_sparse {
namespace {

constexpr int64_t kWordsScaled = kScaled / kBits;  // words of bits that share a scale of the inputs

// The step of each of the 16 codes of an int4.
alignas(16) constexpr int8_t kSteps[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8};

// Bytes that hold the values of one word of an int4 weight.
INLINE int64_t nibble_bytes(uint64_t bits) { return (ones(bits) + 1) / 2; }

#ifdef __AVX512VNNI__
constexpr bool kSplitSigns = true;  // inputs are kept as sizes and signs

struct Columns {  // the steps of 64 columns of a row, in their places
  __m512i all;
};
typedef __m512i Total;
typedef Vec Sums;

INLINE Columns spread(uint64_t bits, const int8_t* values) {
  return {_mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values))};
}

INLINE Columns in_place(const int8_t* values) { return {load_halves(values)}; }

INLINE Columns spread_nibbles(uint64_t bits, const uint8_t* values) {
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  const __m512i codes = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  const __m512i steps = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kSteps)));
  return {_mm512_maskz_expand_epi8(bits, _mm512_shuffle_epi8(steps, codes))};
}

INLINE Total add_products(Total sum, const Columns& w, const int8_t* sizes, uint64_t negative) {
  const __m512i weights = _mm512_mask_sub_epi8(w.all, negative, _mm512_setzero_si512(), w.all);
  return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(sizes), weights);
}

INLINE Sums add_scaled(Sums sums, Total total, float scale) {
  return sums + Vec(_mm512_cvtepi32_ps(total)) * broadcast(scale);
}

INLINE float added(Sums sums) { return horizontal_sum(sums); }
#else
constexpr bool kSplitSigns = false;

#if defined(__AVX2__) || HF_SPARSE_NEON
// For each byte of bits, which byte of the values each of its eight columns takes; 0x80: none, a zero. Once for the lower
// and once for the upper half of 16 bytes.
struct PlaceTable {
  uint64_t of[2][256];
  constexpr PlaceTable() : of() {
    for (int bits = 0; bits < 256; bits++) {
      uint64_t next = 0;
      for (int i = 0; i < 8; i++) {
        const bool kept = bits >> i & 1;
        of[0][bits] |= (kept ? next : uint64_t(0x80)) << 8 * i;
        of[1][bits] |= (kept ? next + 8 : uint64_t(0x80)) << 8 * i;
        next += kept;
      }
    }
  }
};
constexpr PlaceTable kPlaces;
#endif

#ifdef __AVX2__
struct Columns {
  __m256i half[2];
};
typedef __m256i Total;
typedef __m256 Sums;

// Eight columns come from one place, the next eight from another: an index need not know how many the first eight took.
INLINE __m128i two_eights(const void* first, const void* second) {
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(static_cast<const __m128i*>(first))),
                                       static_cast<const __m64*>(second)));
}

INLINE __m256i spread_half(uint32_t bits, const int8_t* values) {
  const unsigned byte[4] = {bits & 255, bits >> 8 & 255, bits >> 16 & 255, bits >> 24};
  const int8_t* second = values + ones(byte[0]);
  const int8_t* third = second + ones(byte[1]);
  const int8_t* fourth = third + ones(byte[2]);
  const __m256i found = _mm256_inserti128_si256(_mm256_castsi128_si256(two_eights(values, second)),
                                                two_eights(third, fourth), 1);
  const __m256i places = _mm256_inserti128_si256(
      _mm256_castsi128_si256(two_eights(&kPlaces.of[0][byte[0]], &kPlaces.of[1][byte[1]])),
      two_eights(&kPlaces.of[0][byte[2]], &kPlaces.of[1][byte[3]]), 1);
  return _mm256_shuffle_epi8(found, places);
}

INLINE Columns spread(uint64_t bits, const int8_t* values) {
  const uint32_t low = uint32_t(bits), high = uint32_t(bits >> 32);
  return {{spread_half(low, values), spread_half(high, values + ones(low))}};
}

INLINE Columns in_place(const int8_t* values) {
  const __m256i* from = reinterpret_cast<const __m256i*>(values);
  return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}

// The steps of the values of one word, one after the other.
INLINE void unpack_nibbles(const uint8_t* values, int8_t* out) {
  const __m256i steps = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kSteps)));
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * h)));
    const __m256i codes = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * h), _mm256_shuffle_epi8(steps, codes));
  }
}

INLINE Total add_products(Total sum, const Columns& w, const int8_t* inputs, uint64_t) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs + 32 * h));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w.half[h], x));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sum;
}

INLINE Sums add_scaled(Sums sums, Total total, float scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(scale), sums);
}

#elif HF_SPARSE_NEON
struct Columns {
  int8x16_t part[4];
};
typedef int32x4_t Total;
typedef float32x4_t Sums;

INLINE Columns spread(uint64_t bits, const int8_t* values) {
  Columns out;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, bits >>= 16) {
    const unsigned low = bits & 255, high = bits >> 8 & 255;
    // The values of the second eight columns come after those of the first.
    const uint64_t second = kPlaces.of[0][high] + 0x0101010101010101u * uint64_t(ones(low));
    out.part[i] = vqtbl1q_s8(vld1q_s8(values), vcombine_u8(vcreate_u8(kPlaces.of[0][low]), vcreate_u8(second)));
    values += ones(bits & 0xffff);
  }
  return out;
}

INLINE Columns in_place(const int8_t* values) {
  return {{vld1q_s8(values), vld1q_s8(values + 16), vld1q_s8(values + 32), vld1q_s8(values + 48)}};
}

INLINE void unpack_nibbles(const uint8_t* values, int8_t* out) {
  const int8x16_t steps = vld1q_s8(kSteps);
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const uint8x16_t pairs = vld1q_u8(values + 16 * h);
    const uint8x16_t low = vandq_u8(pairs, vdupq_n_u8(15)), high = vshrq_n_u8(pairs, 4);
    vst1q_s8(out + 32 * h, vqtbl1q_s8(steps, vzip1q_u8(low, high)));
    vst1q_s8(out + 32 * h + 16, vqtbl1q_s8(steps, vzip2q_u8(low, high)));
  }
}

INLINE Total add_products(Total sum, const Columns& w, const int8_t* inputs, uint64_t) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const int8x16_t x = vld1q_s8(inputs + 16 * i);
#ifdef __ARM_FEATURE_DOTPROD
    sum = vdotq_s32(sum, w.part[i], x);
#else
    // Two products of at most 128 * 127 fit 16 bits.
    const int16x8_t pairs = vmull_s8(vget_low_s8(w.part[i]), vget_low_s8(x));
    sum = vpadalq_s16(sum, vmlal_s8(pairs, vget_high_s8(w.part[i]), vget_high_s8(x)));
#endif
  }
  return sum;
}

INLINE Sums add_scaled(Sums sums, Total total, float scale) { return vfmaq_n_f32(sums, vcvtq_f32_s32(total), scale); }

INLINE float added(Sums sums) { return vaddvq_f32(sums); }
#else
struct Columns {
  int8_t each[kBits];
};
typedef int32_t Total;
typedef float Sums;

INLINE Columns spread(uint64_t bits, const int8_t* values) {
  Columns out;
  for (int i = 0; i < kBits; i++) {
    const bool kept = bits >> i & 1;
    out.each[i] = kept ? *values : int8_t(0);
    values += kept;
  }
  return out;
}

INLINE Columns in_place(const int8_t* values) {
  Columns out;
  __builtin_memcpy(out.each, values, sizeof(out.each));
  return out;
}

INLINE void unpack_nibbles(const uint8_t* values, int8_t* out) {
  for (int i = 0; i < kBits; i++) out[i] = kSteps[values[i / 2] >> 4 * (i % 2) & 15];
}

INLINE Total add_products(Total sum, const Columns& w, const int8_t* inputs, uint64_t) {
  for (int i = 0; i < kBits; i++) sum += int32_t(w.each[i]) * inputs[i];
  return sum;
}

INLINE Sums add_scaled(Sums sums, Total total, float scale) { return sums + float(total) * scale; }

INLINE float added(Sums sums) { return sums; }
#endif
#endif

// Inputs of all tokens as `bitmask_rounded` reads them.
struct RoundedInputs {
  int8_t* steps;    // tokens x padded; their sizes, where signs are kept apart
  uint64_t* signs;  // tokens x padded / 64: set where an input is negative
  float* scales;    // tokens x groups
  int64_t padded, groups;

  RoundedInputs(float* room, int64_t tokens, int64_t in)
      : padded((in + kScaled - 1) / kScaled * kScaled), groups(padded / kScaled) {
    signs = reinterpret_cast<uint64_t*>(room);
    steps = reinterpret_cast<int8_t*>(signs + tokens * padded / 64);
    scales = reinterpret_cast<float*>(steps + tokens * padded);
  }
};

void rounded_inputs(const float* x, int64_t tokens, int64_t in, float* room) {
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

// The next 64 columns of a row of each type of values.
struct Int8Row {
  const int8_t* at;

  Int8Row(const BitmaskInt8& w, const uint64_t*, int64_t, int64_t row) : at(w.values + w.pointers[row]) {}

  void fetch_ahead() const { __builtin_prefetch(at + 1024); }
  INLINE_METHOD Columns next(uint64_t bits) {
    const int8_t* from = at;
    at += ones(bits);
    return spread(bits, from);
  }
};

// The same of a row that has a value for each column: its bits are not read, nor the places of values looked for. What
// comes after its last column is multiplied by inputs that are zeros.
struct WholeInt8Row {
  const int8_t* at;

  WholeInt8Row(const BitmaskInt8& w, const uint64_t*, int64_t, int64_t row) : at(w.values + w.pointers[row]) {}

#if defined(__AVX2__) && !defined(__AVX512F__)
  // The processor fetches ahead within a page alone.
  void fetch_ahead() const {
    __builtin_prefetch(at + 3072);
    __builtin_prefetch(at + 3136);
  }
#else
  void fetch_ahead() const {}
#endif
  INLINE_METHOD Columns next(uint64_t) {
    at += kBits;
    return in_place(at - kBits);
  }
};

struct Int4Row {
  const uint8_t* at;

#ifdef __AVX512VNNI__
  Int4Row(const BitmaskInt4& w, const uint64_t*, int64_t, int64_t row) : at(w.values + w.pointers[row]) {}

  INLINE_METHOD Columns next(uint64_t bits) {
    const uint8_t* from = at;
    at += nibble_bytes(bits);
    return spread_nibbles(bits, from);
  }
#else
  // Words are unpacked a few ahead: to be read before they have left the store buffer would take long.
  static constexpr int kAhead = 4;
  const uint64_t* bits_ahead;
  int64_t left;
  int turn = 0;
  int8_t steps[kAhead][kBits + 16] = {};  // a register is read from any of the first 65

  Int4Row(const BitmaskInt4& w, const uint64_t* bits, int64_t words, int64_t row)
      : at(w.values + w.pointers[row]), bits_ahead(bits), left(words) {
    for (int i = 0; i < kAhead - 1; i++) unpack(i);
  }

  INLINE_METHOD void unpack(int slot) {
    if (left == 0) return;
    left--;
    unpack_nibbles(at, steps[slot]);
    at += nibble_bytes(*bits_ahead++);
  }

  INLINE_METHOD Columns next(uint64_t bits) {
    unpack((turn + kAhead - 1) % kAhead);
    const Columns out = spread(bits, steps[turn]);
    turn = (turn + 1) % kAhead;
    return out;
  }
#endif
  void fetch_ahead() const { __builtin_prefetch(at + 1024); }
};

// Words of bits that share a scale of the weight, and that scale.
template <typename W>
constexpr int64_t kShared = kWordsScaled;
template <>
constexpr int64_t kShared<BitmaskInt4> = 1;

INLINE float scale_at(const BitmaskInt8& w, int64_t index) { return w.scales[index]; }
INLINE float scale_at(const BitmaskInt4& w, int64_t index) { return widened(w.scales[index]); }

// kTokens tokens from `token` on, of one row.
template <typename Row, int kTokens, typename W>
void row_rounded(const W& w, const RoundedInputs& x, int64_t token, int64_t row, float* y) {
  constexpr int64_t kParts = kWordsScaled / kShared<W>;  // scales of the weight for one of the inputs
  const uint64_t* bits = w.bits + row * x.groups * kWordsScaled;
  const int8_t* steps = x.steps + token * x.padded;
  const uint64_t* signs = x.signs + token * x.padded / 64;
  const float* sizes = x.scales + token * x.groups;
  Row values(w, bits, x.groups * kWordsScaled, row);
  Sums sums[kTokens] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    values.fetch_ahead();
    Columns columns[kWordsScaled];
#pragma GCC unroll 2
    for (int i = 0; i < kWordsScaled; i++) columns[i] = values.next(bits[g * kWordsScaled + i]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; part++) {
        Total total = {};
#pragma GCC unroll 2
        for (int i = part * int(kShared<W>); i < (part + 1) * int(kShared<W>); i++)
          total = add_products(total, columns[i], steps + t * x.padded + g * kScaled + 64 * i,
                               kSplitSigns ? signs[t * x.padded / 64 + g * kWordsScaled + i] : 0);
        const float scale = scale_at(w, (row * x.groups + g) * kParts + part) * sizes[t * x.groups + g];
        sums[t] = add_scaled(sums[t], total, scale);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; t++) y[t * int64_t(w.out_features) + row] = added(sums[t]) + (w.bias ? w.bias[row] : 0.0f);
}

// All tokens, of one row.
template <typename Row, typename W>
INLINE void tokens_rounded(const W& w, const RoundedInputs& x, int64_t tokens, int64_t row, float* y) {
  constexpr int kMany = kManyRegisters ? 8 : 4;
  int64_t t = 0;
  for (; t + kMany <= tokens; t += kMany) row_rounded<Row, kMany>(w, x, t, row, y + t * w.out_features);
  for (; t + 2 <= tokens; t += 2) row_rounded<Row, 2>(w, x, t, row, y + t * w.out_features);
  if (t < tokens) row_rounded<Row, 1>(w, x, t, row, y + t * w.out_features);
}

// Outputs first to last of y = round(x) w^T + bias; `room` as `rounded_inputs` leaves it.
void bitmask_int8(const BitmaskInt8& w, float* room, float* y, int64_t tokens, int64_t first, int64_t last) {
  const RoundedInputs x(room, tokens, w.in_features);
  for (int64_t row = first; row < last; row++) {
    if (is_whole(w, row)) tokens_rounded<WholeInt8Row>(w, x, tokens, row, y);
    else tokens_rounded<Int8Row>(w, x, tokens, row, y);
  }
}

void bitmask_int4(const BitmaskInt4& w, float* room, float* y, int64_t tokens, int64_t first, int64_t last) {
  const RoundedInputs x(room, tokens, w.in_features);
  for (int64_t row = first; row < last; row++) tokens_rounded<Int4Row>(w, x, tokens, row, y);
}

}  // namespace
}  // namespace hf_sparse
