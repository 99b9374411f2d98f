// The C interface of the int8 products: checks the weight, cuts the work into tiles, shares it among threads. They are
// for AVX-512 with VNNI alone; activations and the gate are those of the fp32 kernels.
#include "int8.h"
#include "kernels.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace hf_sparse;

EXPORT const char* hf_sparse_isa(int place);

namespace {

// Whether this processor has what the int8 products need.
bool int8_runs_here() {
#ifdef HF_SPARSE_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

// Whether the int8 products belong to this instruction set, and run on this processor.
EXPORT int hf_sparse_int8_runs(int isa) {
#ifdef HF_SPARSE_X86
  const char* name = hf_sparse_isa(isa);
  return name && (name == kAvx512.name || name == kAvx512Vbmi.name) && int8_runs_here();
#else
  return isa < 0;
#endif
}

#ifdef HF_SPARSE_X86

namespace hf_sparse {
namespace {

enum Result : int { kOk, kBadWeight, kNoMemory, kBadArgument };

thread_local Scratch bytes, outputs, gates, hiddens;

// Nothing that a weight holds may lead outside: neither pointers that run backwards or past the quads, nor columns past
// the inputs.
bool sound(const Int8Weight& w) {
  if (w.rows != 1 && w.rows != 2 && w.rows != 4) return false;
  if (w.out_features < 0 || w.in_features < 0 || w.in_features > 65536 || w.quads < 0) return false;
  const int64_t count = groups(w);
  int32_t backwards = w.pointers[0] < 0;
  for (int64_t g = 0; g < count; g++) backwards |= w.pointers[g + 1] < w.pointers[g];
  return !backwards && w.pointers[count] <= w.quads && int8::below(w.columns, 4 * w.quads, w.in_features);
}

struct Tile {
  int width, tokens;
  alignas(64) float steps[kInt8Tile];
};

int64_t tiles_of(int64_t tokens) { return (tokens + kInt8Tile - 1) / kInt8Tile; }

Tile tile_at(int64_t index, int64_t tokens) {
  const int64_t left = tokens - index * kInt8Tile;
  return {left <= kInt8Few ? kInt8Few : kInt8Tile, int(left < kInt8Tile ? left : kInt8Tile), {}};
}

uint8_t* take_bytes(int64_t count) { return reinterpret_cast<uint8_t*>(bytes.take(count / 4)); }

// A tile of inputs as bytes, or null without memory.
const uint8_t* read(Tile& tile, const float* x, int64_t features) {
  uint8_t* out = take_bytes(features * tile.width);
  if (out) int8::read(x, features, tile.tokens, features, tile.width, out, tile.steps);
  return out;
}

// Outputs computed at a time, so that they are still in the first cache for what is done with them.
constexpr int64_t kOutputs = 64;

// Call use(first, last) for groups that are as many outputs.
template <typename Use>
void each(const Int8Weight& w, int64_t first, int64_t last, const Use& use) {
  const int64_t step = kOutputs / w.rows;
  for (int64_t g = first; g < last; g += step) use(g, g + step < last ? g + step : last);
}

int64_t rows_of(const Int8Weight& w, int64_t first, int64_t last) {
  return (last * w.rows < w.out_features ? last * w.rows : w.out_features) - first * w.rows;
}

bool write(const Int8Weight& w, const Tile& tile, const uint8_t* in, int64_t first, int64_t last, Activation act,
           float* y) {
  float* out = outputs.take(kOutputs * tile.width);
  if (!out) return false;
  each(w, first, last, [&](int64_t g, int64_t end) {
    const int64_t rows = rows_of(w, g, end);
    int8::product(w, in, tile.width, tile.steps, out, g, end);
    if (act != kNone) kAvx512.activate(out, rows * tile.width, act);
    int8::write(out, tile.width, rows, tile.tokens, y + g * w.rows, w.out_features);
  });
  return true;
}

int linear(const Int8Weight& w, const float* x, float* y, int64_t tokens, Activation act, int threads) {
  const int64_t tiles = tiles_of(tokens), count = groups(w);
  // Where there are fewer tiles than threads, each tile's outputs are cut as well.
  const int64_t cuts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles;
  bool failed = false;
  share(tiles * cuts, threads, [&](int64_t i) {
    const int64_t index = i / cuts, start = index * kInt8Tile;
    const int64_t first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
    Tile tile = tile_at(index, tokens);
    const uint8_t* in = read(tile, x + start * w.in_features, w.in_features);
    if (!in || !write(w, tile, in, first, last, act, y + start * w.out_features)) failed = true;
  });
  return failed ? kNoMemory : kOk;
}

// The hidden features of a tile, activated and gated; null without memory.
const float* hidden_of(const Int8Weight& first, const Int8Weight* second, const Tile& tile, const uint8_t* in,
                       Activation act) {
  float* h = hiddens.take(groups(first) * first.rows * tile.width);
  float* other = second ? gates.take(kOutputs * tile.width) : nullptr;
  if (!h || (second && !other)) return nullptr;
  each(first, 0, groups(first), [&](int64_t g, int64_t end) {
    float* to = h + g * first.rows * tile.width;
    int8::product(first, in, tile.width, tile.steps, to, g, end);
    kAvx512.activate(to, rows_of(first, g, end) * tile.width, act);
  });
  if (second)
    each(*second, 0, groups(*second), [&](int64_t g, int64_t end) {
      int8::product(*second, in, tile.width, tile.steps, other, g, end);
      kAvx512.multiply(h + g * second->rows * tile.width, other, rows_of(*second, g, end) * tile.width);
    });
  return h;
}

// Outputs of a tile, to which its inputs are added, and the layer norm of the sums.
bool write_normed(const Int8Weight& w, const Norm& norm, const Tile& tile, const uint8_t* in, const float* x, float* y) {
  const int64_t features = w.out_features;
  float* out = outputs.take(groups(w) * w.rows * tile.width);
  float* residual = gates.take(features * tile.width);
  if (!out || !residual) return false;
  int8::product(w, in, tile.width, tile.steps, out, 0, groups(w));
  kAvx512.gather(x, features, tile.tokens, features, tile.width, residual);
  kAvx512.normalise(out, residual, features, tile.width, norm);
  int8::write(out, tile.width, features, tile.tokens, y, features);
  return true;
}

int ffn(const Int8Weight& first, const Int8Weight* second, const Int8Weight& down, const Norm* norm, const float* x,
        float* y, int64_t tokens, Activation act, int threads) {
  const int64_t inner = first.in_features, hidden = first.out_features;
  // With fewer tiles than threads, each product is shared out by outputs instead.
  if (tiles_of(tokens) < threads) {
    if (norm) return kBadArgument;
    const int64_t room = (tokens * hidden + 15) / 16 * 16;
    float* h = hiddens.take(2 * room);
    if (!h) return kNoMemory;
    int result = hidden ? linear(first, x, h, tokens, act, threads) : kOk;
    if (second && hidden && result == kOk) {
      result = linear(*second, x, h + room, tokens, kNone, threads);
      if (result == kOk) kAvx512.multiply(h, h + room, room);
    }
    return result == kOk ? linear(down, h, y, tokens, kNone, threads) : result;
  }
  bool failed = false;
  share(tiles_of(tokens), threads, [&](int64_t i) {
    const int64_t start = i * kInt8Tile;
    Tile tile = tile_at(i, tokens);
    const uint8_t* in = read(tile, x + start * inner, inner);
    const float* h = in ? hidden_of(first, second, tile, in, act) : nullptr;
    uint8_t* rounded = h ? take_bytes(hidden * tile.width) : nullptr;
    if (rounded) int8::quantise(h, hidden, tile.width, rounded, tile.steps);
    float* to = y + start * down.out_features;
    const bool done = rounded && (norm ? write_normed(down, *norm, tile, rounded, x + start * inner, to)
                                       : write(down, tile, rounded, 0, groups(down), kNone, to));
    if (!done) failed = true;
  });
  return failed ? kNoMemory : kOk;
}

// What comes after the heads of an attention: their product with the output weight, to which the inputs are added, and
// the layer norm of the sum. Or nothing, where the weight is null.
struct After {
  const Int8Weight* output;
  const Norm* norm;
};

// One sequence, as `attention` of dispatch.cpp; all its tiles have the same width, whatever is in the last.
int attention(const Int8Weight& w, const After& after, const float* x, float* y, const float* mask, int64_t length,
              int heads, float scale, int threads) {
  constexpr int64_t kTile = kInt8Tile, kQuarter = kTile / 4;  // floats of one feature, and those that its bytes take
  const Kernels& k = kAvx512;
  const int64_t in = w.in_features, inner = w.out_features / 3, size = inner / heads, tiles = tiles_of(length);
  const int64_t width = after.output ? after.output->out_features : inner;
  // From one tile to the next: of inputs in bytes, of what the heads make of them, of that in bytes, of outputs.
  const int64_t in_step = in * kQuarter, mixed_step = inner * kTile, rounded_step = after.output ? inner * kQuarter : 0;
  const int64_t out_step = after.output ? groups(*after.output) * after.output->rows * kTile : 0;
  float* const all = hiddens.take(tiles * (2 * kTile + in_step + mixed_step + rounded_step + out_step));
  if (!all) return kNoMemory;
  float *const steps = all, *const mixed_steps = steps + tiles * kTile, *const inputs = mixed_steps + tiles * kTile;
  float *const mixed = inputs + tiles * in_step, *const rounded = mixed + tiles * mixed_step;
  float* const out = rounded + tiles * rounded_step;
  const auto here = [&](int64_t t) { return int(length - t * kTile < kTile ? length - t * kTile : kTile); };
  const auto bytes_at = [](float* from) { return reinterpret_cast<uint8_t*>(from); };
  share(tiles, threads, [&](int64_t t) {
    int8::read(x + t * kTile * in, in, here(t), in, kTile, bytes_at(inputs + t * in_step), steps + t * kTile);
  });
  const bool apart = size % w.rows == 0;
  const int64_t each = heads_at_once(heads, size, w.rows, tiles * kTile, threads);
  bool failed = false;
  share((heads + each - 1) / each, threads, [&](int64_t i) {
    const int64_t first = i * each, count = heads - first < each ? heads - first : each, features = count * size;
    const int64_t step = (apart ? 3 * features : groups(w) * w.rows) * kTile;
    float* qkv = outputs.take(tiles * step);
    float* scores = gates.take((mask ? 2 : 1) * tiles * kTile * kTile);
    if (!qkv || !scores) {
      failed = true;
      return;
    }
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t which = 0; which < (apart ? 3 : 1); which++) {
        const int64_t row = which * inner + first * size;
        const int64_t begin = apart ? row / w.rows : 0, end = apart ? (row + features) / w.rows : groups(w);
        int8::product(w, bytes_at(inputs + t * in_step), kTile, steps + t * kTile,
                      qkv + t * step + which * features * kTile, begin, end);
      }
    const Attention a{qkv, step, length, features, int32_t(kTile), int32_t(size), scale};
    float* shown = mask ? scores + tiles * kTile * kTile : nullptr;
    for (int64_t t = 0; t < tiles; t++) {
      if (mask) k.gather(mask + t * kTile * length, length, here(t), length, kTile, shown);
      for (int64_t head = 0; head < count; head++)
        k.attend(a, head, t, shown, scores, mixed + t * mixed_step + (first + head) * size * kTile);
    }
  });
  if (failed) return kNoMemory;
  if (after.output) {
    share(tiles, threads, [&](int64_t t) {
      int8::quantise(mixed + t * mixed_step, inner, kTile, bytes_at(rounded + t * rounded_step), mixed_steps + t * kTile);
    });
    // Where there are fewer tiles than threads, each tile's outputs are cut as well.
    const int64_t cuts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles, count = groups(*after.output);
    share(tiles * cuts, threads, [&](int64_t i) {
      const int64_t t = i / cuts, first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
      int8::product(*after.output, bytes_at(rounded + t * rounded_step), kTile, mixed_steps + t * kTile,
                    out + t * out_step + first * after.output->rows * kTile, first, last);
    });
  }
  share(tiles, threads, [&](int64_t t) {
    float* from = after.output ? out + t * out_step : mixed + t * mixed_step;
    float* residual = after.norm ? gates.take(in * kTile) : nullptr;
    if (after.norm && !residual) {
      failed = true;
      return;
    }
    if (after.norm) {
      k.gather(x + t * kTile * in, in, here(t), in, kTile, residual);
      k.normalise(from, residual, width, kTile, *after.norm);
    }
    int8::write(from, kTile, width, here(t), y + t * kTile * width, width);
  });
  return failed ? kNoMemory : kOk;
}

}  // namespace
}  // namespace hf_sparse

// y = activation(x w^T + bias), x rounded to int8 token by token.
EXPORT int hf_sparse_int8_linear(const Int8Weight* w, const float* x, float* y, int64_t tokens, int32_t activation,
                                 int32_t threads) {
  if (!int8_runs_here() || tokens < 0) return kBadArgument;
  if (!sound(*w)) return kBadWeight;
  if (tokens == 0 || w->out_features == 0) return kOk;
  return linear(*w, x, y, tokens, Activation(activation), threads);
}

// y = (activation(x first^T + bias) [* (x second^T + bias)]) down^T + bias, x and what is in brackets rounded to int8
// token by token; second may be null. With a norm, which needs a tile for each thread: y = norm(x + that).
EXPORT int hf_sparse_int8_ffn(const Int8Weight* first, const Int8Weight* second, const Int8Weight* down, const Norm* norm,
                              const float* x, float* y, int64_t tokens, int32_t activation, int32_t threads) {
  if (!int8_runs_here() || tokens < 0) return kBadArgument;
  if (!sound(*first) || (second && !sound(*second)) || !sound(*down)) return kBadWeight;
  if (down->in_features != first->out_features) return kBadArgument;
  if (second && (second->out_features != first->out_features || second->in_features != first->in_features))
    return kBadArgument;
  if (norm && down->out_features != first->in_features) return kBadArgument;
  if (tokens == 0 || down->out_features == 0) return kOk;
  return ffn(*first, second, *down, norm, x, y, tokens, Activation(activation), threads);
}

// Self-attention: as hf_sparse_attention, but x, and what the heads make of it where there is an output weight, are
// rounded to int8 token by token. Queries, keys and values are not.
EXPORT int hf_sparse_int8_attention(const Int8Weight* w, const Int8Weight* output, const Norm* norm, const float* x,
                                    float* y, const float* mask, int64_t mask_step, int64_t batch, int64_t length,
                                    int32_t heads, float scale, int32_t threads) {
  if (!int8_runs_here() || batch < 0 || length < 0 || heads < 1 || mask_step < 0) return kBadArgument;
  if (w->out_features < 1 || w->out_features % (3 * int64_t(heads))) return kBadArgument;
  if (!sound(*w) || (output && !sound(*output))) return kBadWeight;
  if (output && output->in_features != w->out_features / 3) return kBadArgument;
  if (norm && (!output || output->out_features != w->in_features)) return kBadArgument;
  const int64_t width = output ? output->out_features : w->out_features / 3;
  if (batch == 0 || length == 0 || width == 0) return kOk;
  const int64_t in = length * w->in_features, out = length * width;
  const int within = batch >= threads ? 1 : threads;  // enough sequences: one each; else all threads share each of them
  int result = kOk;
  share(batch, within == 1 ? threads : 1, [&](int64_t b) {
    const int one = attention(*w, {output, norm}, x + b * in, y + b * out, mask ? mask + b * mask_step : nullptr, length,
                              heads, scale, within);
    if (one != kOk) result = one;
  });
  return result;
}

#endif
