// The products for one instruction set. Built once per set, with its compiler flags and
//   -DHF_SPARSE_KERNELS=<name of the table in kernels.h>  -DHF_SPARSE_BYTES=<bytes of a vector register>
// in vector extensions of GCC and Clang, which any target has. Everything but the table is local to the file, and no
// header with inline functions is used: the linker must never take the AVX-512 copy of a shared function for all.
#include "kernels.h"

#ifdef __AVX512BW__
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

#define INLINE static inline __attribute__((always_inline))

INLINE Vec splat(float value) { return value - Vec{}; }
INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
INLINE void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

// e^x by range reduction to |r| <= ln 2 / 2 and a Taylor polynomial of degree 6 (relative error below 2e-7).
INLINE Vec exponential(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * splat(1.44269504088896341f) + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * splat(0.693145751953125f)) - n * splat(1.42860682030941723e-6f);
  Vec p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const IntVec power = __builtin_convertvector(n, IntVec) + 127;
  return p * reinterpret_cast<Vec>(power << 23);
}

// x Phi(x); Phi by Abramowitz and Stegun 7.1.26 for erf (absolute error 1.5e-7).
INLINE Vec gelu(Vec x) {
  const Vec z = x * splat(0.70710678118654752f);
  const Vec a = z < Vec{} ? -z : z;
  const Vec t = splat(1.0f) / (a * splat(0.3275911f) + splat(1.0f));
  Vec p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const Vec tail = splat(0.5f) * p * t * exponential(-a * a);  // Phi(-|x|): keeps its digits where x is negative
  return x * (z < Vec{} ? tail : splat(1.0f) - tail);
}

INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

INLINE Vec apply(Vec x, Activation act) {
  switch (act) {
    case kGelu:
      return gelu(x);
    case kGeluTanh:  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      return x * sigmoid(splat(1.5957691216057308f) * (x + splat(0.044715f) * x * x * x));
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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define WIDE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, IntQuad{i, j, k, l})
#endif

// Turn 4 rows of 4 floats, `from` apart, into 4 columns, `to` apart.
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

// Turn kLanes rows of kLanes floats into as many columns. Each step interleaves the halves of the rows, so that log2(kLanes)
// of them rotate every index (row, place) into (place, row); whole vectors, hence whole cache lines, are written.
#if HF_SPARSE_BYTES == 64 && defined(WIDE_SHUFFLE)
#define HF_SPARSE_TURNS 1
INLINE void turn(const float* in, int64_t from, float* out, int64_t to) {
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
#ifdef HF_SPARSE_TURNS
    for (; i + 16 <= rows && end == c + 32; i += 16) {
      turn(in + i * from + c, from, out + c * to + i, to);
      turn(in + i * from + c + 16, from, out + (c + 16) * to + i, to);
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

void multiply(float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(a + i, load(a + i) * load(b + i));
}

#if HF_SPARSE_BYTES == 64 && defined(WIDE_SHUFFLE)
#define HF_SPARSE_SINGLES 1

// Spread one place of a vector over all of it. GCC would make the constant place anew for each output, so it is hidden from
// its eyes: made once, kept in a register.
#ifdef __clang__
struct Places {};
#define SPREAD(from, i, places) __builtin_shufflevector(from, from, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i)
#else
struct Places {
  IntVec at[8];
  Places() {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      at[i] = i - IntVec{};
      asm("" : "+v"(at[i]));
    }
  }
};
#define SPREAD(from, i, places) __builtin_shuffle(from, places.at[i])
#endif

template <int kPlace, int kVecs>
INLINE void single(const float* __restrict in, Vec values, uint64_t columns, const Places& places, Vec (&sum)[kVecs]) {
  const float* x = in + (columns >> (8 * kPlace) & 255) * (kVecs * kLanes);
  const Vec weight = SPREAD(values, kPlace, places);
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) sum[v] += weight * load(x + v * kLanes);
}

// The single values of one output, eight and four at a time; returns how many were left to do. One 512-bit load a cycle is
// the limit here, so columns and values are loaded together and taken apart in registers, by units that are idle.
template <int kVecs>
INLINE int64_t singles(const float* __restrict in, const float* __restrict values, const uint8_t* __restrict columns,
                       int64_t count, const Places& places, Vec (&sum)[kVecs]) {
  typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
  int64_t p = 0;
  for (; p + 8 <= count; p += 8) {
    const Eight some = *reinterpret_cast<const Eight*>(values + p);
    const Vec all = WIDE_SHUFFLE(some, some, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    uint64_t at;
    __builtin_memcpy(&at, columns + p, 8);
    single<0>(in, all, at, places, sum);
    single<1>(in, all, at, places, sum);
    single<2>(in, all, at, places, sum);
    single<3>(in, all, at, places, sum);
    single<4>(in, all, at, places, sum);
    single<5>(in, all, at, places, sum);
    single<6>(in, all, at, places, sum);
    single<7>(in, all, at, places, sum);
  }
  if (p + 4 <= count) {
    const Quad some = *reinterpret_cast<const Quad*>(values + p);
    const Eight more = WIDE_SHUFFLE(some, some, 0, 1, 2, 3, -1, -1, -1, -1);
    const Vec all = WIDE_SHUFFLE(more, more, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    uint32_t at;
    __builtin_memcpy(&at, columns + p, 4);
    single<0>(in, all, at, places, sum);
    single<1>(in, all, at, places, sum);
    single<2>(in, all, at, places, sum);
    single<3>(in, all, at, places, sum);
    p += 4;
  }
  return p;
}
#else
struct Places {};
#endif

// kPart of the kRows outputs of each block times kVecs vectors of tokens; kUnroll blocks at once where the sums in flight
// would otherwise be too few to hide the latency of a fused multiply-add.
template <int kRows, int kPart, int kVecs>
INLINE void walk(const float* __restrict in, const float* __restrict values, const uint8_t* __restrict columns,
                 int64_t count, const Places& places, Vec (&sum)[kPart][kVecs]) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int kUnroll = kPart * kVecs >= 4 ? 1 : 4 / (kPart * kVecs);
  int64_t p = 0;
#ifdef HF_SPARSE_SINGLES
  if constexpr (kRows == 1 && kVecs >= 3) p = singles(in, values, columns, count, places, sum[0]);
#endif
  if (kUnroll > 1) {
    Vec more[kUnroll][kPart][kVecs] = {};
    for (; p + kUnroll <= count; p += kUnroll)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; u++) {
        const float* x = in + int64_t(columns[p + u]) * kTile;
        const float* w = values + (p + u) * kRows;
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) {
          const Vec xv = load(x + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kPart; r++) more[u][r][v] += splat(w[r]) * xv;
        }
      }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u++)
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] += more[u][r][v];
  }
  for (; p < count; p++) {
    const float* x = in + int64_t(columns[p]) * kTile;
    const float* w = values + p * kRows;
    Vec xv[kVecs];  // and one weight at a time: with 3 vectors and 4 rows, exactly the 16 registers of AVX2
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) xv[v] = load(x + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kPart; r++) {
      const Vec weight = splat(w[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) sum[r][v] += weight * xv[v];
    }
  }
}

// Groups first to last of one chunk. Apart from all else, so that nothing but the sums competes for registers.
template <int kRows, int kVecs>
__attribute__((noinline)) void sweep(const Weight& w, int64_t chunk, const float* features, float* out, int64_t first,
                                     int64_t last) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int kPart = kRows < 4 ? kRows : 4;  // taller blocks in parts of 4: more sums than registers help nobody
  const int32_t* pointers = w.in_features ? w.pointers + chunk * (groups(w) + 1) : nullptr;
  const Places places;
  for (int64_t g = first; g < last; g++) {
    const int64_t begin = pointers ? pointers[g] : 0, end = pointers ? pointers[g + 1] : 0;
    for (int part = 0; part < kRows; part += kPart) {
      float* to = out + (g * kRows + part) * kTile;
      Vec sum[kPart][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++) {
        const int64_t row = g * kRows + part + r;
        const Vec bias = splat(chunk == 0 && w.bias && row < w.out_features ? w.bias[row] : 0.0f);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] = chunk ? load(to + r * kTile + v * kLanes) : bias;
      }
      walk<kRows, kPart, kVecs>(features, w.values + begin * kRows + part, w.columns + begin, end - begin, places, sum);
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) store(to + r * kTile + v * kLanes, sum[r][v]);
    }
  }
}

template <int kRows, int kVecs>
void product_of(const Weight& w, const float* in, float* out, int64_t first, int64_t last, Activation act) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int64_t kAtOnce = kRows < 16 ? 16 / kRows : 1;  // groups that are still in the first cache for the activation
  const int64_t parts = chunks(w) ? chunks(w) : 1;
  for (int64_t c = 0; c < parts; c++) {
    const float* features = in + c * w.chunk * kTile;
    if (act == kNone || c + 1 < parts) {
      sweep<kRows, kVecs>(w, c, features, out, first, last);
      continue;
    }
    for (int64_t g = first; g < last; g += kAtOnce) {
      const int64_t end = g + kAtOnce < last ? g + kAtOnce : last;
      sweep<kRows, kVecs>(w, c, features, out, g, end);
      activate(out + g * kRows * kTile, (end - g) * kRows * kTile, act);
    }
  }
}

// Vectors of tokens whose sums, inputs and weight fit the registers.
constexpr int most_vectors(int rows) {
  if (HF_SPARSE_BYTES == 64) return 4;
  if (kManyRegisters) return rows == 1 ? 8 : rows == 2 ? 8 : 4;
  return rows == 1 ? 8 : rows == 2 ? 4 : 3;
}

int widest(int rows) { return most_vectors(rows) * kLanes; }

template <int kRows, int kVecs>
INLINE void pick(const Weight& w, const float* in, float* out, int vecs, int64_t first, int64_t last, Activation act) {
  if constexpr (kVecs > 0) {
    if (vecs == kVecs) return product_of<kRows, kVecs>(w, in, out, first, last, act);
    pick<kRows, kVecs - 1>(w, in, out, vecs, first, last, act);
  }
}

void product(const Weight& w, const float* in, float* out, int tile, int64_t first, int64_t last, Activation act) {
  const int vecs = tile / kLanes;
  switch (w.rows) {
    case 1:
      return pick<1, most_vectors(1)>(w, in, out, vecs, first, last, act);
    case 2:
      return pick<2, most_vectors(2)>(w, in, out, vecs, first, last, act);
    case 4:
      return pick<4, most_vectors(4)>(w, in, out, vecs, first, last, act);
    case 8:
      return pick<8, most_vectors(8)>(w, in, out, vecs, first, last, act);
    default:
      return pick<16, most_vectors(16)>(w, in, out, vecs, first, last, act);
  }
}

// The activation of outputs first to last, which need not fill a register.
void activate_some(float* out, int64_t first, int64_t last, Activation act) {
  if (act == kNone) return;
  for (int64_t i = first; i < last; i += kLanes) {
    const int64_t left = last - i;
    if (left >= kLanes) {
      activate(out + i, kLanes, act);
    } else {
      float rest[kLanes] = {};
      for (int64_t k = 0; k < left; k++) rest[k] = out[i + k];
      activate(rest, kLanes, act);
      for (int64_t k = 0; k < left; k++) out[i + k] = rest[k];
    }
  }
}

template <int kRows>
void vector_of(const Weight& w, const float* in, float* out, int64_t first, int64_t last) {
  typedef float Block __attribute__((vector_size(kRows * 4), aligned(4), may_alias));
  const int64_t count = groups(w), parts = chunks(w);
  for (int64_t i = first * kRows; i < last * kRows; i++) out[i] = w.bias && i < w.out_features ? w.bias[i] : 0.0f;
  for (int64_t c = 0; c < parts; c++) {
    const int32_t* pointers = w.pointers + c * (count + 1);
    const float* x = in + c * w.chunk;
    for (int64_t g = first; g < last; g++) {
      const Block* values = reinterpret_cast<const Block*>(w.values) + pointers[g];
      const uint8_t* columns = w.columns + pointers[g];
      const int64_t blocks = pointers[g + 1] - pointers[g];
      Block sum[4] = {};
      int64_t p = 0;
      for (; p + 4 <= blocks; p += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) sum[u] += values[p + u] * x[columns[p + u]];
      for (; p < blocks; p++) sum[0] += values[p] * x[columns[p]];
      *reinterpret_cast<Block*>(out + g * kRows) += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }
}

#ifdef __AVX512BW__
// x[columns] of 16 columns out of kTables registers of 16 floats each: a gather from memory took three times as long.
template <int kTables>
INLINE __m512 look_up(const __m512* x, __m512i columns) {
  if constexpr (kTables == 2) return _mm512_permutex2var_ps(x[0], columns, x[1]);
  if constexpr (kTables > 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(columns, _mm512_set1_epi32(kTables * 8));
    const __m512 low = look_up<kTables / 2>(x, columns);
    return _mm512_mask_mov_ps(low, upper, look_up<kTables / 2>(x + kTables / 2, columns));
  }
}

// One token and single weights: 16 weights of a row at once. A column beyond the chunk picks some other input; it cannot
// read outside.
template <int kTables>
void vector_of_singles(const Weight& w, const float* in, float* out, int64_t first, int64_t last) {
  constexpr int kRows = 128;  // whose sums stay in the first cache from chunk to chunk
  __m512 sums[kRows];
  const int64_t parts = chunks(w);
  for (int64_t begin = first; begin < last; begin += kRows) {
    const int64_t count = last - begin < kRows ? last - begin : kRows;
    for (int64_t i = 0; i < count; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < parts; c++) {
      const int32_t* pointers = w.pointers + c * (w.out_features + int64_t(1)) + begin;
      __m512 x[kTables];
      for (int t = 0; t < kTables; t++) x[t] = _mm512_loadu_ps(in + c * w.chunk + t * 16);
      for (int64_t i = 0; i < count; i++) {
        __m512 sum = sums[i];
        for (int64_t p = pointers[i]; p < pointers[i + 1]; p += 16) {
          const int64_t left = pointers[i + 1] - p;
          const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
          const __m512 values = _mm512_maskz_loadu_ps(mask, w.values + p);
          const __m512i columns = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.columns + p));
          // With the mask: 0 times an infinite input would be NaN.
          sum = _mm512_mask3_fmadd_ps(values, look_up<kTables>(x, columns), sum, mask);
        }
        sums[i] = sum;
      }
    }
    for (int64_t i = 0; i < count; i++)
      out[begin + i] = _mm512_reduce_add_ps(sums[i]) + (w.bias ? w.bias[begin + i] : 0.0f);
  }
}
#endif

void vector(const Weight& w, const float* in, float* out, int64_t first, int64_t last, Activation act) {
  const auto product =
#ifdef __AVX512BW__
      w.rows == 1 ? (w.chunk <= 128 ? vector_of_singles<8> : vector_of_singles<16>)
#else
      w.rows == 1 ? vector_of<1>
#endif
      : w.rows == 2 ? vector_of<2>
      : w.rows == 4 ? vector_of<4>
      : w.rows == 8 ? vector_of<8>
                    : vector_of<16>;
  product(w, in, out, first, last);
  activate_some(out, first * w.rows, last * w.rows, act);
}

}  // namespace

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
extern const Kernels HF_SPARSE_KERNELS = {TEXT(HF_SPARSE_NAME), kLanes,  widest, gather,
                                          scatter,              product, multiply, vector, activate};

}  // namespace hf_sparse
