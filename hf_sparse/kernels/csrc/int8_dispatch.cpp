// The C interface of the int8 operators: chooses the int8 kernels that belong to an instruction set, and says what is
// particular about int8 matmuls. Activations, the gate, attention and layer norm are those of the fp32 kernels.
#include "driver.h"
#include "int8.h"

#if defined(HF_SPARSE_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace hf_sparse {
namespace {

#ifdef HF_SPARSE_X86
bool has_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef HF_SPARSE_ARM64
bool has_dot_product() {
#if defined(__ARM_FEATURE_DOTPROD) || defined(__APPLE__)
  return true;  // asked for by the compiler's flags; all of Apple's processors with macOS
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

// The int8 kernels for what the fp32 kernels of this index need, and run on this processor; null where there are none.
const Int8Kernels* int8_kernels(int isa) {
  const Kernels* fp32 = kernels_here(isa);
#ifdef HF_SPARSE_X86
  if ((fp32 == &kAvx512 || fp32 == &kAvx512Vbmi) && has_vnni()) return &kInt8Vnni;
  // AVX-512 without VNNI too: what AVX2 needs is there, and its pair of kernels is the one that is tested.
  if (fp32 && fp32 != &kPortable) return &kInt8Avx2;
#elif defined(HF_SPARSE_ARM64)
  if (fp32 == &kPortable && has_dot_product()) return &kInt8Neon;
#endif
  return nullptr;
}

// Nothing that a weight holds may lead outside: neither pointers that run backwards or past the quads, nor columns past
// the inputs.
bool is_valid(const Int8Kernels& kernels, const Int8Weight& w) {
  if (w.rows != 1 && w.rows != 2 && w.rows != 4) return false;
  if (w.out_features < 0 || w.in_features < 0 || w.in_features > 65536 || w.quads < 0) return false;
  const int64_t count = groups(w);
  int32_t backwards = w.pointers[0] < 0;
  for (int64_t g = 0; g < count; g++) backwards |= w.pointers[g + 1] < w.pointers[g];
  return !backwards && w.pointers[count] <= w.quads && kernels.all_below(w.columns, 4 * w.quads, w.in_features);
}

// Outputs computed at a time, so that they are still in the first cache for what is done with them.
constexpr int64_t kOutputs = 64;

// Call use(first, last) for groups that are as many outputs.
template <typename Use>
void by_groups(const Int8Weight& w, int64_t first, int64_t last, const Use& use) {
  const int64_t step = kOutputs / w.rows;
  for (int64_t g = first; g < last; g += step) use(g, min(g + step, last));
}

int64_t rows_of(const Int8Weight& w, int64_t first, int64_t last) {
  return min(last * w.rows, w.out_features) - first * w.rows;
}

// Matmuls of `Int8Weight`; see driver.h. A tile of inputs is the steps of its tokens, then their bytes.
struct Int8 {
  using Weight = Int8Weight;
  const Int8Kernels& int8;
  const Kernels& kernels = *int8.fp32;

  bool is_valid(const Weight& w) const { return hf_sparse::is_valid(int8, w); }

  int tile(const Weight&, int64_t, int) const { return kInt8Tile; }

  // The last tile of a linear layer or a feed-forward part may be a narrow one.
  int width(int tokens) const { return int8.width(tokens); }

  static uint8_t* bytes(float* in, int tile) { return reinterpret_cast<uint8_t*>(in + tile); }
  static const uint8_t* bytes(const float* in, int tile) { return reinterpret_cast<const uint8_t*>(in + tile); }
  int64_t tile_floats(int64_t features, int tile) const { return tile + ceil_div(int8.input_bytes(features, tile), 4); }

  // A tile of inputs, or null without memory.
  float* load_tile(const float* x, int tokens, const Weight& w, int tile) const {
    float* in = inputs.take(input_floats(w, tile));
    if (in) load(x, w.in_features, tokens, w, tile, in);
    return in;
  }

  bool linear_tile(const Weight& w, const float* x, float* y, int tokens, int, int64_t first, int64_t last,
                   Activation act) const {
    const float* in = load_tile(x, tokens, w, width(tokens));
    return in && write_outputs(w, in, y, tokens, width(tokens), first, last, act);
  }

  bool write_outputs(const Weight& w, const float* in, float* y, int tokens, int tile, int64_t first, int64_t last,
                     Activation act) const {
    float* out = outputs.take(kOutputs * tile);
    if (!out) return false;
    by_groups(w, first, last, [&](int64_t g, int64_t end) {
      const int64_t rows = rows_of(w, g, end);
      matmul(w, in, out, tile, g, end);
      if (act != kNone) kernels.activate(out, rows * tile, act);
      store(out, tile, rows, tokens, y + g * w.rows, w.out_features);
    });
    return true;
  }

  // With fewer tiles than threads.
  bool by_outputs(int64_t tokens, int threads) const { return ceil_div(tokens, kInt8Tile) < threads; }

  int ffn_tile_width(const Weight&, const Weight*, const Weight&, int64_t, int) const { return kInt8Tile; }

  bool ffn_tile(const Weight& first, const Weight* second, const Weight& down, const Norm* norm, const float* x, float* y,
                int tokens, int, Activation act) const {
    const int tile = width(tokens);
    const float* in = load_tile(x, tokens, first, tile);
    const float* h = in ? hidden_of(first, second, in, tile, act) : nullptr;
    float* rounded = h ? inputs.take(input_floats(down, tile)) : nullptr;  // the inputs have been read
    if (!rounded) return false;
    round(h, down.in_features, tile, rounded);
    return norm ? write_normalized(down, *norm, rounded, x, y, tokens, tile)
                : write_outputs(down, rounded, y, tokens, tile, 0, groups(down), kNone);
  }

  // The hidden features of a tile, activated and gated; null without memory.
  const float* hidden_of(const Weight& first, const Weight* second, const float* in, int tile, Activation act) const {
    float* h = hiddens.take(groups(first) * first.rows * tile);
    float* gated = second ? gates.take(kOutputs * tile) : nullptr;
    if (!h || (second && !gated)) return nullptr;
    by_groups(first, 0, groups(first), [&](int64_t g, int64_t end) {
      float* to = h + g * first.rows * tile;
      matmul(first, in, to, tile, g, end);
      kernels.activate(to, rows_of(first, g, end) * tile, act);
    });
    if (second)
      by_groups(*second, 0, groups(*second), [&](int64_t g, int64_t end) {
        matmul(*second, in, gated, tile, g, end);
        kernels.multiply(h + g * second->rows * tile, gated, rows_of(*second, g, end) * tile);
      });
    return h;
  }

  // The outputs of a tile, to which its inputs are added, and the layer norm of the sums.
  bool write_normalized(const Weight& w, const Norm& norm, const float* in, const float* x, float* y, int tokens,
                        int tile) const {
    float* out = outputs.take(groups(w) * w.rows * tile);
    const float* added = residual(x, tokens, w.out_features, tile, in);
    if (!out || !added) return false;
    matmul(w, in, out, tile, 0, groups(w));
    kernels.normalize(out, added, w.out_features, tile, norm);
    store(out, tile, w.out_features, tokens, y, w.out_features);
    return true;
  }

  // All tiles of an attention have the same width, whatever is in the last.
  int attention_tile(const Weight&, const Weight*, int64_t length, int) const { return int8.attention_width(length); }

  int64_t input_floats(const Weight& w, int tile) const { return tile_floats(w.in_features, tile); }

  void load(const float* x, int64_t stride, int tokens, const Weight& w, int tile, float* in) const {
    int8.quantize_rows(x, stride, tokens, w.in_features, tile, bytes(in, tile), in);
  }

  int64_t head_floats(const Weight*, int64_t inner, int tile) const { return inner * tile; }
  int64_t rounded_floats(const Weight& w, int tile) const { return input_floats(w, tile); }

  void round(const float* from, int64_t features, int tile, float* in) const {
    int8.quantize_tile(from, features, tile, bytes(in, tile), in);
  }

  void matmul(const Weight& w, const float* in, float* out, int tile, int64_t first, int64_t last) const {
    int8.matmul(w, bytes(in, tile), tile, in, out, first, last);
  }

  const float* residual(const float* x, int tokens, int64_t features, int tile, const float*) const {
    float* out = gates.take(features * tile);
    if (out) kernels.gather(x, features, tokens, features, tile, out);
    return out;
  }

  void store(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride) const {
    int8.store_rows(in, tile, features, tokens, y, stride);
  }
};

}  // namespace
}  // namespace hf_sparse

using namespace hf_sparse;

// Whether there are int8 operators for this instruction set on this processor.
EXPORT int hf_sparse_has_int8(int isa) { return int8_kernels(isa) != nullptr; }

// y = activation(x w^T + bias), x rounded to int8 token by token.
EXPORT int hf_sparse_int8_linear(int isa, const Int8Weight* w, const float* x, float* y, int64_t tokens, int32_t activation,
                                 int32_t threads) {
  const Int8Kernels* int8 = int8_kernels(isa);
  if (!int8) return kBadArgument;
  return checked_linear(Int8{*int8}, *w, x, y, tokens, activation, threads);
}

// y = (activation(x first^T + bias) [* (x second^T + bias)]) down^T + bias, x and what is in brackets rounded to int8
// token by token; second may be null. With a norm, which needs a tile for each thread: y = norm(x + that).
EXPORT int hf_sparse_int8_ffn(int isa, const Int8Weight* first, const Int8Weight* second, const Int8Weight* down, const Norm* norm,
                              const float* x, float* y, int64_t tokens, int32_t activation, int32_t threads) {
  const Int8Kernels* int8 = int8_kernels(isa);
  if (!int8) return kBadArgument;
  return checked_ffn(Int8{*int8}, *first, second, *down, norm, x, y, tokens, activation, threads);
}

// Self-attention: as hf_sparse_attention, but x, and the outputs of the heads where there is an output weight, are rounded
// to int8 token by token. Queries, keys and values are not.
EXPORT int hf_sparse_int8_attention(int isa, const Int8Weight* w, const Int8Weight* output, const Norm* norm, const float* x,
                                    float* y, const float* mask, int64_t mask_step, int64_t batch, int64_t length,
                                    int32_t heads, float scale, int32_t threads) {
  const Int8Kernels* int8 = int8_kernels(isa);
  if (!int8) return kBadArgument;
  return checked_attention(Int8{*int8}, *w, output, norm, x, y, mask, mask_step, batch, length, heads, scale, threads);
}
