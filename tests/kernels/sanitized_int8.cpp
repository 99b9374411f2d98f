// Calls every int8 operator on exactly allocated memory, with valid and with hostile weights.
#include <cstdio>
#include <random>
#include <vector>

#include "../../hf_sparse/kernels/csrc/int8.h"
#include "../../hf_sparse/kernels/csrc/kernels.h"

using hf_sparse::Int8Weight;
using hf_sparse::Norm;
extern "C" int hf_sparse_has_int8(int);
extern "C" const char* hf_sparse_isa(int);
extern "C" int hf_sparse_int8_linear(int, const Int8Weight*, const float*, float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_int8_ffn(int, const Int8Weight*, const Int8Weight*, const Int8Weight*, const Norm*, const float*,
                                  float*, int64_t, int32_t, int32_t);
extern "C" int hf_sparse_int8_attention(int, const Int8Weight*, const Int8Weight*, const Norm*, const float*, float*,
                                        const float*, int64_t, int64_t, int64_t, int32_t, float, int32_t);

static std::mt19937 random_bits(0);

struct Packed {
  std::vector<int8_t> values;
  std::vector<uint16_t> columns;
  std::vector<int32_t> pointers, offsets;
  std::vector<float> scales, bias;
  Int8Weight weight;

  // `hostile` values, columns within the inputs, offsets and scales are anything: wrong sums, but no wrong read.
  Packed(int out, int in, int rows, int percent, bool hostile) : offsets(out), scales(out, 0.01f), bias(out, 0.5f) {
    const int groups = (out + rows - 1) / rows;
    pointers.push_back(0);
    for (int g = 0; g < groups; g++) {
      for (int j = 0; j < in; j++)
        if (int(random_bits() % 100) < percent) columns.push_back(uint16_t(hostile ? random_bits() % in : unsigned(j)));
      while (columns.size() % 4) columns.push_back(0);
      pointers.push_back(int32_t(columns.size() / 4));
    }
    for (size_t i = 0; i < columns.size() * rows; i++)
      values.push_back(int8_t(hostile ? random_bits() : random_bits() % 255 - 127));
    for (int i = 0; hostile && i < out; i++) offsets[i] = int32_t(random_bits()), scales[i] = float(random_bits());
    weight = {values.data(), columns.data(),  pointers.data(),           scales.data(),
              offsets.data(), bias.data(), int64_t(columns.size() / 4), rows, out, in};
  }
};

static int check(int isa) {
  for (int rows = 1; rows <= 4; rows *= 2)
    for (int out : {1, 5, 33, 129, 260})
      for (int in : {1, 5, 33, 129, 260})
        for (int count : {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 81, 130}) {
          const int percent = int(random_bits() % 101), threads = 1 + int(random_bits() % 3);
          const bool hostile = random_bits() % 3 == 0;
          Packed first(out, in, rows, percent, hostile), second(out, in, rows, percent, hostile);
          Packed down(in, out, rows == 4 ? 1 : rows * 2, percent, hostile);
          std::vector<float> x(size_t(count) * in), y(size_t(count) * out), z(size_t(count) * in);
          for (float& value : x) value = hostile && random_bits() % 9 == 0 ? 1.0f / 0.0f : float(random_bits() % 99);
          int bad = hf_sparse_int8_linear(isa, &first.weight, x.data(), y.data(), count, count % 5, threads);
          bad |= hf_sparse_int8_ffn(isa, &first.weight, nullptr, &down.weight, nullptr, x.data(), z.data(), count, 1, threads);
          bad |= hf_sparse_int8_ffn(isa, &first.weight, &second.weight, &down.weight, nullptr, x.data(), z.data(), count, 4, threads);
          const Norm norm{down.bias.data(), count % 2 ? down.bias.data() : nullptr, 1e-5f};
          if (count >= 64 * threads)
            bad |= hf_sparse_int8_ffn(isa, &first.weight, nullptr, &down.weight, &norm, x.data(), z.data(), count, 1, threads);
          if (bad) return std::puts("a valid weight was refused"), 1;
          if (!first.columns.empty()) {
            uint16_t& column = first.columns[random_bits() % first.columns.size()];
            const uint16_t before = column;
            column = uint16_t(in + random_bits() % (65536 - in));
            if (!hf_sparse_int8_linear(isa, &first.weight, x.data(), y.data(), count, 0, threads))
              return std::puts("a hostile column was taken"), 1;
            column = before;
          }
          first.pointers[random_bits() % first.pointers.size()] = int32_t(random_bits() | (1u << 30));
          if (!hf_sparse_int8_linear(isa, &first.weight, x.data(), y.data(), count, 0, threads))
            return std::puts("hostile pointers were taken"), 1;
        }
  for (int rows = 1; rows <= 4; rows *= 2)
    for (int size : {1, 7, 16})
      for (int in : {1, 33, 130})
        for (int count : {0, 1, 2, 15, 16, 17, 63, 64, 65, 130}) {
          const int heads = 1 + int(random_bits() % 3), out = 3 * heads * size, batch = int(random_bits() % 3);
          const int threads = 1 + int(random_bits() % 3);
          const bool hostile = random_bits() % 3 == 0;
          Packed qkv(out, in, rows, int(random_bits() % 101), hostile);
          Packed after(in, heads * size, 1 << random_bits() % 3, int(random_bits() % 101), hostile);
          std::vector<float> x(size_t(batch) * count * in), y(size_t(batch) * count * heads * size), z(x.size());
          std::vector<float> mask(size_t(batch) * count * count, 0.5f);
          for (float& value : x) value = hostile && random_bits() % 9 == 0 ? 1.0f / 0.0f : float(random_bits() % 99);
          const Norm norm{after.bias.data(), count % 2 ? after.bias.data() : nullptr, 1e-5f};
          const auto run = [&](const Packed* output, const Norm* wanted, const float* shown, int64_t step) {
            return hf_sparse_int8_attention(isa, &qkv.weight, output ? &output->weight : nullptr, wanted, x.data(),
                                            output ? z.data() : y.data(), shown, step, batch, count, heads, 1, threads);
          };
          int bad = run(nullptr, nullptr, nullptr, 0) | run(nullptr, nullptr, mask.data(), int64_t(count) * count);
          bad |= run(&after, nullptr, mask.data(), 0) | run(&after, &norm, nullptr, 0);
          if (bad) return std::puts("a valid weight of an attention was refused"), 1;
          Packed& broken = random_bits() % 2 ? qkv : after;
          broken.pointers[random_bits() % broken.pointers.size()] = int32_t(random_bits() | (1u << 30));
          if (!run(&after, &norm, nullptr, 0)) return std::puts("hostile pointers of an attention were taken"), 1;
        }
  return 0;
}

int main() {
  const char* name;
  for (int isa = 0; !(name = hf_sparse_isa(isa)) || *name; isa++) {
    if (!name || !hf_sparse_has_int8(isa)) continue;
    if (check(isa)) return std::printf("%s\n", name), 1;
    std::printf("%s\n", name);
  }
  std::puts("all right");
}
