// Calls every operator of every instruction set on exactly allocated memory, with valid and with hostile weights.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../hf_sparse/kernels/csrc/kernels.h"

using hf_sparse::Bitmask;
using hf_sparse::BitmaskInt4;
using hf_sparse::BitmaskInt8;
using hf_sparse::Norm;
using hf_sparse::Weight;
extern "C" const char* hf_sparse_isa(int place);
extern "C" int hf_sparse_linear(int, const Weight*, const float*, float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_ffn(int, const Weight*, const Weight*, const Weight*, const Norm*, const float*, float*, int64_t,
                             int32_t, int32_t);

extern "C" int hf_sparse_attention(int, const Weight*, const Weight*, const Norm*, const float*, float*, const float*,
                                   int64_t, int64_t, int64_t, int32_t, float, int32_t);

extern "C" int hf_sparse_rms_norm(int, const float*, const float*, float*, int64_t, int64_t, float, float);
extern "C" int hf_sparse_dense(int, const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, int32_t);

extern "C" int hf_sparse_bitmask(int, const Bitmask*, const float*, float*, int64_t, int32_t);

extern "C" int hf_sparse_bitmask_int8(int, const BitmaskInt8*, const float*, float*, int64_t, int32_t);

extern "C" int hf_sparse_bitmask_int4(int, const BitmaskInt4*, const float*, float*, int64_t, int32_t);

static std::mt19937 random_bits(0);

struct Packed {
  std::vector<float> values, bias;
  std::vector<uint8_t> columns;
  std::vector<int32_t> pointers;
  Weight weight;

  // `hostile` columns are any byte, also past the chunk and past the inputs: wrong sums, but no wrong read.
  Packed(int out, int in, int rows, int percent, bool hostile) : bias(out, 0.5f) {
    const int chunk = 16 << random_bits() % 5, groups = (out + rows - 1) / rows;
    for (int c = 0; c < (in + chunk - 1) / chunk; c++) {
      pointers.push_back(int32_t(columns.size()));
      for (int g = 0; g < groups; g++) {
        for (int j = 0; j < chunk && c * chunk + j < in; j++) {
          if (int(random_bits() % 100) >= percent) continue;
          columns.push_back(uint8_t(hostile ? random_bits() : unsigned(j)));
          for (int r = 0; r < rows; r++) values.push_back(float(random_bits() % 100) / 100);
        }
        pointers.push_back(int32_t(columns.size()));
      }
    }
    weight = {values.data(), columns.data(), pointers.data(), bias.data(), int64_t(columns.size()), rows, out, in, chunk};
  }
};

// Weights and inputs of 1 and -1, whose sums are whole numbers; values in int8, or two in a byte.
static const char* check_rounded(int isa, int out, int in, int count, bool two) {
  const bool hostile = random_bits() % 3 == 0;  // bits name more columns than there are values, or than there are
  const int groups = (in + 127) / 128, words = 2 * groups, threads = 1 + int(random_bits() % 3);
  std::vector<uint64_t> bits(size_t(out) * words);
  std::vector<int32_t> pointers{0};
  std::vector<uint8_t> values;
  std::vector<float> x(size_t(count) * in), y(size_t(count) * out), wanted(y.size());
  for (float& each : x) each = random_bits() % 2 ? 1.0f : -1.0f;
  for (int r = 0; r < out; r++) {
    for (int w = 0; w < words; w++) {
      int kept = 0;
      for (int j = 64 * w; j < 64 * (w + 1) && j < in; j++) {
        if (r != 0 && random_bits() % 2) continue;  // the first row has a value for each column
        bits[size_t(r) * words + w] |= uint64_t(1) << j % 64;
        const bool negative = random_bits() % 2;
        if (!two) {
          values.push_back(uint8_t(negative ? -64 : 64));
        } else if (kept % 2) {
          values.back() |= negative ? 0x00 : 0xf0;
        } else {
          values.push_back(negative ? 0x00 : 0x0f);
        }
        kept++;
        for (int t = 0; t < count; t++) wanted[size_t(t) * out + r] += x[size_t(t) * in + j] * (negative ? -1.0f : 1.0f);
      }
    }
    pointers.push_back(int32_t(values.size()));
  }
  if (hostile)
    for (uint64_t& each : bits) each = ~uint64_t(0);
  values.resize(values.size() + in + 256);
  values.shrink_to_fit();
  const std::vector<float> scales(size_t(out) * groups, 1.0f / 64);
  const std::vector<uint16_t> halves(size_t(out) * words, 0x3e00);  // 1 / 8
  const int64_t total = int64_t(values.size());
  for (int missing = 0; missing < 2; missing++) {
    const BitmaskInt8 bytes{reinterpret_cast<const int8_t*>(values.data()), bits.data(), pointers.data(), scales.data(),
                            nullptr, total - missing, out, in};
    const BitmaskInt4 pairs{values.data(), bits.data(), pointers.data(), halves.data(), nullptr, total - missing, out, in};
    const int result = two ? hf_sparse_bitmask_int4(isa, &pairs, x.data(), y.data(), count, threads)
                           : hf_sparse_bitmask_int8(isa, &bytes, x.data(), y.data(), count, threads);
    if ((result != 0) != (missing != 0)) return missing ? "a rounded weight that is too short was taken" : "a valid rounded weight was refused";
  }
  for (size_t i = 0; i < y.size() && !hostile; i++)
    if (!(y[i] - wanted[i] < 1e-3f && wanted[i] - y[i] < 1e-3f)) return "a wrong sum of a rounded weight";
  return nullptr;
}

int main() {
  const int tokens[] = {0, 1, 2, 3, 7, 16, 33, 64, 65, 130};
  const int sizes[] = {1, 5, 33, 129, 260};
  const char* name;
  for (int isa = 0; !(name = hf_sparse_isa(isa)) || *name; isa++) {
    if (!name) continue;
    for (int rows = 1; rows <= 16; rows *= 2)
      for (int out : sizes)
        for (int in : sizes)
          for (int count : tokens) {
            const int percent = int(random_bits() % 101), threads = 1 + int(random_bits() % 2);
            const bool hostile = random_bits() % 3 == 0;
            Packed first(out, in, rows, percent, hostile), second(out, in, rows, percent, hostile);
            Packed down(in, out, rows == 16 ? 1 : rows * 2, percent, hostile);
            std::vector<float> x(size_t(count) * in, 1.0f), y(size_t(count) * out), z(size_t(count) * in);
            int bad = hf_sparse_linear(isa, &first.weight, x.data(), y.data(), count, count % 5, threads);
            bad |= hf_sparse_ffn(isa, &first.weight, nullptr, &down.weight, nullptr, x.data(), z.data(), count, 1, threads);
            bad |= hf_sparse_ffn(isa, &first.weight, &second.weight, &down.weight, nullptr, x.data(), z.data(), count, 4,
                                 threads);
            const Norm norm{down.bias.data(), count % 2 ? down.bias.data() : nullptr, 1e-5f};
            if (count >= 16 * threads)
              bad |= hf_sparse_ffn(isa, &first.weight, nullptr, &down.weight, &norm, x.data(), z.data(), count, 1, threads);
            if (bad) return std::printf("%s: a valid weight was refused\n", name), 1;
            first.pointers[random_bits() % first.pointers.size()] = int32_t(random_bits() | (1u << 30));
            if (!hf_sparse_linear(isa, &first.weight, x.data(), y.data(), count, 0, threads))
              return std::printf("%s: hostile pointers were taken\n", name), 1;
          }
    for (int rows = 1; rows <= 16; rows *= 4)
      for (int size : {1, 7, 16})
        for (int count : tokens) {
          const int heads = 1 + int(random_bits() % 3), in = sizes[random_bits() % 5], out = 3 * heads * size;
          const int threads = 1 + int(random_bits() % 3), batch = int(random_bits() % 3);
          Packed qkv(out, in, rows, int(random_bits() % 101), random_bits() % 3 == 0);
          std::vector<float> x(size_t(batch) * count * in, 1.0f), y(size_t(batch) * count * heads * size);
          std::vector<float> mask(size_t(batch) * count * count, 0.5f);
          int bad = hf_sparse_attention(isa, &qkv.weight, nullptr, nullptr, x.data(), y.data(), nullptr, 0, batch, count,
                                        heads, 1, threads);
          bad |= hf_sparse_attention(isa, &qkv.weight, nullptr, nullptr, x.data(), y.data(), mask.data(),
                                     int64_t(count) * count, batch, count, heads, 1, threads);
          Packed after(in, heads * size, 1 << random_bits() % 5, int(random_bits() % 101), random_bits() % 3 == 0);
          const Norm norm{after.bias.data(), after.bias.data(), 1e-5f};
          std::vector<float> z(x.size());
          for (const Norm* wanted : {static_cast<const Norm*>(nullptr), &norm})
            bad |= hf_sparse_attention(isa, &qkv.weight, &after.weight, wanted, x.data(), z.data(), mask.data(), 0, batch,
                                       count, heads, 1, threads);
          if (bad) return std::printf("%s: a valid weight of an attention was refused\n", name), 1;
          qkv.pointers[random_bits() % qkv.pointers.size()] = int32_t(random_bits() | (1u << 30));
          if (!hf_sparse_attention(isa, &qkv.weight, nullptr, nullptr, x.data(), y.data(), nullptr, 0, batch, count, heads,
                                   1, threads))
            return std::printf("%s: hostile pointers of an attention were taken\n", name), 1;
        }
    for (int out : sizes)
      for (int in : sizes)
        for (int count = 0; count < 12; count++) {
          std::vector<float> w(size_t(out) * in, 0.5f), bias(out), x(size_t(count) * in, 1.0f), y(size_t(count) * out);
          const float* some = count % 2 ? bias.data() : nullptr;
          if (hf_sparse_dense(isa, w.data(), some, x.data(), y.data(), count, in, out, 1 + int(random_bits() % 3)))
            return std::printf("%s: a dense weight was refused\n", name), 1;
          for (float each : y)
            if (each != 0.5f * in) return std::printf("%s: %f is no sum of %d halves\n", name, each, in), 1;
        }
    for (int in : sizes)
      for (int count = 0; count < 4; count++) {
        std::vector<float> w(in, 1.0f), x(size_t(count) * in, 3.0f), y(size_t(count) * in);
        if (hf_sparse_rms_norm(isa, x.data(), w.data(), y.data(), count, in, 0.0f, 1.0f))
          return std::printf("%s: a norm was refused\n", name), 1;
        for (float each : y)
          if (each < 1.999f || each > 2.001f) return std::printf("%s: %f is no norm\n", name, each), 1;
      }
    for (int halves = 0; halves < 2; halves++)
      for (int out : sizes)
        for (int in : {1, 33, 64, 129, 2100})
          for (int count : tokens) {
            // Hostile bits name more columns than their row has values, or than there are: wrong sums, but no wrong read.
            const bool hostile = random_bits() % 3 == 0;
            const int words = (in + 63) / 64;
            std::vector<uint64_t> bits(size_t(out) * words);
            std::vector<int32_t> pointers{0};
            for (int r = 0; r < out; r++) {
              int kept = 0;
              for (int j = 0; j < in; j++)
                if (r == 0 || random_bits() % 2) bits[size_t(r) * words + j / 64] |= uint64_t(1) << j % 64, kept++;
              pointers.push_back(pointers.back() + kept);
            }
            if (hostile)
              for (uint64_t& each : bits) each = ~uint64_t(0);
            const size_t total = size_t(pointers.back()) + in + 256;
            std::vector<uint16_t> narrow(halves ? total : 0, 0x3f00);  // 0.5
            std::vector<float> wide(halves ? 0 : total, 0.5f), x(size_t(count) * in, 1.0f), y(size_t(count) * out);
            Bitmask weight{halves ? static_cast<const void*>(narrow.data()) : wide.data(), bits.data(), pointers.data(),
                           nullptr, int64_t(total), out, in, halves};
            const int threads = 1 + int(random_bits() % 3);
            if (hf_sparse_bitmask(isa, &weight, x.data(), y.data(), count, threads))
              return std::printf("%s: a valid weight in bits was refused\n", name), 1;
            for (int t = 0; t < count && !hostile; t++)
              for (int r = 0; r < out; r++)
                if (y[size_t(t) * out + r] != 0.5f * float(pointers[r + 1] - pointers[r]))
                  return std::printf("%s: a wrong sum of a weight in bits\n", name), 1;
            weight.count--;
            if (!hf_sparse_bitmask(isa, &weight, x.data(), y.data(), count, threads))
              return std::printf("%s: a weight in bits that is too short was taken\n", name), 1;
          }
    for (int two = 0; two < 2; two++)
      for (int out : sizes)
        for (int in : {1, 33, 64, 129, 2100})
          for (int count : tokens)
            if (const char* wrong = check_rounded(isa, out, in, count, two))
              return std::printf("%s, %d bits: %s\n", name, two ? 4 : 8, wrong), 1;
    // Rows with more values than their chunk has columns, which a valid weight cannot have: one token takes another way.
    Packed crowded(40, 33, 1, 50, true);
    const int times = 20000 / (int(crowded.columns.size()) + 1) + 1;
    std::vector<float> values;
    std::vector<uint8_t> columns;
    for (int i = 0; i < times; i++) values.insert(values.end(), crowded.values.begin(), crowded.values.end());
    for (int i = 0; i < times; i++) columns.insert(columns.end(), crowded.columns.begin(), crowded.columns.end());
    for (int32_t& each : crowded.pointers) each *= times;
    crowded.weight.values = values.data(), crowded.weight.columns = columns.data();
    crowded.weight.blocks = int64_t(columns.size());
    std::vector<float> one(33, 1.0f), made(40);
    if (hf_sparse_linear(isa, &crowded.weight, one.data(), made.data(), 1, 0, 1))
      return std::printf("%s: a crowded weight was refused\n", name), 1;
    std::printf("%s\n", name);
  }
  std::puts("all right");
}
