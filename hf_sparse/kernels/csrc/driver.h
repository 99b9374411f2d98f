// What the fp32 and the int8 operators do alike: check arguments, cut the work into tiles of tokens, share it among
// threads. Part of dispatch.cpp and int8_dispatch.cpp.
//
// `Matmuls` is what differs (Fp32 and Int8):
//   Weight                                 a packed weight
//   is_valid(weight)                       whether nothing in a weight leads outside of it
//   kernels                                the fp32 kernels for all that is not a matmul
//   tile(weight, tokens, threads)          tokens of a tile of a linear layer
//   linear_tile(weight, x, y, tokens, tile, first, last, act)
//                                          groups first to last of one tile; false without memory
//   by_outputs(tokens, threads)            whether a feed-forward part shares each matmul by outputs, not tiles
//   ffn_tile_width(first, second, down, tokens, threads), ffn_tile(...)
//   attention_tile(weight, output, length, threads)
//   input_floats(weight, tile)             floats that a tile of inputs takes, in the form that a matmul reads
//   load(x, stride, tokens, weight, tile, in)   rows of tokens to such a tile
//   head_floats(output, inner, tile), rounded_floats(...), input_of(...)
//                                          the same from the outputs of the heads, a tile of floats
//   matmul(weight, in, out, tile, first, last)
//   residual(x, stride, tokens, features, tile, in)   the inputs as a tile of floats; null without memory
//   store(in, tile, features, tokens, y, stride)      a tile of floats to rows of tokens
#pragma once
#include "kernels.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hf_sparse {

// The kernels at this index, best first; null where this processor lacks the instruction set. Defined in dispatch.cpp.
const Kernels* kernels_here(int isa);

namespace {

enum Result : int { kOk, kBadWeight, kNoMemory, kBadArgument };

thread_local Scratch inputs, outputs, gates, hiddens;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Where there are fewer tiles than threads, the outputs of each tile are cut as well.
inline int64_t output_cuts(int64_t tiles, int threads) { return tiles >= threads ? 1 : ceil_div(threads, tiles); }

// Heads of an attention that one thread computes at a time: as many as have their queries, keys and values in the second
// cache (2^16 floats) and leave some for each thread; all of them where blocks of rows reach across heads.
inline int64_t heads_at_once(int64_t heads, int64_t size, int rows, int64_t tokens, int threads) {
  if (size % rows) return heads;
  const int64_t fit = (1 << 16) / (3 * size * tokens), fair = ceil_div(heads, threads);
  return fit < 1 ? 1 : min(fit, fair);
}

template <typename Matmuls>
int linear(const Matmuls& m, const typename Matmuls::Weight& w, const float* x, float* y, int64_t tokens, Activation act,
           int threads) {
  const int tile = m.tile(w, tokens, threads);
  const int64_t tiles = ceil_div(tokens, tile), cuts = output_cuts(tiles, threads), count = groups(w);
  SharedResult result;
  parallel_for(tiles * cuts, threads, [&](int64_t i) {
    const int64_t start = i / cuts * tile, first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
    const bool done = m.linear_tile(w, x + start * w.in_features, y + start * w.out_features,
                                    int(min(tokens - start, tile)), tile, first, last, act);
    if (!done) result.set(kNoMemory);
  });
  return result.get();
}

// Adds rows of inputs to rows of outputs, and computes their layer norm.
inline int normalize_rows(const Kernels& k, const float* x, float* y, int64_t tokens, int64_t features,
                          const Norm& norm, int threads) {
  SharedResult result;
  parallel_for(ceil_div(tokens, k.lanes), threads, [&](int64_t i) {
    const int64_t start = i * k.lanes;
    const int count = int(min(tokens - start, k.lanes));
    float *const residual = inputs.take(features * k.lanes), *const sum = outputs.take(features * k.lanes);
    if (!residual || !sum) return result.set(kNoMemory);
    k.gather(x + start * features, features, count, features, k.lanes, residual);
    k.gather(y + start * features, features, count, features, k.lanes, sum);
    k.normalize(sum, residual, features, k.lanes, norm);
    k.scatter(sum, k.lanes, features, count, y + start * features, features);
  });
  return result.get();
}

template <typename Matmuls>
int ffn(const Matmuls& m, const typename Matmuls::Weight& first, const typename Matmuls::Weight* second,
        const typename Matmuls::Weight& down, const Norm* norm, const float* x, float* y, int64_t tokens, Activation act,
        int threads) {
  const int64_t hidden = first.out_features;
  if (m.by_outputs(tokens, threads)) {
    const int64_t room = round_up(tokens * hidden, m.kernels.lanes);
    float* h = hiddens.take(2 * room);
    if (!h) return kNoMemory;
    int result = hidden ? linear(m, first, x, h, tokens, act, threads) : kOk;
    if (second && hidden && result == kOk) {
      result = linear(m, *second, x, h + room, tokens, kNone, threads);
      if (result == kOk) m.kernels.multiply(h, h + room, room);
    }
    if (result == kOk) result = linear(m, down, h, y, tokens, kNone, threads);
    if (!norm || result != kOk) return result;
    return normalize_rows(m.kernels, x, y, tokens, down.out_features, *norm, threads);
  }
  const int tile = m.ffn_tile_width(first, second, down, tokens, threads);
  SharedResult result;
  parallel_for(ceil_div(tokens, tile), threads, [&](int64_t i) {
    const int64_t start = i * tile;
    const bool done = m.ffn_tile(first, second, down, norm, x + start * first.in_features, y + start * down.out_features,
                                 int(min(tokens - start, tile)), tile, act);
    if (!done) result.set(kNoMemory);
  });
  return result.get();
}

// What follows the heads of an attention: the output layer, to which the inputs are added, and the layer norm of the sum.
// Or nothing, where the weight is null.
template <typename Weight>
struct After {
  const Weight* output;
  const Norm* norm;
};

// One sequence: queries, keys and values of some heads and their attention, heads after heads, then what follows.
template <typename Matmuls>
int attention(const Matmuls& m, const typename Matmuls::Weight& w, const After<typename Matmuls::Weight>& after,
              const float* x, float* y, const float* mask, int64_t length, int heads, float scale, int threads) {
  const Kernels& k = m.kernels;
  const int64_t inner = w.out_features / 3, size = inner / heads, features = w.in_features;
  const int64_t width = after.output ? after.output->out_features : inner;
  const int tile = m.attention_tile(w, after.output, length, threads);
  // Floats from one tile to the next: of inputs, of the outputs of heads, of those as the output layer reads them, of its
  // outputs.
  const int64_t tiles = ceil_div(length, tile), in_step = m.input_floats(w, tile);
  const int64_t head_step = m.head_floats(after.output, inner, tile);
  const int64_t rounded_step = after.output ? m.rounded_floats(*after.output, tile) : 0;
  const int64_t out_step = after.output ? groups(*after.output) * after.output->rows * tile : 0;
  float* const in = hiddens.take(tiles * (in_step + head_step + rounded_step + out_step));
  if (!in) return kNoMemory;
  float *const attended = in + tiles * in_step, *const rounded = attended + tiles * head_step;
  float* const out = rounded + tiles * rounded_step;
  const auto tokens_of = [&](int64_t t) { return int(min(length - t * tile, tile)); };
  parallel_for(tiles, threads, [&](int64_t t) {
    m.load(x + t * tile * features, features, tokens_of(t), w, tile, in + t * in_step);
  });
  const bool by_head = size % w.rows == 0;
  const int64_t each = heads_at_once(heads, size, w.rows, tiles * tile, threads);
  SharedResult result;
  parallel_for(ceil_div(heads, each), threads, [&](int64_t i) {
    const int64_t first = i * each, count = min(heads - first, each), rows = count * size;
    const int64_t step = (by_head ? 3 * rows : groups(w) * w.rows) * tile;
    float* qkv = outputs.take(tiles * step);
    float* scores = gates.take((mask ? 2 : 1) * tiles * tile * tile);
    if (!qkv || !scores) return result.set(kNoMemory);
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t which = 0; which < (by_head ? 3 : 1); which++) {
        const int64_t row = which * inner + first * size;
        m.matmul(w, in + t * in_step, qkv + t * step + which * rows * tile, tile, by_head ? row / w.rows : 0,
                 by_head ? (row + rows) / w.rows : groups(w));
      }
    const Attention a{qkv, step, length, rows, tile, int32_t(size), scale};
    float* tile_mask = mask ? scores + tiles * tile * tile : nullptr;
    for (int64_t t = 0; t < tiles; t++) {
      if (mask) k.gather(mask + t * tile * length, length, tokens_of(t), length, tile, tile_mask);
      for (int64_t head = 0; head < count; head++)
        k.attend(a, head, t, tile_mask, scores, attended + t * head_step + (first + head) * size * tile);
    }
  });
  if (result.get() != kOk) return result.get();
  if (after.output) {
    if (rounded_step)
      parallel_for(tiles, threads, [&](int64_t t) {
        m.round(attended + t * head_step, inner, tile, rounded + t * rounded_step);
      });
    const float* from = rounded_step ? rounded : attended;
    const int64_t from_step = rounded_step ? rounded_step : head_step;
    const int64_t cuts = output_cuts(tiles, threads), count = groups(*after.output);
    parallel_for(tiles * cuts, threads, [&](int64_t i) {
      const int64_t t = i / cuts, first = count * (i % cuts) / cuts, last = count * (i % cuts + 1) / cuts;
      m.matmul(*after.output, from + t * from_step, out + t * out_step + first * after.output->rows * tile, tile, first,
               last);
    });
  }
  parallel_for(tiles, threads, [&](int64_t t) {
    float* from = after.output ? out + t * out_step : attended + t * head_step;
    if (after.norm) {
      const float* residual = m.residual(x + t * tile * features, tokens_of(t), features, tile, in + t * in_step);
      if (!residual) return result.set(kNoMemory);
      k.normalize(from, residual, width, tile, *after.norm);
    }
    m.store(from, tile, width, tokens_of(t), y + t * tile * width, width);
  });
  return result.get();
}

// -- the C interface: checked arguments --------------------------------------------------------------------------------

template <typename Matmuls>
int checked_linear(const Matmuls& m, const typename Matmuls::Weight& w, const float* x, float* y, int64_t tokens,
                   int32_t activation, int32_t threads) {
  if (tokens < 0) return kBadArgument;
  if (!m.is_valid(w)) return kBadWeight;
  if (tokens == 0 || w.out_features == 0) return kOk;
  return linear(m, w, x, y, tokens, Activation(activation), threads);
}

template <typename Matmuls>
int checked_ffn(const Matmuls& m, const typename Matmuls::Weight& first, const typename Matmuls::Weight* second,
                const typename Matmuls::Weight& down, const Norm* norm, const float* x, float* y, int64_t tokens,
                int32_t activation, int32_t threads) {
  if (tokens < 0) return kBadArgument;
  if (!m.is_valid(first) || (second && !m.is_valid(*second)) || !m.is_valid(down)) return kBadWeight;
  if (down.in_features != first.out_features) return kBadArgument;
  if (second && (second->out_features != first.out_features || second->in_features != first.in_features))
    return kBadArgument;
  if (norm && down.out_features != first.in_features) return kBadArgument;
  if (tokens == 0 || down.out_features == 0) return kOk;
  return ffn(m, first, second, down, norm, x, y, tokens, Activation(activation), threads);
}

template <typename Matmuls>
int checked_attention(const Matmuls& m, const typename Matmuls::Weight& w, const typename Matmuls::Weight* output,
                      const Norm* norm, const float* x, float* y, const float* mask, int64_t mask_step, int64_t batch,
                      int64_t length, int32_t heads, float scale, int32_t threads) {
  if (batch < 0 || length < 0 || heads < 1 || mask_step < 0) return kBadArgument;
  if (!m.is_valid(w) || (output && !m.is_valid(*output))) return kBadWeight;
  if (w.out_features % (3 * int64_t(heads))) return kBadArgument;
  if (output && output->in_features != w.out_features / 3) return kBadArgument;
  if (norm && (!output || output->out_features != w.in_features)) return kBadArgument;
  if (output && w.out_features == 0) return kBadArgument;  // nothing would be written
  const int64_t width = output ? output->out_features : w.out_features / 3;
  if (batch == 0 || length == 0 || width == 0) return kOk;
  const int64_t in = length * w.in_features, out = length * width;
  const int within = batch >= threads ? 1 : threads;  // enough sequences: one each; else all threads share each of them
  SharedResult result;
  parallel_for(batch, within == 1 ? threads : 1, [&](int64_t b) {
    const int one = attention(m, w, {output, norm}, x + b * in, y + b * out, mask ? mask + b * mask_step : nullptr, length,
                              heads, scale, within);
    if (one != kOk) result.set(one);
  });
  return result.get();
}

}  // namespace
}  // namespace hf_sparse
