// The C interface of the fp32 operators: chooses the instruction set, and says what is particular about fp32 matmuls.
#include "driver.h"

namespace hf_sparse {
namespace {

const Kernels* const kAll[] = {
#ifdef HF_SPARSE_X86
    &kAvx512Vbmi, &kAvx512, &kAvx2,
#endif
    &kPortable};
constexpr int kCount = sizeof(kAll) / sizeof(kAll[0]);

bool runs_here(const Kernels* kernels) {
#ifdef HF_SPARSE_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (kernels == &kAvx512Vbmi)
    return avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni");
  if (kernels == &kAvx512) return avx512;
  if (kernels == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return kernels == &kPortable;
}

}  // namespace

const Kernels* kernels_here(int isa) { return isa >= 0 && isa < kCount && runs_here(kAll[isa]) ? kAll[isa] : nullptr; }

namespace {

// Values past the last row that its last word and a register may read.
constexpr int64_t kSlack = 256;

bool is_usable(int isa) { return kernels_here(isa) != nullptr; }

// Pointers that run backwards or past the blocks would read outside; columns cannot (see padded_inputs).
bool is_valid(const Weight& w) {
  // A multiple of 16: the chunks of one weight are then whole blocks of rows of the weight before it.
  if (w.chunk < 16 || w.chunk > 256 || w.chunk % 16) return false;
  if (w.out_features < 0 || w.in_features < 0 || w.blocks < 0) return false;
  if (w.rows != 1 && w.rows != 2 && w.rows != 4 && w.rows != 8 && w.rows != 16) return false;
  const int64_t count = groups(w);
  for (int64_t c = 0; c < chunks(w); c++) {
    const int32_t* p = w.pointers + c * (count + 1);
    int32_t backwards = p[0] < 0;
    for (int64_t g = 0; g < count; g++) backwards |= p[g + 1] < p[g];
    if (backwards || p[count] > w.blocks) return false;
  }
  return true;
}

// A damaged weight cannot make anything read outside: each row ends within its columns, rounded up, of its pointer.
template <typename AnyBitmask>
bool is_valid_bitmask(const AnyBitmask& w) {
  if (w.out_features < 0 || w.in_features < 0 || w.pointers[0] < 0) return false;
  int32_t backwards = 0;
  for (int64_t r = 0; r < w.out_features; r++) backwards |= w.pointers[r + 1] < w.pointers[r];
  return !backwards && w.pointers[w.out_features] + int64_t(w.in_features) + kSlack <= w.count;
}

// Tokens of a weight in bits that are computed at a time: their inputs stay in the second cache.
constexpr int64_t kBitmaskTokens = 64;

// Tile by tile: `prepare(x, tokens, room)` makes inputs of `width` floats a token, `multiply(room, y, tokens, first, last)`
// computes outputs.
template <typename AnyBitmask, typename Prepare, typename Multiply>
int bitmask_linear(const AnyBitmask& w, const float* x, float* y, int64_t tokens, int threads, int64_t width,
                   const Prepare& prepare, const Multiply& multiply) {
  if (!is_valid_bitmask(w)) return kBadWeight;
  const int64_t in = w.in_features, out = w.out_features, tile = min(tokens, kBitmaskTokens);
  float* room = inputs.take(tile * width + 64);
  if (!room) return kNoMemory;
  // A multiple of 4 outputs each, so that no part ends in the middle of rows that are spread together.
  const int64_t quads = ceil_div(out, 4), parts = threads > 1 ? min(4 * int64_t(threads), quads) : 1;
  for (int64_t t = 0; t < tokens; t += tile) {
    const int64_t count = min(tile, tokens - t);
    prepare(x + t * in, count, room);
    parallel_for(parts, threads, [&](int64_t i) {
      multiply(room, y + t * out, count, 4 * (quads * i / parts), min(4 * (quads * (i + 1) / parts), out));
    });
  }
  return kOk;
}

template <typename AnyBitmask, typename Multiply>
int rounded_linear(const Kernels& k, const Multiply& multiply, const AnyBitmask& w, const float* x, float* y,
                   int64_t tokens, int threads) {
  if (tokens < 0) return kBadArgument;
  return bitmask_linear(
      w, x, y, tokens, threads, round_up(w.in_features, kScaled) / 16 * 5,
      [&](const float* from, int64_t count, float* room) { k.rounded_inputs(from, count, w.in_features, room); },
      [&](float* room, float* to, int64_t count, int64_t first, int64_t last) {
        multiply(w, room, to, count, first, last);
      });
}

// Chunks of hidden features that a feed-forward part computes at a time.
constexpr int64_t kPanel = 2;

// Matmuls of `Weight`; see driver.h.
struct Fp32 {
  using Weight = hf_sparse::Weight;
  const Kernels& kernels;

  bool is_valid(const Weight& w) const { return hf_sparse::is_valid(w); }

  // Tokens of a tile: the width with which all tiles take the least time, the widest of equals. `narrow`: the last one is
  // no wider than its tokens need.
  int tile_width(int rows, int64_t widest, int64_t tokens, int threads, bool narrow) const {
    // What a tile costs, in vectors: one of few has too few sums in flight, the fewer the lower the blocks (measured).
    const auto cost = [&](int64_t width) {
      const float vectors = float(width) / float(kernels.lanes);
      return vectors + (rows < 4 ? 1.0f : 0.5f) / vectors;
    };
    int64_t best = kernels.lanes;
    float least = 0;
    for (int64_t width = widest; width >= kernels.lanes; width -= kernels.lanes) {
      const int64_t tiles = ceil_div(tokens, width), last = round_up(tokens - (tiles - 1) * width, kernels.lanes);
      float time = float(ceil_div(tiles, threads)) * cost(width);
      if (narrow && threads == 1) time += cost(last) - cost(width);
      if (least == 0 || time < least) best = width, least = time;
    }
    return int(best);
  }

  int last_width(int tokens, int tile) const { return int(min(round_up(tokens, kernels.lanes), tile)); }

  // One token at a time, by the GEMV kernel, where the lanes hold outputs better than tokens.
  int tile(const Weight& w, int64_t tokens, int threads) const {
    const bool gemv = tokens == 1 || tokens * (w.rows >= kernels.lanes ? w.rows / kernels.lanes : 1) < w.rows;
    return gemv ? 1 : tile_width(w.rows, kernels.widest(w.rows), tokens, threads, true);
  }

  bool linear_tile(const Weight& w, const float* x, float* y, int tokens, int widest, int64_t first, int64_t last,
                   Activation act) const {
    const int tile = widest == 1 ? 1 : last_width(tokens, widest);
    float* in = inputs.take(padded_inputs(w) * tile);
    // Of a GEMV every output at its own index; of a matmul from the first group on.
    float* out = outputs.take(groups(w) * w.rows * tile);
    if (!in || !out) return false;
    const int64_t begin = first * w.rows, end = min(last * w.rows, w.out_features);
    if (tile == 1) {
      for (int64_t j = 0; j < w.in_features; j++) in[j] = x[j];
      kernels.gemv(w, in, out, first, last, act);
      for (int64_t j = begin; j < end; j++) y[j] = out[j];
      return true;
    }
    kernels.gather(x, w.in_features, tokens, w.in_features, tile, in);
    kernels.matmul(w, in, out, tile, part(w, first, last), act);
    kernels.scatter(out, tile, end - begin, tokens, y + begin, w.out_features);
    return true;
  }

  // With fewer tokens than a tile and several threads, or one token.
  bool by_outputs(int64_t tokens, int threads) const {
    return tokens < kernels.lanes || (threads > 1 && tokens < int64_t(kernels.lanes) * threads);
  }

  int ffn_tile_width(const Weight& first, const Weight* second, const Weight& down, int64_t tokens, int threads) const {
    const int64_t up = min(kernels.widest(first.rows), kernels.widest(second ? second->rows : first.rows));
    return tile_width(first.rows, min(up, kernels.widest(down.rows)), tokens, threads, true);
  }

  bool ffn_tile(const Weight& first, const Weight* second, const Weight& down, const Norm* norm, const float* x, float* y,
                int tokens, int widest, Activation act) const {
    const Kernels& k = kernels;
    const int tile = last_width(tokens, widest);
    const int64_t inner = first.in_features, hidden = first.out_features;
    // The hidden features of as many chunks at a time as fit the second cache: none of them is kept.
    const int64_t panel = down.chunk * kPanel, room = (panel + 256) * tile;
    float* in = inputs.take(padded_inputs(second && second->chunk > first.chunk ? *second : first) * tile);
    float* h = hiddens.take(room);
    float* gated = second ? gates.take(room) : nullptr;
    float* out = outputs.take(groups(down) * down.rows * tile);
    if (!in || !h || !out || (second && !gated)) return false;
    k.gather(x, inner, tokens, inner, tile, in);
    if (hidden == 0) k.matmul(down, h, out, tile, all(down), kNone);
    const auto rows_of = [](const Weight& w, int64_t from, int64_t end) {
      return part(w, from / w.rows, round_up(end, w.rows) / w.rows);
    };
    for (int64_t from = 0; from < hidden; from += panel) {
      const int64_t end = min(from + panel, hidden);
      k.matmul(first, in, h, tile, rows_of(first, from, end), act);
      if (second) {
        k.matmul(*second, in, gated, tile, rows_of(*second, from, end), kNone);
        k.multiply(h, gated, (end - from) * tile);
      }
      k.matmul(down, h, out, tile, {0, groups(down), from / down.chunk, ceil_div(end, down.chunk)}, kNone);
    }
    if (norm) k.normalize(out, in, down.out_features, tile, *norm);
    k.scatter(out, tile, down.out_features, tokens, y, down.out_features);
    return true;
  }

  int attention_tile(const Weight& w, const Weight* output, int64_t length, int threads) const {
    const int64_t widest = min(kernels.widest(w.rows), kernels.widest(output ? output->rows : w.rows));
    return tile_width(w.rows, widest, length, output ? threads : 1, false);
  }

  int64_t input_floats(const Weight& w, int tile) const { return padded_inputs(w) * tile; }

  void load(const float* x, int64_t stride, int tokens, const Weight& w, int tile, float* in) const {
    kernels.gather(x, stride, tokens, w.in_features, tile, in);
  }

  // The output layer reads the outputs of the heads where they are.
  int64_t head_floats(const Weight* output, int64_t inner, int tile) const {
    return (output ? padded_inputs(*output) : inner) * tile;
  }
  int64_t rounded_floats(const Weight&, int) const { return 0; }
  void round(const float*, int64_t, int, float*) const {}

  void matmul(const Weight& w, const float* in, float* out, int tile, int64_t first, int64_t last) const {
    kernels.matmul(w, in, out, tile, part(w, first, last), kNone);
  }

  const float* residual(const float*, int, int64_t, int, const float* in) const { return in; }

  void store(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride) const {
    kernels.scatter(in, tile, features, tokens, y, stride);
  }
};

}  // namespace
}  // namespace hf_sparse

using namespace hf_sparse;

// The name of the instruction set at this index, best first; null where this processor lacks it, "" past the last.
EXPORT const char* hf_sparse_isa(int index) {
  if (index < 0 || index >= kCount) return "";
  return runs_here(kAll[index]) ? kAll[index]->name : nullptr;
}

// Whether work is shared among threads: not where the compiler had no OpenMP.
EXPORT int hf_sparse_shares() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// y = activation(x w^T + bias); x is tokens x in_features, y tokens x out_features, both dense.
EXPORT int hf_sparse_linear(int isa, const Weight* w, const float* x, float* y, int64_t tokens, int32_t activation,
                            int32_t threads) {
  if (!is_usable(isa)) return kBadArgument;
  return checked_linear(Fp32{*kAll[isa]}, *w, x, y, tokens, activation, threads);
}

// y = (activation(x first^T + bias) [* (x second^T + bias)]) down^T + bias; second may be null. With a norm, which needs
// at least as many tokens as lanes for each thread: y = norm(x + that).
EXPORT int hf_sparse_ffn(int isa, const Weight* first, const Weight* second, const Weight* down, const Norm* norm,
                         const float* x, float* y, int64_t tokens, int32_t activation, int32_t threads) {
  if (!is_usable(isa)) return kBadArgument;
  return checked_ffn(Fp32{*kAll[isa]}, *first, second, *down, norm, x, y, tokens, activation, threads);
}

// Self-attention: w has the queries, keys and values of all heads above each other; y is batch x length x a third of its
// outputs. `mask` (or null) is length x length, added to the scores; `mask_step` floats from one sequence to the next. With
// an output weight (or null), y is the output layer of that, and with a norm (or null) y = norm(x + that).
EXPORT int hf_sparse_attention(int isa, const Weight* w, const Weight* output, const Norm* norm, const float* x, float* y,
                               const float* mask, int64_t mask_step, int64_t batch, int64_t length, int32_t heads,
                               float scale, int32_t threads) {
  if (!is_usable(isa)) return kBadArgument;
  return checked_attention(Fp32{*kAll[isa]}, *w, output, norm, x, y, mask, mask_step, batch, length, heads, scale, threads);
}

// y = x weight^T + bias, all of them dense and by rows, for a few tokens.
EXPORT int hf_sparse_dense(int isa, const float* weight, const float* bias, const float* x, float* y, int64_t tokens,
                           int64_t in, int64_t out, int32_t threads) {
  if (!is_usable(isa) || tokens < 0 || in < 0 || out < 0) return kBadArgument;
  const int64_t parts = threads > 1 ? 4 * int64_t(threads) : 1;  // so that none waits long for the last
  parallel_for(parts, threads, [&](int64_t i) {
    kAll[isa]->dense_gemv(weight, bias, x, y, tokens, in, out, out * i / parts, out * (i + 1) / parts);
  });
  return kOk;
}

// RMSNorm of each row; `offset` is added to the weight.
EXPORT int hf_sparse_rms_norm(int isa, const float* x, const float* weight, float* y, int64_t rows, int64_t features,
                              float eps, float offset) {
  if (!is_usable(isa) || rows < 0 || features < 0) return kBadArgument;
  kAll[isa]->rms_norm(x, weight, y, rows, features, eps, offset);
  return kOk;
}

// y = x w^T + bias of a weight in bits; x is tokens x in_features, y tokens x out_features, both dense.
EXPORT int hf_sparse_bitmask(int isa, const Bitmask* w, const float* x, float* y, int64_t tokens, int32_t threads) {
  if (!is_usable(isa) || tokens < 0) return kBadArgument;
  const Kernels& k = *kAll[isa];
  int32_t* at = reinterpret_cast<int32_t*>(outputs.take(w->out_features));
  if (!at) return kNoMemory;
  return bitmask_linear(
      *w, x, y, tokens, threads, round_up(w->in_features, 64),
      [&](const float* from, int64_t count, float* room) {
        k.bitmask_inputs(from, count, w->in_features, w->halves, room);
      },
      [&](float* room, float* to, int64_t count, int64_t first, int64_t last) {
        k.bitmask(*w, room, to, count, first, last, at);
      });
}

// The same of int8 values, or int4: y = round(x) w^T + bias.
EXPORT int hf_sparse_bitmask_int8(int isa, const BitmaskInt8* w, const float* x, float* y, int64_t tokens,
                                  int32_t threads) {
  if (!is_usable(isa)) return kBadArgument;
  return rounded_linear(*kAll[isa], kAll[isa]->bitmask_int8, *w, x, y, tokens, threads);
}

EXPORT int hf_sparse_bitmask_int4(int isa, const BitmaskInt4* w, const float* x, float* y, int64_t tokens,
                                  int32_t threads) {
  if (!is_usable(isa)) return kBadArgument;
  return rounded_linear(*kAll[isa], kAll[isa]->bitmask_int4, *w, x, y, tokens, threads);
}
