// What the files that share work among threads have in common. For those alone: they are built once, without the flags
// of an instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#ifndef _WIN32
#include <pthread.h>
#endif

namespace hf_sparse {
namespace {

// GNU's OpenMP hangs in a forked child whose parent has used it: the child has the pool's records, not its threads.
bool forked = false;
#ifndef _WIN32
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Memory that a thread keeps between calls: fresh pages would cost more than some matmuls.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { free(data); }
  float* take(int64_t floats) {
    if (floats > size || !data) {
      free(data);
      size = (floats + 1024) / 1024 * 1024;
      data = static_cast<float*>(aligned_alloc(64, size * sizeof(float)));
      if (!data) size = 0;
      for (int64_t i = 0; i < size; i++) data[i] = 0;
    }
    return data;
  }
};

// What several threads may find at once. Only whether any of them did is read, and after they have ended.
class SharedResult {
 public:
  void set(int value) { __atomic_store_n(&value_, value, __ATOMIC_RELAXED); }
  int get() const { return __atomic_load_n(&value_, __ATOMIC_RELAXED); }

 private:
  int value_ = 0;
};

template <typename Work>
void parallel_for(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1 || forked) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; i++) work(i);
}

}  // namespace
}  // namespace hf_sparse
