// The products for one instruction set. Built once per set, with its compiler flags and
//   -DHF_SPARSE_KERNELS=<name of the table in kernels.h>  -DHF_SPARSE_BYTES=<bytes of a vector register>
// Everything but the table is local to the file, and no header with inline functions that have a name outside is used: the
// linker must never take the AVX-512 copy of a shared function for all.
#include "attention.h"
#include "dense.h"
#include "norm.h"
#include "singles.h"
#include "transpose.h"

namespace hf_sparse {
namespace {

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

// The single values of one output, eight and four at a time; returns how many were left to do. Columns and values are
// loaded together and taken apart in registers, since loads are as scarce as multiplications. Every second value has sums
// of its own: four sums in a row would wait for each other.
template <int kVecs>
INLINE int64_t singles(const float* __restrict in, const float* __restrict values, const uint8_t* __restrict columns,
                       int64_t count, const Places& places, Vec (&sum)[kVecs]) {
  typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
  Vec other[kVecs] = {};
  int64_t p = 0;
  for (; p + 8 <= count; p += 8) {
    const Eight some = *reinterpret_cast<const Eight*>(values + p);
    const Vec all = WIDE_SHUFFLE(some, some, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    uint64_t at;
    __builtin_memcpy(&at, columns + p, 8);
    single<0>(in, all, at, places, sum);
    single<1>(in, all, at, places, other);
    single<2>(in, all, at, places, sum);
    single<3>(in, all, at, places, other);
    single<4>(in, all, at, places, sum);
    single<5>(in, all, at, places, other);
    single<6>(in, all, at, places, sum);
    single<7>(in, all, at, places, other);
  }
  if (p + 4 <= count) {
    const Quad some = *reinterpret_cast<const Quad*>(values + p);
    const Eight more = WIDE_SHUFFLE(some, some, 0, 1, 2, 3, -1, -1, -1, -1);
    const Vec all = WIDE_SHUFFLE(more, more, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    uint32_t at;
    __builtin_memcpy(&at, columns + p, 4);
    single<0>(in, all, at, places, sum);
    single<1>(in, all, at, places, other);
    single<2>(in, all, at, places, sum);
    single<3>(in, all, at, places, other);
    p += 4;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) sum[v] += other[v];
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
      float* to = out + ((g - first) * kRows + part) * kTile;
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
void product_of(const Weight& w, const float* in, float* out, const Part& part, Activation act) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int64_t kAtOnce = kRows < 16 ? 16 / kRows : 1;  // groups that are still in the first cache for the activation
  for (int64_t c = part.from; c < part.to; c++, in += w.chunk * kTile) {
    if (act == kNone || c + 1 < part.to) {
      sweep<kRows, kVecs>(w, c, in, out, part.first, part.last);
      continue;
    }
    for (int64_t g = part.first; g < part.last; g += kAtOnce) {
      const int64_t end = g + kAtOnce < part.last ? g + kAtOnce : part.last;
      float* to = out + (g - part.first) * kRows * kTile;
      sweep<kRows, kVecs>(w, c, in, to, g, end);
      activate(to, (end - g) * kRows * kTile, act);
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
INLINE void pick(const Weight& w, const float* in, float* out, int vecs, const Part& part, Activation act) {
  if constexpr (kVecs > 0) {
    if (vecs == kVecs) return product_of<kRows, kVecs>(w, in, out, part, act);
    pick<kRows, kVecs - 1>(w, in, out, vecs, part, act);
  }
}

void product(const Weight& w, const float* in, float* out, int tile, const Part& part, Activation act) {
  const int vecs = tile / kLanes;
  switch (w.rows) {
    case 1:
      return pick<1, most_vectors(1)>(w, in, out, vecs, part, act);
    case 2:
      return pick<2, most_vectors(2)>(w, in, out, vecs, part, act);
    case 4:
      return pick<4, most_vectors(4)>(w, in, out, vecs, part, act);
    case 8:
      return pick<8, most_vectors(8)>(w, in, out, vecs, part, act);
    default:
      return pick<16, most_vectors(16)>(w, in, out, vecs, part, act);
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

void vector(const Weight& w, const float* in, float* out, int64_t first, int64_t last, Activation act) {
  const auto product =
#ifdef __AVX512BW__
      w.rows == 1 ? (w.chunk <= 128   ? vector_of_singles<2>
                     : w.chunk <= 192 ? vector_of_singles<3>
                                      : vector_of_singles<4>)
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
extern const Kernels HF_SPARSE_KERNELS = {TEXT(HF_SPARSE_NAME), kLanes,  widest,   gather, scatter,
                                          product,              multiply, vector, activate, normalise, attend, dense};

}  // namespace hf_sparse
