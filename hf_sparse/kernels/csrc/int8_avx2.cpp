// The int8 kernels for AVX2 without VNNI. Its one instruction that multiplies bytes takes unsigned by signed ones and
// saturates sums of two at 16 bits; here one factor is a size and the other has taken its sign, so that two products are at
// most 2 * 127 * 127, which fits. Beside it inputs as int16, multiplied in pairs, were tried: the same multiplications, but
// twice the bytes to load for each. Equal for 4 rows a block where the inputs are in the first cache, behind by up to two
// fifths for 1 and 2 rows and where they are not. Whole layers gain less over fp32 (bench_int8.py).
//
// Google Highway, which has such products for every processor, was considered again: what is left to write without it are
// the hundred lines below and fewer in int8_neon.cpp, and it would be the first dependency of the build.
#include <immintrin.h>

#include "int8.h"
#include "kernels.h"

namespace hf_sparse {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int kTokens = 8;
constexpr const Kernels& kFp32 = kAvx2;
// Sums, four vectors of inputs, their sizes: 16 registers.
constexpr int kVecsAtOnce(int rows) { return rows == 4 ? 2 : 4; }

typedef __m256i Sum;
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

INLINE Ints round(Floats x, Floats inverse) {
  // Wraps around where a token is not finite, whose step is NaN.
  const __m256i above = _mm256_cvtps_epi32(_mm256_fmadd_ps(x, inverse, _mm256_set1_ps(128.0f)));
  return Ints(_mm256_sub_epi32(above, _mm256_set1_epi32(128)));
}

// Token 8 v + 4 l + k comes to 16 l + 4 v + k, so that unpacking within 128 bits leaves tokens in order.
INLINE void pack(const Ints (&steps)[4], uint8_t* out) {
  const __m256i low = _mm256_packs_epi32(__m256i(steps[0]), __m256i(steps[1]));
  const __m256i high = _mm256_packs_epi32(__m256i(steps[2]), __m256i(steps[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packs_epi16(low, high));
}

INLINE __m256i load(const uint8_t* in, uint16_t column) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + column * 32));
}

// Four features of each token side by side: 8 tokens a register.
template <int kFrom, int kVecs>
INLINE void load_quad(const uint8_t* in, const uint16_t* columns, __m256i (&x)[kVecs]) {
  const __m256i a = load(in, columns[0]), b = load(in, columns[1]), c = load(in, columns[2]), d = load(in, columns[3]);
  if constexpr (kFrom == 0) {
    const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    x[0] = _mm256_unpacklo_epi16(ab, cd);
    if constexpr (kVecs > 1) x[1] = _mm256_unpackhi_epi16(ab, cd);
  }
  if constexpr (kFrom + kVecs > 2) {
    const __m256i ab = _mm256_unpackhi_epi8(a, b), cd = _mm256_unpackhi_epi8(c, d);
    x[2 - kFrom] = _mm256_unpacklo_epi16(ab, cd);
    if constexpr (kFrom + kVecs > 3) x[3 - kFrom] = _mm256_unpackhi_epi16(ab, cd);
  }
}

// sum + the four products of each token.
INLINE __m256i add_products(__m256i sum, __m256i sizes, __m256i others) {
  const __m256i pairs = _mm256_maddubs_epi16(sizes, others);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int kRows, int kFrom, int kVecs>
INLINE void add_quad(const uint8_t* in, const uint16_t* columns, const int8_t* values, Sum (&sum)[kRows][kVecs]) {
  __m256i x[kVecs], sizes[kVecs];
  load_quad<kFrom>(in, columns, x);
  constexpr bool kInputSizes = kRows > kVecs;  // those of which there are fewer are made sizes of
  if constexpr (kInputSizes)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) sizes[v] = _mm256_abs_epi8(x[v]);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
    int32_t four;
    __builtin_memcpy(&four, values + 4 * r, 4);
    const __m256i w = _mm256_set1_epi32(four), size = _mm256_abs_epi8(w);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++)
      sum[r][v] = kInputSizes ? add_products(sum[r][v], sizes[v], _mm256_sign_epi8(w, x[v]))
                              : add_products(sum[r][v], size, _mm256_sign_epi8(x[v], w));
  }
}

INLINE void finish(Sum sum, float scale, const float* steps, float bias, float* out) {
  const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale));
  _mm256_storeu_ps(out, _mm256_fmadd_ps(value, _mm256_loadu_ps(steps), _mm256_set1_ps(bias)));
}

}  // namespace
}  // namespace hf_sparse

#include "int8_tiles.h"

namespace hf_sparse {
extern const Int8Kernels kInt8Avx2 = kTiles;
}  // namespace hf_sparse
