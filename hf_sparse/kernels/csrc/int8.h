// What int8_dispatch.cpp and int8.cpp share.
#pragma once
#include <stdint.h>

namespace hf_sparse {

// A weight as int8_layout.py lays it out; shared with library.py, field by field. Columns come in fours, called quads.
struct Int8Weight {
  const int8_t* values;     // quads x rows x 4
  const uint16_t* columns;  // quads x 4
  const int32_t* pointers;  // groups + 1, in quads
  const float* scales;      // out_features: what one step of a value is worth
  const int32_t* offsets;   // out_features: -128 times the sum of the values, since inputs are stored plus 128
  const float* bias;        // out_features, or null
  int64_t quads;
  int32_t rows;  // 1, 2 or 4
  int32_t out_features;
  int32_t in_features;  // at most 65,536: the sums of more bytes could overflow int32
};

inline int64_t groups(const Int8Weight& w) { return (int64_t(w.out_features) + w.rows - 1) / w.rows; }

// Tokens in a tile, and in a narrow one.
constexpr int kInt8Tile = 64;
constexpr int kInt8NarrowTile = 16;

// The matmuls for AVX-512 with VNNI. A tile is feature-major, as in kernels.h: `tile` floats for feature 0, then for
// feature 1, ...; or bytes, the order of whose tokens is known to these functions alone. Bytes count the steps of their
// token, plus 128. A step is the largest feature / 127; NaN where a feature is infinite or NaN.
namespace int8 {

bool all_below(const uint16_t* columns, int64_t count, int32_t limit);
// Round tokens, `stride` apart, into a tile of bytes.
void quantize_rows(const float* x, int64_t stride, int tokens, int64_t features, int tile, uint8_t* out, float* steps);
// The same from a tile of floats.
void quantize_tile(const float* in, int64_t features, int tile, uint8_t* out, float* steps);
// Groups first to last of w in + bias, from out on.
void matmul(const Int8Weight& w, const uint8_t* in, int tile, const float* steps, float* out, int64_t first,
             int64_t last);
// Write a tile of floats to tokens `stride` apart.
void store_rows(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride);

}  // namespace int8
}  // namespace hf_sparse
