// The kernels for one instruction set. Built once per set, with its compiler flags and
//   -DHF_SPARSE_KERNELS=<name of the table in kernels.h>  -DHF_SPARSE_BYTES=<bytes of a vector register>
// Everything but the table is local to the file, and no header with inline functions that have a name outside is used: the
// linker must never take the AVX-512 copy of a shared function for all.
#include "attention.h"
#include "bitmask.h"
#include "bitmask_rounded.h"
#include "dense_gemv.h"
#include "norm.h"
#include "transpose.h"
#include "unstructured_gemv.h"

namespace hf_sparse {
namespace {

void multiply(float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(a + i, load(a + i) * load(b + i));
}

#if HF_SPARSE_BYTES >= 32 && defined(WIDE_SHUFFLE)
#define HF_SPARSE_UNROLLED_ROW 1

#if HF_SPARSE_BYTES == 32
struct LaneIndexes {};
// Four values in both halves of a register, in each of which one can be broadcast.
INLINE Vec load_four(const float* from) {
  const Quad quad = *reinterpret_cast<const Quad*>(from);
  return WIDE_SHUFFLE(quad, quad, 0, 1, 2, 3, 0, 1, 2, 3);
}
#define BROADCAST_LANE(from, i, lanes) WIDE_SHUFFLE(from, from, i, i, i, i, i + 4, i + 4, i + 4, i + 4)
#else
INLINE Vec load_four(const float* from) {
  const Quad quad = *reinterpret_cast<const Quad*>(from);
  const auto wide = WIDE_SHUFFLE(quad, quad, 0, 1, 2, 3, -1, -1, -1, -1);
  return WIDE_SHUFFLE(wide, wide, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
}
// Broadcast one lane of a vector. GCC would make the constant index anew for each output, so an empty asm hides its value:
// made once, kept in a register.
#ifdef __clang__
struct LaneIndexes {};
#define BROADCAST_LANE(from, i, lanes) __builtin_shufflevector(from, from, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i)
#else
struct LaneIndexes {
  IntVec at[8];
  LaneIndexes() {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      at[i] = i - IntVec{};
      asm("" : "+v"(at[i]));
    }
  }
};
#define BROADCAST_LANE(from, i, lanes) __builtin_shuffle(from, lanes.at[i])
#endif
INLINE Vec load_eight(const float* from) {
  typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
  const Eight eight = *reinterpret_cast<const Eight*>(from);
  return WIDE_SHUFFLE(eight, eight, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1);
}
#endif

template <int kLane, int kVecs>
INLINE void multiply_column(const float* __restrict in, Vec values, uint64_t columns, const LaneIndexes& lanes,
                            Vec (&sum)[kVecs]) {
  const float* x = in + (columns >> (8 * kLane) & 255) * (kVecs * kLanes);
  const Vec weight = BROADCAST_LANE(values, kLane, lanes);
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) sum[v] += weight * load(x + v * kLanes);
}

// Multiply-adds to one sum wait for each other. So many sums an output and vector, for enough in flight that fit registers.
constexpr int sums_of(int vecs) {
  if (HF_SPARSE_BYTES == 64) return vecs <= 2 ? 4 : 2;
  return vecs <= 2 ? 4 : vecs <= 6 ? 2 : 1;
}

constexpr int kFewestUnrolled = HF_SPARSE_BYTES == 64 ? 2 : 1;  // vectors: for one of 64 bytes the plain loop is faster

// The 1 x 1 blocks of one output, eight and four at a time; returns how many are done. Columns and values are loaded
// together and split in registers, since loads are as scarce as multiplications.
template <int kVecs>
INLINE int64_t unrolled_row(const float* __restrict in, const float* __restrict values, const uint8_t* __restrict columns,
                            int64_t count, const LaneIndexes& lanes, Vec (&sum)[kVecs]) {
  constexpr int kSums = sums_of(kVecs);
  Vec more[3][kVecs] = {};
  Vec (&second)[kVecs] = kSums > 1 ? more[0] : sum, (&third)[kVecs] = kSums > 2 ? more[1] : sum;
  Vec (&fourth)[kVecs] = kSums > 2 ? more[2] : second;
  int64_t p = 0;
#if HF_SPARSE_BYTES == 64
  for (; p + 8 <= count; p += 8) {
    const Vec all = load_eight(values + p);
    uint64_t at;
    __builtin_memcpy(&at, columns + p, 8);
    multiply_column<0>(in, all, at, lanes, sum);
    multiply_column<1>(in, all, at, lanes, second);
    multiply_column<2>(in, all, at, lanes, third);
    multiply_column<3>(in, all, at, lanes, fourth);
    multiply_column<4>(in, all, at, lanes, sum);
    multiply_column<5>(in, all, at, lanes, second);
    multiply_column<6>(in, all, at, lanes, third);
    multiply_column<7>(in, all, at, lanes, fourth);
  }
#endif
  for (; p + 4 <= count; p += 4) {
    const Vec all = load_four(values + p);
    uint32_t at;
    __builtin_memcpy(&at, columns + p, 4);
    multiply_column<0>(in, all, at, lanes, sum);
    multiply_column<1>(in, all, at, lanes, second);
    multiply_column<2>(in, all, at, lanes, third);
    multiply_column<3>(in, all, at, lanes, fourth);
  }
#pragma GCC unroll 4
  for (int i = 0; i + 1 < kSums; i++)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) sum[v] += more[i][v];
  return p;
}
#else
struct LaneIndexes {};
#endif

// Sums in flight that hide the latency of a multiply-add, where registers allow: measured, more is slower at 64 bytes.
constexpr int kInFlight = HF_SPARSE_BYTES == 32 ? 8 : 4;

// Floats of a weight that are asked for before they are multiplied: layer after layer, weights come from the third cache.
// Worth 5 % with registers of 32 bytes; with 64, multiplied twice as fast, it was not.
constexpr int kAhead = HF_SPARSE_BYTES == 32 ? 512 : 0;

// The micro-kernel: kPart of the kRows outputs of each block times kVecs vectors of tokens; kUnroll blocks at once where
// the sums in flight would otherwise be too few to hide the latency of a fused multiply-add.
template <int kRows, int kPart, int kVecs>
INLINE void micro_kernel(const float* __restrict in, const float* __restrict values, const uint8_t* __restrict columns,
                 int64_t count, const LaneIndexes& lanes, Vec (&sum)[kPart][kVecs]) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int kUnroll = kPart * kVecs >= kInFlight ? 1 : kInFlight / (kPart * kVecs);
  int64_t p = 0;
#ifdef HF_SPARSE_UNROLLED_ROW
  if constexpr (kRows == 1 && kVecs >= kFewestUnrolled) p = unrolled_row(in, values, columns, count, lanes, sum[0]);
#endif
  if (kUnroll > 1) {
    Vec partial[kUnroll][kPart][kVecs] = {};
    for (; p + kUnroll <= count; p += kUnroll)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; u++) {
        const float* x = in + int64_t(columns[p + u]) * kTile;
        const float* w = values + (p + u) * kRows;
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) {
          const Vec xv = load(x + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kPart; r++) partial[u][r][v] += broadcast(w[r]) * xv;
        }
      }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u++)
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] += partial[u][r][v];
  }
  for (; p < count; p++) {
    const float* x = in + int64_t(columns[p]) * kTile;
    const float* w = values + p * kRows;
    if (kAhead) __builtin_prefetch(w + kAhead);
    Vec xv[kVecs];  // and one weight at a time: with 3 vectors and 4 rows, exactly the 16 registers of AVX2
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) xv[v] = load(x + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kPart; r++) {
      const Vec weight = broadcast(w[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) sum[r][v] += weight * xv[v];
    }
  }
}

// A panel: groups first to last of one chunk. Not inlined, so that nothing but the sums competes for registers.
template <int kRows, int kVecs>
__attribute__((noinline)) void panel(const Weight& w, int64_t chunk, const float* features, float* out, int64_t first,
                                     int64_t last) {
  constexpr int kTile = kVecs * kLanes;
  constexpr int kPart = kRows < 4 ? kRows : 4;  // taller blocks in parts of 4: more sums than registers help nobody
  const int32_t* pointers = w.in_features ? w.pointers + chunk * (groups(w) + 1) : nullptr;
  const LaneIndexes lanes;
  for (int64_t g = first; g < last; g++) {
    const int64_t begin = pointers ? pointers[g] : 0, end = pointers ? pointers[g + 1] : 0;
    for (int part = 0; part < kRows; part += kPart) {
      float* to = out + ((g - first) * kRows + part) * kTile;
      Vec sum[kPart][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++) {
        const int64_t row = g * kRows + part + r;
        const Vec bias = broadcast(chunk == 0 && w.bias && row < w.out_features ? w.bias[row] : 0.0f);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) sum[r][v] = chunk ? load(to + r * kTile + v * kLanes) : bias;
      }
      micro_kernel<kRows, kPart, kVecs>(features, w.values + begin * kRows + part, w.columns + begin, end - begin, lanes,
                                        sum);
#pragma GCC unroll 8
      for (int r = 0; r < kPart; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) store(to + r * kTile + v * kLanes, sum[r][v]);
    }
  }
}

template <int kRows, int kVecs>
void gemm(const Weight& w, const float* in, float* out, const Part& part, Activation act) {
  constexpr int kTile = kVecs * kLanes;
  // Groups whose outputs are still in the first cache for the activation.
  constexpr int64_t kGroupsAtOnce = kRows < 16 ? 16 / kRows : 1;
  for (int64_t c = part.from; c < part.to; c++, in += w.chunk * kTile) {
    if (act == kNone || c + 1 < part.to) {
      panel<kRows, kVecs>(w, c, in, out, part.first, part.last);
      continue;
    }
    for (int64_t g = part.first; g < part.last; g += kGroupsAtOnce) {
      const int64_t end = g + kGroupsAtOnce < part.last ? g + kGroupsAtOnce : part.last;
      float* to = out + (g - part.first) * kRows * kTile;
      panel<kRows, kVecs>(w, c, in, to, g, end);
      activate(to, (end - g) * kRows * kTile, act);
    }
  }
}

// Vectors of tokens whose sums, inputs and weight fit the registers.
constexpr int max_vectors(int rows) {
  if (HF_SPARSE_BYTES == 64) return 4;
  if (kManyRegisters) return rows == 1 ? 8 : rows == 2 ? 8 : 4;
  return rows == 1 ? 8 : rows == 2 ? 4 : 3;
}

int widest(int rows) { return max_vectors(rows) * kLanes; }

template <int kRows, int kVecs>
INLINE void gemm_of_width(const Weight& w, const float* in, float* out, int vecs, const Part& part, Activation act) {
  if constexpr (kVecs > 0) {
    if (vecs == kVecs) return gemm<kRows, kVecs>(w, in, out, part, act);
    gemm_of_width<kRows, kVecs - 1>(w, in, out, vecs, part, act);
  }
}

void matmul(const Weight& w, const float* in, float* out, int tile, const Part& part, Activation act) {
  const int vecs = tile / kLanes;
  switch (w.rows) {
    case 1:
      return gemm_of_width<1, max_vectors(1)>(w, in, out, vecs, part, act);
    case 2:
      return gemm_of_width<2, max_vectors(2)>(w, in, out, vecs, part, act);
    case 4:
      return gemm_of_width<4, max_vectors(4)>(w, in, out, vecs, part, act);
    case 8:
      return gemm_of_width<8, max_vectors(8)>(w, in, out, vecs, part, act);
    default:
      return gemm_of_width<16, max_vectors(16)>(w, in, out, vecs, part, act);
  }
}

// The activation of outputs first to last, which need not fill a register.
void activate_range(float* out, int64_t first, int64_t last, Activation act) {
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
void gemv_of(const Weight& w, const float* in, float* out, int64_t first, int64_t last) {
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

void gemv(const Weight& w, const float* in, float* out, int64_t first, int64_t last, Activation act) {
  const auto matmul =
#ifdef __AVX512BW__
      w.rows == 1 ? (w.chunk <= 128   ? gemv_unstructured<2>
                     : w.chunk <= 192 ? gemv_unstructured<3>
                                      : gemv_unstructured<4>)
#else
      w.rows == 1 ? gemv_of<1>
#endif
      : w.rows == 2 ? gemv_of<2>
      : w.rows == 4 ? gemv_of<4>
      : w.rows == 8 ? gemv_of<8>
                    : gemv_of<16>;
  matmul(w, in, out, first, last);
  activate_range(out, first * w.rows, last * w.rows, act);
}

}  // namespace

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
extern const Kernels HF_SPARSE_KERNELS = {
    TEXT(HF_SPARSE_NAME), kLanes, widest,    gather, scatter,    matmul,         multiply,
    gemv,                 activate, normalize, attend, dense_gemv, bitmask_inputs, bitmask,
    rounded_inputs,       bitmask_int8, bitmask_int4, rms_norm};

}  // namespace hf_sparse
