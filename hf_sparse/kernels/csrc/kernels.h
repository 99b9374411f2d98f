// What dispatch.cpp and the kernels of each instruction set share. No C++ library, no torch: C types only.
#pragma once
#include <stdint.h>

namespace hf_sparse {

enum Activation : int32_t { kNone, kGelu, kGeluTanh, kRelu, kSilu };

// Maximum number of tokens in one tile: four vectors of the widest instruction set.
constexpr int kMaxTile = 64;

// A packed weight as fp32_layout.py lays it out; shared with library.py, field by field.
struct Weight {
  const float* values;      // blocks x rows
  const uint8_t* columns;   // blocks; within the chunk
  const int32_t* pointers;  // chunks x (groups + 1)
  const float* bias;        // out_features, or null
  int64_t blocks;
  int32_t rows;
  int32_t out_features;
  int32_t in_features;
  int32_t chunk;  // columns a chunk, at most 256
};

// A weight as bitmask.py lays it out. A row reads no further than in_features values after its pointer.
struct Bitmask {
  const void* values;       // bfloat16 or fp32, row after row; some more than the last pointer says (see is_valid)
  const uint64_t* bits;     // out_features x words of 64 columns, the first column lowest
  const int32_t* pointers;  // out_features + 1
  const float* bias;        // out_features, or null
  int64_t count;            // of values
  int32_t out_features;
  int32_t in_features;
  int32_t halves;  // whether the values are bfloat16
};

// Columns that share a scale.
constexpr int64_t kScaled = 128;

// A weight as bitmask_int8.py lays it out. A row reads no further than in_features, rounded up, values after its pointer.
struct BitmaskInt8 {
  const int8_t* values;     // row after row; some more than the last pointer says (see is_valid)
  const uint64_t* bits;     // out_features x words of 64 columns, as many as whole groups of kScaled columns have
  const int32_t* pointers;  // out_features + 1
  const float* scales;      // out_features x groups
  const float* bias;        // out_features, or null
  int64_t count;            // of values
  int32_t out_features;
  int32_t in_features;
};

// A weight as bitmask_int4.py lays it out: two values a byte, the first in the lower half, those of each word of bits from a
// byte of their own on. A row reads no further than in_features bytes, rounded up, after its pointer.
struct BitmaskInt4 {
  const uint8_t* values;    // row after row; some more than the last pointer says (see is_valid)
  const uint64_t* bits;     // as those of BitmaskInt8
  const int32_t* pointers;  // out_features + 1, in bytes
  const uint16_t* scales;   // out_features x words, bfloat16
  const float* bias;        // out_features, or null
  int64_t count;            // of bytes
  int32_t out_features;
  int32_t in_features;
};

inline int64_t groups(const Weight& w) { return (int64_t(w.out_features) + w.rows - 1) / w.rows; }
inline int64_t chunks(const Weight& w) { return (int64_t(w.in_features) + w.chunk - 1) / w.chunk; }
// Features that a tile of inputs has room for: a column is one byte, so that no column can point past this.
inline int64_t padded_inputs(const Weight& w) { return chunks(w) * w.chunk + 256; }

// What a matmul computes: groups first to last, from the columns of chunks from to to. A later range of chunks adds to what
// an earlier one left in the outputs.
struct Part {
  int64_t first, last, from, to;
};

inline Part part(const Weight& w, int64_t first, int64_t last) { return {first, last, 0, chunks(w) ? chunks(w) : 1}; }
inline Part all(const Weight& w) { return part(w, 0, groups(w)); }

// The layer norm after a sub-block of BERT: (x - mean) / root(variance + eps) weight + bias, over `out_features`.
struct Norm {
  const float* weight;
  const float* bias;  // or null
  float eps;
};

// A sequence whose queries, keys and values lie in tiles, head after head: `inner` features each.
struct Attention {
  const float* tiles;
  int64_t step;  // floats from one tile to the next
  int64_t length;
  int64_t inner;
  int32_t tile;
  int32_t size;  // features of a head
  float scale;
};

// The kernels of one instruction set. A tile is feature-major: `tile` floats for feature 0, then for feature 1, ...
struct Kernels {
  const char* name;
  int lanes;
  // Widest tile, in tokens, for blocks of this height.
  int (*widest)(int rows);
  // Tile width, a multiple of the lanes, that holds `tokens` of them.
  void (*gather)(const float* x, int64_t stride, int tokens, int64_t features, int tile, float* out);
  void (*scatter)(const float* in, int tile, int64_t features, int tokens, float* y, int64_t stride);
  // out = activation(w in + bias): `in` and `out` are the features and the groups of the part alone.
  void (*matmul)(const Weight& w, const float* in, float* out, int tile, const Part& part, Activation act);
  void (*multiply)(float* a, const float* b, int64_t count);
  // One token, outputs in the lanes. `in` has padded_inputs features.
  void (*gemv)(const Weight& w, const float* in, float* out, int64_t first, int64_t last, Activation act);
  // In place; count is a multiple of the lanes.
  void (*activate)(float* at, int64_t count, Activation act);
  // out = norm(out + residual), in place.
  void (*normalize)(float* out, const float* residual, int64_t features, int tile, const Norm& norm);
  // The attention of one head and one tile of queries. `mask` (or null) is added to the scores: a tile, keys for features.
  // `scores` has room for as many tokens as all tiles, times the tile.
  void (*attend)(const Attention& a, int64_t head, int64_t queries, const float* mask, float* scores, float* out);
  // Outputs first to last of y = x weight^T + bias, all matrices by rows.
  void (*dense_gemv)(const float* weight, const float* bias, const float* x, float* y, int64_t tokens, int64_t in,
                     int64_t out, int64_t first, int64_t last);
  // Inputs as `bitmask` reads them: tokens x in_features, each rounded up to whole words of bits.
  void (*bitmask_inputs)(const float* x, int64_t tokens, int64_t in, bool halves, float* out);
  // Outputs first to last of y = x w^T + bias. `at` has room for out_features.
  void (*bitmask)(const Bitmask& w, const float* in, float* y, int64_t tokens, int64_t first, int64_t last, int32_t* at);
  // The same of int8 and int4: inputs rounded to int8 in `room`, of 5 / 16 floats for each feature rounded up to whole
  // groups.
  void (*rounded_inputs)(const float* x, int64_t tokens, int64_t in, float* room);
  void (*bitmask_int8)(const BitmaskInt8& w, float* room, float* y, int64_t tokens, int64_t first, int64_t last);
  void (*bitmask_int4)(const BitmaskInt4& w, float* room, float* y, int64_t tokens, int64_t first, int64_t last);
  // y = x / sqrt(mean(x^2) + eps) * (weight + offset) of each row.
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t rows, int64_t features, float eps, float offset);
};

extern const Kernels kPortable;
#ifdef HF_SPARSE_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vbmi;
#endif

}  // namespace hf_sparse
