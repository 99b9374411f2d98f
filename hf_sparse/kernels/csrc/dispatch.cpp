// The C interface: chooses the instruction set, checks pointers, cuts the work into tiles, shares it among threads.
#include "kernels.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hf_sparse {
namespace {

enum Result : int { kOk, kBadPointers, kNoMemory, kBadArgument };

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
  if (kernels == &kAvx512Vbmi) return avx512 && __builtin_cpu_supports("avx512vbmi");
  if (kernels == &kAvx512) return avx512;
  if (kernels == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return kernels == &kPortable;
}

thread_local Scratch inputs, outputs, gates, hiddens;

// Pointers that run backwards or past the blocks would read outside; columns cannot (see padded_inputs).
bool sound(const Weight& w) {
  // A multiple of 16: the chunks of one weight are then whole blocks of rows of the weight before it.
  if (w.chunk < 16 || w.chunk > 256 || w.chunk % 16 || w.out_features < 0 || w.in_features < 0 || w.blocks < 0) return false;
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

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Tokens a tile: as wide as the registers allow, but no wider than there are tokens for, and a tile for each thread.
int tile_width(const Kernels& k, int widest, int64_t tokens, int threads) {
  int64_t each = threads > 1 ? (tokens + threads - 1) / threads : tokens;
  if (each < k.lanes) each = k.lanes;
  const int64_t tiles = (each + widest - 1) / widest;
  const int64_t width = up((each + tiles - 1) / tiles, k.lanes);
  return int(width < widest ? width : widest);
}

// Chunks of hidden features that a feed-forward part computes at a time.
constexpr int64_t kPanel = 2;

int smaller(int a, int b) { return a < b ? a : b; }

int linear(const Kernels& k, const Weight& w, const float* x, float* y, int64_t tokens, Activation act, int threads) {
  const bool few = tokens == 1 || tokens * (w.rows >= k.lanes ? w.rows / k.lanes : 1) < w.rows;
  const int tile = few ? 1 : tile_width(k, k.widest(w.rows), tokens, threads);
  const int64_t tiles = (tokens + tile - 1) / tile, count = groups(w);
  // Where there are fewer tiles than threads, each tile's outputs are cut as well.
  const int64_t cuts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles;
  bool failed = false;
  share(tiles * cuts, threads, [&](int64_t i) {
    const int64_t start = i / cuts * tile, first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
    const int here = int(tokens - start < tile ? tokens - start : tile);
    float* in = inputs.take(padded_inputs(w) * tile);
    float* out = outputs.take(count * w.rows * tile);  // of a vector at its place, of a product from the first group on
    if (!in || !out) {
      failed = true;
      return;
    }
    const int64_t begin = first * w.rows, end = last * w.rows < w.out_features ? last * w.rows : w.out_features;
    if (few) {
      for (int64_t j = 0; j < w.in_features; j++) in[j] = x[start * w.in_features + j];
      k.vector(w, in, out, first, last, act);
      for (int64_t j = begin; j < end; j++) y[start * w.out_features + j] = out[j];
      return;
    }
    k.gather(x + start * w.in_features, w.in_features, here, w.in_features, tile, in);
    k.product(w, in, out, tile, part(w, first, last), act);
    k.scatter(out, tile, end - begin, here, y + start * w.out_features + begin, w.out_features);
  });
  return failed ? kNoMemory : kOk;
}

// What comes after the heads of an attention: their product with the output weight, to which the inputs are added, and
// the layer norm of the sum. Or nothing, where the weight is null.
struct After {
  const Weight* output;
  const Norm* norm;
};

// One sequence: queries, keys and values of some heads and what these make of them, heads after heads, then what comes after.
int attention(const Kernels& k, const Weight& w, const After& after, const float* x, float* y, const float* mask,
              int64_t length, int heads, float scale, int threads) {
  const int64_t inner = w.out_features / 3, size = inner / heads;
  const int64_t width = after.output ? after.output->out_features : inner;
  const int widest = smaller(k.widest(w.rows), k.widest(after.output ? after.output->rows : w.rows));
  const int tile = tile_width(k, widest, length, after.output ? threads : 1);
  // From one tile to the next: of inputs, of what the heads make of them, of outputs.
  const int64_t tiles = (length + tile - 1) / tile, in_step = padded_inputs(w) * tile;
  const int64_t mixed_step = (after.output ? padded_inputs(*after.output) : inner) * tile;
  const int64_t out_step = after.output ? groups(*after.output) * after.output->rows * tile : 0;
  float* all = hiddens.take(tiles * (in_step + mixed_step + out_step));
  if (!all) return kNoMemory;
  float *const mixed = all + tiles * in_step, *const out = mixed + tiles * mixed_step;
  const auto here = [&](int64_t t) { return int(length - t * tile < tile ? length - t * tile : tile); };
  share(tiles, threads, [&](int64_t t) {
    k.gather(x + t * tile * w.in_features, w.in_features, here(t), w.in_features, tile, all + t * in_step);
  });
  const bool apart = size % w.rows == 0;
  const int64_t each = heads_at_once(heads, size, w.rows, tiles * tile, threads);
  bool failed = false;
  share((heads + each - 1) / each, threads, [&](int64_t i) {
    const int64_t first = i * each, count = heads - first < each ? heads - first : each, features = count * size;
    const int64_t step = (apart ? 3 * features : groups(w) * w.rows) * tile;
    float* qkv = outputs.take(tiles * step);
    float* scores = gates.take((mask ? 2 : 1) * tiles * tile * tile);
    if (!qkv || !scores) {
      failed = true;
      return;
    }
    for (int64_t t = 0; t < tiles; t++) {
      if (!apart) k.product(w, all + t * in_step, qkv + t * step, tile, hf_sparse::all(w), kNone);
      for (int64_t which = 0; apart && which < 3; which++) {
        const int64_t row = which * inner + first * size;
        k.product(w, all + t * in_step, qkv + t * step + which * features * tile, tile,
                  part(w, row / w.rows, (row + features) / w.rows), kNone);
      }
    }
    const Attention a{qkv, step, length, features, tile, int32_t(size), scale};
    float* shown = mask ? scores + tiles * tile * tile : nullptr;
    for (int64_t t = 0; t < tiles; t++) {
      if (mask) k.gather(mask + t * tile * length, length, here(t), length, tile, shown);
      for (int64_t head = 0; head < count; head++)
        k.attend(a, head, t, shown, scores, mixed + t * mixed_step + (first + head) * size * tile);
    }
  });
  if (failed) return kNoMemory;
  if (after.output) {
    // Where there are fewer tiles than threads, each tile's outputs are cut as well.
    const int64_t cuts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles;
    share(tiles * cuts, threads, [&](int64_t i) {
      const int64_t t = i / cuts, count = groups(*after.output);
      const int64_t first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
      k.product(*after.output, mixed + t * mixed_step, out + t * out_step + first * after.output->rows * tile, tile,
                part(*after.output, first, last), kNone);
    });
  }
  share(tiles, threads, [&](int64_t t) {
    float* from = after.output ? out + t * out_step : mixed + t * mixed_step;
    if (after.norm) k.normalise(from, all + t * in_step, width, tile, *after.norm);
    k.scatter(from, tile, width, here(t), y + t * tile * width, width);
  });
  return kOk;
}

}  // namespace
}  // namespace hf_sparse

using namespace hf_sparse;

// The name of the instruction set at this place, best first; null where this processor lacks it, "" past the last.
EXPORT const char* hf_sparse_isa(int place) {
  if (place < 0 || place >= kCount) return "";
  return runs_here(kAll[place]) ? kAll[place]->name : nullptr;
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
  if (isa < 0 || isa >= kCount || !runs_here(kAll[isa]) || tokens < 0) return kBadArgument;
  if (!sound(*w)) return kBadPointers;
  if (tokens == 0 || w->out_features == 0) return kOk;
  return linear(*kAll[isa], *w, x, y, tokens, Activation(activation), threads);
}

// y = (activation(x first^T + bias) [* (x second^T + bias)]) down^T + bias; second may be null. With a norm, which needs
// at least as many tokens as lanes for each thread: y = norm(x + that).
EXPORT int hf_sparse_ffn(int isa, const Weight* first, const Weight* second, const Weight* down, const Norm* norm,
                         const float* x, float* y, int64_t tokens, int32_t activation, int32_t threads) {
  if (isa < 0 || isa >= kCount || !runs_here(kAll[isa]) || tokens < 0) return kBadArgument;
  if (!sound(*first) || (second && !sound(*second)) || !sound(*down)) return kBadPointers;
  if (down->in_features != first->out_features) return kBadArgument;
  if (second && (second->out_features != first->out_features || second->in_features != first->in_features))
    return kBadArgument;
  if (norm && down->out_features != first->in_features) return kBadArgument;
  if (tokens == 0 || down->out_features == 0) return kOk;
  const Kernels& k = *kAll[isa];
  const Activation act = Activation(activation);
  const int64_t inner = first->in_features, hidden = first->out_features;
  // With fewer tokens than a tile and several threads, or one token, each product is shared out by outputs instead.
  if (tokens < k.lanes || (threads > 1 && tokens < int64_t(k.lanes) * threads)) {
    if (norm) return kBadArgument;
    float* h = hiddens.take(2 * up(tokens * hidden, k.lanes));
    if (!h) return kNoMemory;
    float* other = h + up(tokens * hidden, k.lanes);
    int result = hidden ? linear(k, *first, x, h, tokens, act, threads) : kOk;
    if (second && hidden && result == kOk) {
      result = linear(k, *second, x, other, tokens, kNone, threads);
      if (result == kOk) k.multiply(h, other, up(tokens * hidden, k.lanes));
    }
    return result == kOk ? linear(k, *down, h, y, tokens, kNone, threads) : result;
  }
  const int lesser = second ? k.widest(second->rows) : k.widest(first->rows);
  const int widest = smaller(lesser, smaller(k.widest(first->rows), k.widest(down->rows)));
  const int tile = tile_width(k, widest, tokens, threads);
  bool failed = false;
  share((tokens + tile - 1) / tile, threads, [&](int64_t i) {
    const int64_t start = i * tile;
    const int here = int(tokens - start < tile ? tokens - start : tile);
    const int64_t inputs_room = padded_inputs(second && second->chunk > first->chunk ? *second : *first);
    // The hidden features of as many chunks at a time as fit the second cache: none of them is kept.
    const int64_t panel = down->chunk * kPanel, room = (panel + 256) * tile;
    float* in = inputs.take(inputs_room * tile);
    float* h = hiddens.take(room);
    float* other = second ? gates.take(room) : nullptr;
    float* out = outputs.take(groups(*down) * down->rows * tile);
    if (!in || !h || !out || (second && !other)) {
      failed = true;
      return;
    }
    k.gather(x + start * inner, inner, here, inner, tile, in);
    if (hidden == 0) k.product(*down, h, out, tile, all(*down), kNone);
    for (int64_t from = 0; from < hidden; from += panel) {
      const int64_t end = from + panel < hidden ? from + panel : hidden;
      k.product(*first, in, h, tile, part(*first, from / first->rows, up(end, first->rows) / first->rows), act);
      if (second) {
        k.product(*second, in, other, tile, part(*second, from / second->rows, up(end, second->rows) / second->rows), kNone);
        k.multiply(h, other, (end - from) * tile);
      }
      const Part columns{0, groups(*down), from / down->chunk, (end + down->chunk - 1) / down->chunk};
      k.product(*down, h, out, tile, columns, kNone);
    }
    if (norm) k.normalise(out, in, down->out_features, tile, *norm);
    k.scatter(out, tile, down->out_features, here, y + start * down->out_features, down->out_features);
  });
  return failed ? kNoMemory : kOk;
}

// Self-attention: w has the queries, keys and values of all heads above each other; y is batch x length x a third of its
// outputs. `mask` (or null) is length x length, added to the scores; `mask_step` floats from one sequence to the next. With
// an output weight (or null), y is the product with it, and with a norm (or null) y = norm(x + that).
EXPORT int hf_sparse_attention(int isa, const Weight* w, const Weight* output, const Norm* norm, const float* x, float* y,
                               const float* mask, int64_t mask_step, int64_t batch, int64_t length, int32_t heads,
                               float scale, int32_t threads) {
  if (isa < 0 || isa >= kCount || !runs_here(kAll[isa]) || batch < 0 || length < 0 || heads < 1) return kBadArgument;
  if (w->rows < 1 || w->out_features % (3 * int64_t(heads)) || mask_step < 0) return kBadArgument;
  if (!sound(*w) || (output && !sound(*output))) return kBadPointers;
  if (output && output->in_features != w->out_features / 3) return kBadArgument;
  if (norm && (!output || output->out_features != w->in_features)) return kBadArgument;
  if (output && w->out_features == 0) return kBadArgument;  // nothing would be written
  const int64_t width = output ? output->out_features : w->out_features / 3;
  if (batch == 0 || length == 0 || w->out_features == 0 || width == 0) return kOk;
  const int64_t in = length * w->in_features, out = length * width;
  const int within = batch >= threads ? 1 : threads;  // enough sequences: one each; else all threads share each of them
  int result = kOk;
  share(batch, within == 1 ? threads : 1, [&](int64_t b) {
    const int one = attention(*kAll[isa], *w, {output, norm}, x + b * in, y + b * out, mask ? mask + b * mask_step : nullptr,
                              length, heads, scale, within);
    if (one != kOk) result = one;
  });
  return result;
}

// y = x weight^T + bias, all of them dense and by rows, for a few tokens.
EXPORT int hf_sparse_dense(int isa, const float* weight, const float* bias, const float* x, float* y, int64_t tokens,
                           int64_t in, int64_t out, int32_t threads) {
  if (isa < 0 || isa >= kCount || !runs_here(kAll[isa]) || tokens < 0 || in < 0 || out < 0) return kBadArgument;
  const int64_t parts = threads > 1 ? 4 * int64_t(threads) : 1;  // so that none waits long for the last
  share(parts, threads, [&](int64_t i) {
    kAll[isa]->dense(weight, bias, x, y, tokens, in, out, out * i / parts, out * (i + 1) / parts);
  });
  return kOk;
}
