// The kernel of hutchinson_accumulate and rademacher on CUDA, run on the CPU, against signs by their definition.
#include "cuda_on_cpu.h"
// after it
#include <memory>
#include <random>

#include "../../csrc/hutchinson_kernels.cuh"

using namespace sensilora;
using cuda_on_cpu::launch;

namespace {

std::mt19937 generator(0);

// Bit i % 32 of word i / 32 % 4 of call i / 128.
double sign(int64_t i, int64_t seed, uint64_t offset) {
  const uint64_t call = static_cast<uint64_t>(i) / 128;
  uint32_t words[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), static_cast<uint32_t>(offset),
                       static_cast<uint32_t>(offset >> 32)};
  philox(words, seed);
  return words[i / 32 % 4] >> i % 32 & 1 ? -1 : 1;
}

// Storage as aligned as a device's, filled with NaN.
template <class T>
struct Storage {
  explicit Storage(int64_t size) : bytes((size * sizeof(T) + 15) / 16 * 16), data(std::aligned_alloc(16, bytes)) {
    std::memset(data, 0xFF, bytes);
  }
  ~Storage() { std::free(data); }
  T* get() const { return static_cast<T*>(data); }
  size_t bytes;
  void* data;
};

// `shift` elements before the beginning and 20 behind the end stay NaN.
template <class T, class Out, bool kAdd, bool kAligned>
void check(int64_t size, int64_t seed, uint64_t offset, int64_t shift) {
  const Storage<T> hz_storage(shift + size + 20);
  const Storage<Out> out_storage(shift + size + 20);
  T* const hz = hz_storage.get() + shift;
  Out* const out = out_storage.get() + shift;
  std::vector<double> want(size);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) {
    const double z = sign(i, seed, offset);
    if (kAdd) {
      hz[i] = static_cast<T>(normal(generator));
      out[i] = static_cast<Out>(normal(generator));
      want[i] = out[i] + static_cast<Out>(z) * static_cast<Out>(hz[i]);
    } else {
      want[i] = z;
    }
  }
  const int64_t blocks = (size + kSignsSpan * (kSignsBlock / 32) - 1) / (kSignsSpan * (kSignsBlock / 32));
  launch(signs_kernel<T, Out, kAdd, kAligned>, blocks, kSignsBlock, static_cast<const T*>(hz), out, size, seed,
         static_cast<int64_t>(offset));
  bool right = true;
  for (int64_t i = 0; i < size; ++i) right &= static_cast<double>(out[i]) == want[i];  // NaN fails
  for (int64_t i = -shift; i < 0; ++i) right &= out[i] != out[i];
  for (int64_t i = size; i < size + 20; ++i) right &= out[i] != out[i];
  if (right) return;
  std::printf("%s: size %ld, seed %ld, offset %lu, shift %ld\n", __PRETTY_FUNCTION__, static_cast<long>(size),
              static_cast<long>(seed), static_cast<unsigned long>(offset), static_cast<long>(shift));
  std::exit(1);
}

template <class T, class Out, bool kAdd>
void check_type() {
  for (const int64_t size : {1, 7, 8, 33, 255, 4095, 4096, 4100, 32768, 32771, 40000}) {
    check<T, Out, kAdd, true>(size, 12345, uint64_t{7} << 32 | 9, 0);
    check<T, Out, kAdd, false>(size, -1, ~uint64_t{0}, 1);
  }
}

}  // namespace

int main() {
  check_type<float, float, true>();
  check_type<float, double, true>();
  check_type<double, float, true>();
  check_type<_Float16, float, true>();
  check_type<float, float, false>();
  check_type<double, double, false>();
  check_type<_Float16, _Float16, false>();
  std::puts("passed");
}
