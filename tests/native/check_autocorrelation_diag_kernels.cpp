// The kernels of autocorrelation_diag on CUDA, run on the CPU, against sums in double over the same inputs.
#include "cuda_on_cpu.h"
// after it
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "../../csrc/autocorrelation_diag_kernels.cuh"

using namespace sensilora;
using cuda_on_cpu::launch;

namespace {

std::mt19937 generator(0);

template <class T>
typename T::Stored rounded(float value) {
  if constexpr (std::is_same_v<T, HalfElement<HalfBits>>)
    return static_cast<uint16_t>(HalfBits::pack(value, 0));
  else if constexpr (std::is_same_v<T, HalfElement<Bfloat16Bits>>)
    return static_cast<uint16_t>(Bfloat16Bits::pack(value, 0));
  else
    return value;
}

// NaN lies before, between and behind the rows, in the rows that do not count, in the workspace and in out's gaps.
template <class T, class Out, bool kAligned>
void check(int64_t rows, int64_t columns, int64_t splits_wanted, bool masked, bool accumulate, int64_t offset) {
  using Stored = typename T::Stored;
  using Sum = typename T::Sum;
  constexpr int64_t kCount = Columns<Stored>::kCount, kOutStride = 3;
  const int64_t stride = columns + (kAligned ? kCount : 3);
  // The allocation must be as aligned as a device's.
  const int64_t size = offset + rows * stride + 8;
  std::unique_ptr<Stored, void (*)(void*)> storage(
      static_cast<Stored*>(std::aligned_alloc(16, (size * sizeof(Stored) + 15) / 16 * 16)), std::free);
  std::memset(storage.get(), 0xFF, size * sizeof(Stored));  // NaN in every type
  Stored* const x = storage.get() + offset;
  std::unique_ptr<bool[]> mask(new bool[rows + 1]);
  std::vector<Out> out(columns * kOutStride, NAN);
  std::vector<double> want(columns, 0.0);
  std::normal_distribution<float> normal;
  if (accumulate)
    for (int64_t j = 0; j < columns; ++j) want[j] = out[j * kOutStride] = static_cast<Out>(normal(generator));
  for (int64_t i = 0; i < rows; ++i) {
    mask[i] = !masked || generator() % 3 > 0;
    for (int64_t j = 0; mask[i] && j < columns; ++j) {
      x[i * stride + j] = rounded<T>(normal(generator));
      const double value = T::value(x[i * stride + j]);
      want[j] += value * value;
    }
  }

  const int64_t strips = (columns + kStripColumns<Stored> - 1) / kStripColumns<Stored>;
  const int64_t rows_per_split = std::max<int64_t>(1, (rows + splits_wanted - 1) / splits_wanted);
  const int64_t splits = std::max<int64_t>(1, (rows + rows_per_split - 1) / rows_per_split);
  std::vector<Sum> partial(splits * columns, NAN);
  launch(autocorrelation_diag_partial_kernel<T, kAligned>, strips * splits, 32 * kSquaresWarps, x, rows, columns,
         stride, masked ? mask.get() : nullptr, strips, rows_per_split, partial.data());
  launch(autocorrelation_diag_reduce_kernel<Sum, Out>, (columns + 31) / 32, 32 * kSumsWarps, partial.data(), splits,
         columns, accumulate, out.data(), kOutStride);

  const double tolerance = sizeof(Sum) == 8 && sizeof(Out) == 8 ? 1e-13 : 1e-6;
  bool right = true;
  for (int64_t j = 0; j < columns; ++j) {
    right &= std::abs(out[j * kOutStride] - want[j]) <= tolerance * std::max(1.0, std::abs(want[j]));  // NaN fails
    for (int64_t gap = 1; gap < kOutStride; ++gap) right &= std::isnan(out[j * kOutStride + gap]);
  }
  if (right) return;
  std::printf("%s: rows %ld, columns %ld, splits %ld, aligned %d, masked %d, accumulate %d\n", __PRETTY_FUNCTION__,
              static_cast<long>(rows), static_cast<long>(columns), static_cast<long>(splits), kAligned, masked,
              accumulate);
  std::exit(1);
}

template <class T, class Out>
void check_type() {
  constexpr int64_t kCount = Columns<typename T::Stored>::kCount, kStrip = kStripColumns<typename T::Stored>;
  check<T, Out, true>(100, kStrip + kCount, 3, true, true, kCount);
  check<T, Out, true>(67, 2 * kStrip, 1, false, false, 0);
  check<T, Out, false>(100, kStrip + 1, 4, true, false, 1);
  check<T, Out, false>(33, 5, 33, false, true, 3);
  check<T, Out, false>(1, 1, 1, false, false, 0);
  check<T, Out, false>(0, 40, 1, false, true, 0);
  check<T, Out, false>(0, 40, 1, true, false, 0);
}

}  // namespace

int main() {
  check_type<HalfElement<Bfloat16Bits>, float>();
  check_type<HalfElement<Bfloat16Bits>, double>();
  check_type<HalfElement<HalfBits>, float>();
  check_type<WholeElement<float>, float>();
  check_type<WholeElement<float>, double>();
  check_type<WholeElement<double>, double>();
  check_type<WholeElement<double>, float>();
  std::puts("passed");
}
