// The passes of lora_linear on CUDA, run on the CPU, against sums in double over the same rounded inputs.
#include "cuda_on_cpu.h"
// after it
#include <cmath>
#include <random>

#include "../../csrc/lora_linear_kernels.cuh"
#include "../../csrc/philox.h"

using namespace sensilora;
using cuda_on_cpu::launch;

namespace {

constexpr int64_t kSeed = (int64_t{1} << 40) + 3;
std::mt19937 generator(0);
int failures = 0;

// A (rows, columns) matrix of 16-bit numbers, rows `stride` apart; NaN before, between and behind them.
template <class T>
struct Matrix16 {
  int64_t rows, columns, stride, offset;
  std::vector<uint16_t> storage;

  Matrix16(int64_t rows, int64_t columns, int64_t stride, int64_t offset, double deviation)
      : rows(rows), columns(columns), stride(stride), offset(offset), storage(offset + rows * stride + 8, 0x7FFF) {
    std::normal_distribution<float> normal(0, static_cast<float>(deviation));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        data()[i * stride + j] = static_cast<uint16_t>(T::pack(normal(generator), 0));
  }
  uint16_t* data() { return storage.data() + offset; }
  double at(int64_t i, int64_t j) const { return T::low(storage[offset + i * stride + j]); }
  Rows<const uint16_t> rows_in() { return {data(), rows, stride, static_cast<int>(columns)}; }
  Rows<uint16_t> rows_out() { return {data(), rows, stride, static_cast<int>(columns)}; }
};

// Rows and columns exchanged or not, and padded with zeros: what jobs_kernel<T, PackJob> gives.
template <class T>
std::vector<uint16_t> packed(Matrix16<T>& from, bool transposed, int64_t rows, int64_t columns) {
  std::vector<uint16_t> to(rows * columns, 0x7FFF);
  Jobs<PackJob> jobs;
  const Kind kind = std::is_same_v<T, HalfBits> ? Kind::kHalf : Kind::kBfloat16;
  if (transposed)
    jobs.add({from.data(), kind, from.columns, from.rows, 1, from.stride, to.data(), rows, columns});
  else
    jobs.add({from.data(), kind, from.rows, from.columns, from.stride, 1, to.data(), rows, columns});
  launch(jobs_kernel<T, PackJob>, jobs.blocks(), Jobs<PackJob>::kBlock, jobs);
  return to;
}

template <class Got, class Want>
void compare(const char* what, int64_t rows, int64_t columns, const Got& got, const Want& want, double tolerance) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const double difference = got(i, j) - want(i, j);
      error += difference * difference;
      norm += want(i, j) * want(i, j);
    }
  if (std::sqrt(error) <= tolerance * std::sqrt(norm)) return;  // NaN fails
  std::printf("%s: relative error %g\n", what, std::sqrt(error / norm));
  ++failures;
}

template <class T, int kRanks, bool kAligned, bool kDropout>
void check(int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t offset) {
  const double rounding = std::is_same_v<T, HalfBits> ? 1e-3 : 8e-3;
  const double scaling = 0.7;
  const uint32_t threshold = kDropout ? dropout_threshold(0.3) : 0;
  const Dropout dropout = make_dropout(&kSeed, threshold);
  const auto keep_scale = static_cast<float>(dropout_scale(threshold));
  const auto padded = [](int64_t columns) { return (columns + 63) / 64 * 64; };
  const int64_t padding = kAligned ? 8 : 3;
  Matrix16<T> x(rows, in, in + padding, offset, 1), grad(rows, out, out + padding, offset, 1);
  Matrix16<T> A(rank, in, in, 0, 0.1), B(out, rank, rank, 0, 0.1), y(rows, out, out, offset, 1);
  Matrix16<T> grad_x(rows, in, in, offset, 1);
  const Matrix16<T> y_before = y, grad_x_before = grad_x;

  std::vector<uint16_t> bits(128);
  std::vector<char> kept(rows * in);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < in; ++j) {
      if (j % 128 == 0) philox_bits(static_cast<uint32_t>(j / 8), i, kSeed, bits.data());
      kept[i * in + j] = bits[j % 128] >= threshold;
    }
  const auto dropped = [&](int64_t i, int64_t j) { return kept[i * in + j] ? keep_scale * x.at(i, j) : 0.0; };

  // h
  const auto packed_A = packed(A, false, kRanks, padded(in));
  const int64_t h_columns = (rank + 15) / 16 * 16;
  Matrix16<T> h(rows, h_columns, h_columns, 0, 0), padded_h(rows, kRanks, kRanks, 0, 0);
  launch(down_kernel<T, kRanks, kAligned, kDropout>, (rows + 31) / 32, 32 * kDownWarps, x.rows_in(), packed_A.data(),
         static_cast<int>(padded(in)), dropout, keep_scale, h.data(), static_cast<int>(rank),
         static_cast<int>(h_columns), padded_h.data());
  const auto want_h = [&](int64_t i, int64_t r) {
    double sum = 0;
    for (int64_t j = 0; j < in; ++j) sum += dropped(i, j) * A.at(r, j);
    return sum;
  };
  compare("h", rows, rank, [&](int64_t i, int64_t r) { return h.at(i, r); }, want_h, rounding);
  compare(
      "padded h", rows, kRanks, [&](int64_t i, int64_t r) { return padded_h.at(i, r); },
      [&](int64_t i, int64_t r) { return r < rank ? h.at(i, r) : 0.0; }, 0);
  compare(
      "zeros of h", rows, h_columns - rank, [&](int64_t i, int64_t r) { return h.at(i, rank + r); },
      [](int64_t, int64_t) { return 0.0; }, 0);

  // y
  const auto packed_B = packed(B, false, padded(out), kRanks);
  int strips = static_cast<int>((out + 511) / 512);
  launch(up_kernel<T, kRanks, kAligned, false>, strips * ((rows + 63) / 64), 32 * kUpWarps, y.rows_out(),
         padded_h.data(), packed_B.data(), strips, Dropout{}, static_cast<float>(scaling));
  compare(
      "y", rows, out, [&](int64_t i, int64_t j) { return y.at(i, j); },
      [&](int64_t i, int64_t j) {
        double sum = y_before.at(i, j);
        for (int64_t r = 0; r < rank; ++r) sum += scaling * h.at(i, r) * B.at(j, r);
        return sum;
      },
      rounding);

  // q and dB
  const auto transposed_B = packed(B, true, kRanks, padded(out));
  const Kind kind = std::is_same_v<T, HalfBits> ? Kind::kHalf : Kind::kBfloat16;
  const int64_t splits = 3;
  std::vector<float> q_partial(strips * rows * kRanks, NAN), b_partial(splits * kRanks * padded(out), NAN);
  launch(grad_b_kernel<T, kRanks, kAligned>, strips * splits, 32 * kGradBWarps, grad.rows_in(), padded_h.data(),
         int64_t{kRanks}, transposed_B.data(), static_cast<int>(padded(out)), strips, q_partial.data(), b_partial.data());
  Matrix16<T> q(rows, kRanks, kRanks, 0, 0);
  std::vector<float> grad_B(out * rank, NAN), grad_A(rank * in, NAN);
  Jobs<ReduceJob> reduce;
  reduce.add({q_partial.data(), strips, rows * kRanks, kRanks, static_cast<float>(scaling), q.data(), kind, rows,
              kRanks, kRanks, 1});
  reduce.add({b_partial.data(), splits, kRanks * padded(out), padded(out), static_cast<float>(scaling), grad_B.data(),
              Kind::kFloat, rank, out, 1, rank});
  launch(jobs_kernel<T, ReduceJob>, reduce.blocks(), Jobs<ReduceJob>::kBlock, reduce);
  compare(
      "q", rows, kRanks, [&](int64_t i, int64_t r) { return q.at(i, r); },
      [&](int64_t i, int64_t r) {
        double sum = 0;
        for (int64_t j = 0; j < out && r < rank; ++j) sum += scaling * grad.at(i, j) * B.at(j, r);
        return sum;
      },
      rounding);
  compare(
      "dB", out, rank, [&](int64_t j, int64_t r) { return grad_B[j * rank + r]; },
      [&](int64_t j, int64_t r) {
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += scaling * grad.at(i, j) * h.at(i, r);
        return sum;
      },
      1e-5);

  // dA and dx
  const auto transposed_A = packed(A, true, padded(in), kRanks);
  std::vector<float> a_partial(splits * kRanks * padded(in), NAN);
  strips = static_cast<int>((in + 255) / 256);
  constexpr bool kFused = kRanks <= kGradAMaxUpdateRanks;
  launch(grad_a_kernel<T, kRanks, kAligned, kDropout>, strips * splits, 32 * kGradAWarps, x.rows_in(), q.data(),
         transposed_A.data(), static_cast<int>(padded(in)), strips, dropout, keep_scale,
         kFused ? grad_x.rows_out() : Rows<uint16_t>{}, a_partial.data());
  if (!kFused) {
    strips = static_cast<int>((in + 511) / 512);
    launch(up_kernel<T, kRanks, kAligned, kDropout>, strips * ((rows + 63) / 64), 32 * kUpWarps, grad_x.rows_out(),
           q.data(), transposed_A.data(), strips, dropout, keep_scale);
  }
  reduce = {};
  reduce.add({a_partial.data(), splits, kRanks * padded(in), padded(in), keep_scale, grad_A.data(), Kind::kFloat, rank,
              in, in, 1});
  launch(jobs_kernel<T, ReduceJob>, reduce.blocks(), Jobs<ReduceJob>::kBlock, reduce);
  compare(
      "dA", rank, in, [&](int64_t r, int64_t j) { return grad_A[r * in + j]; },
      [&](int64_t r, int64_t j) {
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += q.at(i, r) * dropped(i, j);
        return sum;
      },
      1e-5);
  compare(
      "dx", rows, in, [&](int64_t i, int64_t j) { return grad_x.at(i, j); },
      [&](int64_t i, int64_t j) {
        double sum = 0;
        for (int64_t r = 0; r < rank && kept[i * in + j]; ++r) sum += keep_scale * q.at(i, r) * A.at(r, j);
        return grad_x_before.at(i, j) + sum;
      },
      rounding);
  if (failures > 0) {
    std::printf("in T %ld, in %ld, out %ld, rank %ld, aligned %d, dropout %d\n", static_cast<long>(rows),
                static_cast<long>(in), static_cast<long>(out), static_cast<long>(rank), kAligned, kDropout);
    std::exit(1);
  }
}

}  // namespace

int main() {
  check<Bfloat16Bits, 16, true, false>(33, 64, 80, 16, 0);
  check<Bfloat16Bits, 16, true, true>(130, 200, 584, 7, 8);
  check<HalfBits, 16, false, true>(63, 203, 97, 15, 1);
  check<Bfloat16Bits, 16, false, false>(1, 1, 1, 1, 0);
  check<HalfBits, 32, true, true>(65, 600, 136, 17, 0);
  check<Bfloat16Bits, 32, false, true>(31, 77, 530, 32, 5);
  check<Bfloat16Bits, 64, true, true>(49, 328, 72, 33, 0);
  check<HalfBits, 64, false, true>(50, 45, 129, 64, 3);
  std::puts("passed");
}
