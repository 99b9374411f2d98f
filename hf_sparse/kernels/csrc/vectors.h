// Vectors and functions of them, in vector extensions of GCC and Clang, which any target has; part of kernels.cpp.
#pragma once
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>  // its functions are always inlined
#endif

namespace hf_sparse {
namespace {

constexpr int kLanes = HF_SPARSE_BYTES / 4;
constexpr bool kManyRegisters = HF_SPARSE_BYTES == 64 || HF_SPARSE_NEON;  // 32 registers, not 16

typedef float Vec __attribute__((vector_size(HF_SPARSE_BYTES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(HF_SPARSE_BYTES), may_alias));
typedef float LooseVec __attribute__((vector_size(HF_SPARSE_BYTES), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntQuad __attribute__((vector_size(16)));

#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE static INLINE_METHOD

INLINE Vec broadcast(float value) { return value - Vec{}; }
INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
INLINE void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

// e^x by range reduction to |r| <= ln 2 / 2 and a Taylor polynomial of degree 6 (relative error below 2e-7).
INLINE Vec exponential(Vec x) {
  x = x < broadcast(-87.0f) ? broadcast(-87.0f) : x;
  x = x > broadcast(88.0f) ? broadcast(88.0f) : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which its lowest bits hold
  const Vec shifted = x * broadcast(1.44269504088896341f) + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * broadcast(0.693145751953125f)) - n * broadcast(1.42860682030941723e-6f);
  Vec p = broadcast(1.0f / 720);
  p = p * r + broadcast(1.0f / 120);
  p = p * r + broadcast(1.0f / 24);
  p = p * r + broadcast(1.0f / 6);
  p = p * r + broadcast(0.5f);
  p = p * r + broadcast(1.0f);
  p = p * r + broadcast(1.0f);
  // Times 2^n: n is added to the exponent. x in bounds keeps that one of a finite, normal number; NaN stays one.
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
}

#ifdef __AVX2__
#include "gelu_table.h"

// One coefficient of each lane's piece; the lowest bits of a lane of `piece` say which, the others are not looked at.
INLINE Vec look_up(const float* coefficients, Vec piece) {
#if HF_SPARSE_BYTES == 64
  return _mm512_permutex2var_ps(load(coefficients), _mm512_castps_si512(piece), load(coefficients + 16));
#else
  return _mm256_permutevar8x32_ps(load(coefficients), _mm256_castps_si256(piece));
#endif
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), the latter from a table of polynomials whose coefficients fit one look-up each:
// less than half of the instructions of the form below.
INLINE Vec gelu(Vec x) {
  const Vec size = x < Vec{} ? -x : x;
  const Vec limit = broadcast((sizeof kGeluTail[0] / 4 - 1) / kGeluScale), magic = broadcast(12582912.0f);
  const Vec a = size > limit ? limit : size;
  const Vec shifted = a * broadcast(kGeluScale) + magic;
  const Vec u = a * broadcast(kGeluScale) - (shifted - magic);
  Vec p = look_up(kGeluTail[kGeluDegree], shifted);
#pragma GCC unroll 8
  for (int i = kGeluDegree - 1; i >= 0; i--) p = p * u + look_up(kGeluTail[i], shifted);
  return (x < Vec{} ? Vec{} : x) - a * p;
}
#else
// x Phi(x); Phi by Abramowitz and Stegun 7.1.26 for erf (absolute error 1.5e-7).
INLINE Vec gelu(Vec x) {
  const Vec z = x * broadcast(0.70710678118654752f);
  const Vec a = z < Vec{} ? -z : z;
  const Vec t = broadcast(1.0f) / (a * broadcast(0.3275911f) + broadcast(1.0f));
  Vec p = broadcast(1.061405429f);
  p = p * t + broadcast(-1.453152027f);
  p = p * t + broadcast(1.421413741f);
  p = p * t + broadcast(-0.284496736f);
  p = p * t + broadcast(0.254829592f);
  const Vec tail = broadcast(0.5f) * p * t * exponential(-a * a);  // Phi(-|x|): keeps its digits where x is negative
  return x * (z < Vec{} ? tail : broadcast(1.0f) - tail);
}
#endif

INLINE Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

INLINE Vec apply(Vec x, Activation act) {
  switch (act) {
    case kGelu:
      return gelu(x);
    case kGeluTanh:  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      return x * sigmoid(broadcast(1.5957691216057308f) * (x + broadcast(0.044715f) * x * x * x));
    case kRelu:
      return x < Vec{} ? Vec{} : x;  // keeps NaN
    case kSilu:
      return x * sigmoid(x);
    default:
      return x;
  }
}

__attribute__((noinline)) void activate(float* at, int64_t count, Activation act) {
  for (int64_t i = 0; i < count; i += kLanes) {
    LooseVec* p = reinterpret_cast<LooseVec*>(at + i);
    *p = apply(*p, act);
  }
}

}  // namespace
}  // namespace hf_sparse
