// The int8 kernels for 64-bit ARM with the dot product, which is built for in this file alone: whether a processor has it
// is asked where it runs.
#include <arm_neon.h>

#include "int8.h"
#include "kernels.h"

namespace hf_sparse {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int kTokens = 4;
constexpr const Kernels& kFp32 = kPortable;
constexpr int kVecsAtOnce(int) { return 4; }  // 16 sums, and 16 registers more

typedef int32x4_t Sum;
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

INLINE Ints round(Floats x, Floats inverse) {
  // Wraps around where a token is not finite, whose step is NaN.
  const int32x4_t above = vcvtnq_s32_f32(vfmaq_f32(vdupq_n_f32(128.0f), float32x4_t(x), float32x4_t(inverse)));
  return Ints(vsubq_s32(above, vdupq_n_s32(128)));
}

INLINE void pack(const Ints (&steps)[4], uint8_t* out) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(int32x4_t(steps[0])), vqmovn_s32(int32x4_t(steps[1])));
  const int16x8_t high = vcombine_s16(vqmovn_s32(int32x4_t(steps[2])), vqmovn_s32(int32x4_t(steps[3])));
  vst1q_s8(reinterpret_cast<int8_t*>(out), vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

INLINE int8x16_t load(const uint8_t* in, uint16_t column) { return vreinterpretq_s8_u8(vld1q_u8(in + column * 16)); }

INLINE int16x8_t low_pairs(int8x16_t a, int8x16_t b) { return vreinterpretq_s16_s8(vzip1q_s8(a, b)); }
INLINE int16x8_t high_pairs(int8x16_t a, int8x16_t b) { return vreinterpretq_s16_s8(vzip2q_s8(a, b)); }

template <int kRows, int kFrom, int kVecs>
INLINE void add_quad(const uint8_t* in, const uint16_t* columns, const int8_t* values, Sum (&sum)[kRows][kVecs]) {
  const int8x16_t a = load(in, columns[0]), b = load(in, columns[1]), c = load(in, columns[2]), d = load(in, columns[3]);
  // Four features of each token side by side: 4 tokens a register.
  int16x8_t x[kVecs];
  const int16x8_t ab = low_pairs(a, b), cd = low_pairs(c, d);
  x[0] = vzip1q_s16(ab, cd);
  if constexpr (kVecs > 1) x[1] = vzip2q_s16(ab, cd);
  if constexpr (kVecs > 2) {
    const int16x8_t ba = high_pairs(a, b), dc = high_pairs(c, d);
    x[2] = vzip1q_s16(ba, dc);
    if constexpr (kVecs > 3) x[3] = vzip2q_s16(ba, dc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
    int32_t four;
    __builtin_memcpy(&four, values + 4 * r, 4);
    const int8x16_t w = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) sum[r][v] = vdotq_s32(sum[r][v], vreinterpretq_s8_s16(x[v]), w);
  }
}

INLINE void finish(Sum sum, float scale, const float* steps, float bias, float* out) {
  const float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(sum), scale);
  vst1q_f32(out, vfmaq_f32(vdupq_n_f32(bias), value, vld1q_f32(steps)));
}

}  // namespace
}  // namespace hf_sparse

#include "int8_tiles.h"

namespace hf_sparse {
extern const Int8Kernels kInt8Neon = kTiles;
}  // namespace hf_sparse
