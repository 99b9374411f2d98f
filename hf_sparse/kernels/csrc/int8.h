// What int8_dispatch.cpp and the int8 kernels of each instruction set share.
#pragma once
#include <stdint.h>

namespace hf_sparse {

// A weight as int8_layout.py lays it out; shared with library.py, field by field. Columns come in fours, called quads.
struct Int8Weight {
  const int8_t* values;     // quads x rows x 4
  const uint16_t* columns;  // quads x 4
  const int32_t* pointers;  // groups + 1, in quads
  const float* scales;      // out_features: what one step of a value is worth
  const int32_t* offsets;   // out_features: -128 times the sum of the values, for kernels that store inputs plus 128
  const float* bias;        // out_features, or null
  int64_t quads;
  int32_t rows;  // 1, 2 or 4
  int32_t out_features;
  int32_t in_features;  // at most 65,536: the sums of more bytes could overflow int32
};

inline int64_t groups(const Int8Weight& w) { return (int64_t(w.out_features) + w.rows - 1) / w.rows; }

// Tokens in a tile at most.
constexpr int kInt8Tile = 64;

struct Kernels;

// The int8 kernels of one instruction set. A tile of outputs is feature-major, as in kernels.h: `tile` floats for feature 0,
// then for feature 1, ... A tile of inputs is bytes in an order that these functions alone know: the steps of each feature
// of its tokens, where a step is the largest feature of the token / 127; NaN where a feature is infinite or NaN.
// All of them give the same bits: inputs are rounded alike, sums are exact, and are scaled in the same order.
struct Int8Kernels {
  // For all that is not a matmul.
  const Kernels* fp32;
  // Width of a tile that holds so many tokens, at most kInt8Tile.
  int (*width)(int tokens);
  // Width of all tiles of a sequence, in an attention.
  int (*attention_width)(int64_t length);
  // Bytes that a tile of inputs takes.
  int64_t (*input_bytes)(int64_t features, int tile);
  bool (*all_below)(const uint16_t* columns, int64_t count, int32_t limit);
  // Round tokens, `stride` apart, into a tile of bytes.
  void (*quantize_rows)(const float* x, int64_t stride, int tokens, int64_t features, int tile, uint8_t* out,
                        float* steps);
  // The same from a tile of floats.
  void (*quantize_tile)(const float* in, int64_t features, int tile, uint8_t* out, float* steps);
  // Groups first to last of w in + bias, from out on.
  void (*matmul)(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first,
                 int64_t last);
  // Write a tile of floats to tokens `stride` apart.
  void (*store_rows)(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride);
};

#ifdef HF_SPARSE_X86
extern const Int8Kernels kInt8Vnni;
extern const Int8Kernels kInt8Avx2;
#endif
#ifdef HF_SPARSE_ARM64
extern const Int8Kernels kInt8Neon;
#endif

}  // namespace hf_sparse
