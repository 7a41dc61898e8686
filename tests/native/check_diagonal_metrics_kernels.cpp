// The passes of diagonal_metrics on CUDA, run on the CPU, against sorting and sums in 128-bit integers.
#include "cuda_on_cpu.h"
// after it
#include <algorithm>
#include <cmath>
#include <random>

#include "../../csrc/diagonal_metrics_kernels.cuh"

using namespace sensilora::metrics;
using cuda_on_cpu::launch;

namespace {

std::mt19937 generator(0);

struct Result {
  double trace, topk_mean;
  int64_t effective_rank;
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The definition, for values in [2^-40, 2^40) or zero: sums of integers of 2^-64.
template <class T>
Result sorted_metrics(const std::vector<typename T::Bits>& values, int64_t count, double alpha) {
  std::vector<unsigned __int128> units;
  for (const auto bits : values) {
    float value;
    const uint32_t float_bits = T::float_bits(bits) & ~kSign;
    std::memcpy(&value, &float_bits, sizeof(value));
    units.push_back(static_cast<unsigned __int128>(std::ldexp(static_cast<double>(value), 64)));
  }
  std::sort(units.rbegin(), units.rend());
  unsigned __int128 all = 0, top = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    all += units[i];
    if (static_cast<int64_t>(i) < count) top += units[i];
  }
  Result result{std::ldexp(static_cast<double>(all), -64), std::ldexp(static_cast<double>(top), -64) / count, 0};
  if (all == 0) return result;
  const double wanted = std::ldexp(alpha * result.trace, 64);
  auto target = static_cast<unsigned __int128>(wanted);
  target += static_cast<double>(target) < wanted;
  target = std::min(target, all);
  for (unsigned __int128 sum = 0; sum < target; ++result.effective_rank) sum += units[result.effective_rank];
  return result;
}

struct Matrix {
  int64_t size, count, offset;
};

// A batch on its way through all kernels.
template <class T>
std::vector<Result> run(const std::vector<Values>& matrices, double alpha, int64_t blocks) {
  std::vector<Values> table = matrices;
  int64_t chunks = 0;
  for (Values& values : table) {
    values.first_chunk = chunks;
    chunks += (values.size + kChunk - 1) / kChunk;
  }
  table.push_back({nullptr, 0, chunks, 0});
  const auto number = static_cast<int64_t>(matrices.size());
  std::vector<Work> work(number);
  const Batch batch{table.data(), work.data(), number, chunks};
  std::vector<double> trace(number, -1), topk_mean(number, -1);
  std::vector<int64_t> effective_rank(number, -5);
  launch(pass_kernel<T, ExponentPass>, blocks, kThreads, batch);
  launch(exponent_cuts_kernel, number, kExponents, batch, alpha);
  launch(pass_kernel<T, DigitPass>, blocks, kThreads, batch);
  launch(digit_cuts_kernel, number, kThreads, batch);
  launch(pass_kernel<T, TailPass>, blocks, kThreads, batch);
  launch(finish_kernel, number, kThreads, batch, trace.data(), topk_mean.data(), effective_rank.data());
  std::vector<Result> results;
  for (int64_t m = 0; m < number; ++m) results.push_back({trace[m], topk_mean[m], effective_rank[m]});
  return results;
}

bool same(const Result& got, const Result& want) {
  const auto equal = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  return equal(got.trace, want.trace) && equal(got.topk_mean, want.topk_mean) &&
         got.effective_rank == want.effective_rank;
}

void expect(const char* what, int64_t size, const Result& got, const Result& want) {
  if (same(got, want)) return;
  std::printf("%s, %ld values: got %.17g %.17g %ld, want %.17g %.17g %ld\n", what, static_cast<long>(size), got.trace,
              got.topk_mean, static_cast<long>(got.effective_rank), want.trace, want.topk_mean,
              static_cast<long>(want.effective_rank));
  std::exit(1);
}

// Values whose metrics are known.
void known(const char* what, const std::vector<float>& values, int64_t count, double alpha, const Result& want) {
  const auto size = static_cast<int64_t>(values.size());
  expect(what, size, run<FloatValues>({{values.data(), size, 0, count}}, alpha, 1)[0], want);
}

// Matrices of T in one batch; each value is what `make` gives, as bits.
template <class T, class Make>
void check(const char* what, const std::vector<Matrix>& matrices, double alpha, int64_t blocks, const Make& make,
           int invalid = 0) {
  using Bits = typename T::Bits;
  std::vector<std::vector<Bits>> storage;
  std::vector<Values> table;
  for (const Matrix& matrix : matrices) {
    storage.emplace_back(matrix.offset + matrix.size + 8, static_cast<Bits>(0xFFFFFFFFu));  // NaN before and behind
    for (int64_t i = 0; i < matrix.size; ++i) storage.back()[matrix.offset + i] = make(i);
    table.push_back({storage.back().data() + matrix.offset, matrix.size, 0, matrix.count});
  }
  const std::vector<Result> results = run<T>(table, alpha, blocks);
  for (size_t m = 0; m < matrices.size(); ++m) {
    const auto first = storage[m].begin() + matrices[m].offset;
    const std::vector<Bits> values(first, first + matrices[m].size);
    Result want{0, 0, 0};
    if (invalid != 0 && !values.empty())
      want = {NAN, NAN, invalid};
    else if (!values.empty())
      want = sorted_metrics<T>(values, matrices[m].count, alpha);
    expect(what, matrices[m].size, results[m], want);
  }
}

float skewed() {
  std::normal_distribution<float> normal;
  const float x = normal(generator) * normal(generator);
  return std::min(std::max(x * x * std::exp(3 * normal(generator)), 1e-12f), 1e9f);
}

// Sums in fixed point against the same in 128-bit integers.
void check_wide() {
  std::uniform_int_distribution<uint64_t> any;
  for (int i = 0; i < 2000; ++i) {
    const uint64_t x = any(generator) >> (8 + i % 50), y = any(generator) >> (8 + i % 37);
    const int shift = i % 50, lift = i / 3 % 200;
    Wide sum{}, less_sum{};
    add(sum, x, lift);
    add(sum, y, lift + shift);
    add(less_sum, x, lift);
    const unsigned __int128 wide = x + (static_cast<unsigned __int128>(y) << shift);
    if (to_double(sum) != std::ldexp(static_cast<double>(wide), lift - 149)) std::exit(2);
    if (difference(sum, less_sum, lift + shift) != y || less(sum, less_sum) || less(less_sum, sum) != (y > 0))
      std::exit(3);
    add(sum, 1, 0);
    if (difference(sum, less_sum, lift + shift) != y + 1) std::exit(4);  // rounded up
    const double value = std::ldexp(static_cast<double>(y), -(i % 300)) * 1.3;
    const Wide least = at_least(value);
    Wide below{};
    add(below, difference(least, Wide{}, 0) - 1, 0);
    if (to_double(least) < value) std::exit(5);
    if (value < 1e-30 && value > 0 && to_double(below) >= value) std::exit(6);
  }
}

}  // namespace

int main() {
  check_wide();
  const auto plain = [](int64_t) { return bits_of(skewed()); };
  const std::vector<Matrix> mixed{{0, 1, 0},     {1, 1, 1},     {777, 388, 3},  {0, 1, 0}, {kChunk, 1, 4}, {3 * kChunk + 5, 4000, 0},
                                  {31, 31, 2}, {kChunk - 1, 8, 0}, {0, 1, 0}};
  for (const double alpha : {0.85, 1.0, 0.001})
    for (const int64_t blocks : {1, 3, 7}) check<FloatValues>("skewed", mixed, alpha, blocks, plain);
  // So many of one exponent that a table is emptied on the way.
  const int64_t many = (ExponentPass::kMostChunks + 1) * kChunk + 77;
  check<FloatValues>("equal", {{many, many / 2, 0}}, 0.85, 1, [](int64_t) { return 0x3FFFFFFFu; });
  check<FloatValues>("close", {{9001, 4500, 1}}, 0.85, 2,
                     [](int64_t i) { return 0x3F800000u + static_cast<uint32_t>(i * 2654435761u % 97); });
  check<FloatValues>("ties", {{5000, 100, 0}}, 0.5, 2, [](int64_t i) { return bits_of(i % 10 == 0 ? 2.0f : 1.0f); });
  check<FloatValues>("zeros", {{5000, 100, 0}, {7, 7, 0}}, 0.5, 2, [](int64_t i) { return i % 2 ? kSign : 0u; });
  check<FloatValues>("mostly zeros", {{5000, 4000, 0}}, 1.0, 2, [](int64_t i) { return i % 999 ? 0u : bits_of(3.0f); });
  check<FloatValues>("negative", {{5000, 4000, 0}, {0, 1, 0}}, 1.0, 2,
                     [](int64_t i) { return i == 77 ? bits_of(-1e-20f) : 0x3F800000u; }, -2);
  check<FloatValues>("negative and NaN", {{100, 40, 0}}, 1.0, 2,
                     [](int64_t i) { return i == 77 ? bits_of(-1) : i == 3 ? 0x7FC00000u : 1u; }, -1);
  check<FloatValues>("negative infinity", {{100, 40, 0}}, 1.0, 2, [](int64_t i) { return i == 77 ? 0xFF800000u : 1u; }, -1);
  check<Bfloat16Values>("bfloat16", mixed, 0.85, 3, [](int64_t) { return static_cast<uint16_t>(bits_of(skewed()) >> 16); });
  check<HalfValues>("float16", mixed, 0.85, 3, [](int64_t i) {
    return sensilora::HalfBits::round(i % 5 == 0 ? 3e-7f : std::min(skewed(), 6e4f));
  });
  check<HalfValues>("infinite float16", {{100, 40, 0}}, 1.0, 2, [](int64_t i) { return uint16_t(i == 77 ? 0x7C00 : 1); }, -1);

  // The trace rounds to 2^120, which no values reach: all of them are needed.
  std::vector<float> powers;
  for (int e = -140; e < 120; ++e) powers.push_back(std::ldexp(1.0f, e));
  known("powers", powers, 1, 0.85, {std::ldexp(1, 120), std::ldexp(1, 119), 3});
  known("all powers", powers, 260, 1.0, {std::ldexp(1, 120), std::ldexp(1, 120) / 260, 260});
  known("huge and tiny", {1e-40f, 3e38f, 1e-40f}, 1, 1.0, {3e38f, 3e38f, 1});
  known("largest", std::vector<float>(40, 3.4028234663852886e38f), 20, 0.5,
        {40 * 3.4028234663852886e38, 3.4028234663852886e38, 20});
  const float least = std::ldexp(1.0f, -149);
  known("subnormal", {3 * least, least, 0, 2 * least, -0.0f}, 2, 0.5, {std::ldexp(6, -149), std::ldexp(2.5, -149), 1});
  known("least share", {3 * least, least, 0, 2 * least}, 4, 1e-320, {std::ldexp(6, -149), std::ldexp(1.5, -149), 1});
  std::puts("passed");
}
