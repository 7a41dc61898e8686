// The passes of lora_segments on CUDA, run on the CPU, against sums in double over the same rounded inputs.
#include "cuda_on_cpu.h"
// after it
#include <cmath>
#include <random>
#include <type_traits>

#include "../../csrc/lora_segments_kernels.cuh"
#include "../../csrc/philox.h"

using namespace sensilora;
using cuda_on_cpu::launch;

namespace {

constexpr int64_t kSeed = (int64_t{1} << 40) + 3;
std::mt19937 generator(0);

// Rows are `padding` longer than they hold; NaN before, between and behind them. A padding that is no multiple of 8
// leaves the rows unaligned.
template <class T>
struct Values {
  using Element = typename Numbers<T>::Element;
  int64_t rows, columns, stride, offset;
  std::vector<Element> storage;

  Values(int64_t rows, int64_t columns, int64_t padding, double deviation = 1)
      : rows(rows), columns(columns), stride(columns + padding), offset(padding % 8),
        storage(offset + rows * stride + 64, Numbers<T>::make(NAN)) {
    std::normal_distribution<float> normal(0, static_cast<float>(deviation));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, normal(generator));
  }
  Element* data() { return storage.data() + offset; }
  double at(int64_t i, int64_t j) const {
    return Numbers<T>::read(storage[offset + i * stride + j]);
  }
  void set(int64_t i, int64_t j, double value) {
    storage[offset + i * stride + j] = Numbers<T>::make(static_cast<typename Numbers<T>::Sum>(value));
  }
  void fill(double value) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, value);
  }
  Strided<const Element> in() { return {data(), stride, 1}; }
  Strided<Element> out() { return {data(), stride, 1}; }
};

struct Case {
  int64_t rows, in, out;
  std::vector<int> ranks;
  std::vector<double> ps;
  std::vector<int64_t> offsets, adapters;
};

template <class T>
void check(const Case& c, int64_t padding, int64_t splits) {
  const auto fail = [&](const char* what, double error) {
    std::printf("%s: relative error %g; T %ld, in %ld, out %ld, padding %ld, splits %ld\n", what, error,
                static_cast<long>(c.rows), static_cast<long>(c.in), static_cast<long>(c.out),
                static_cast<long>(padding), static_cast<long>(splits));
    std::exit(1);
  };
  const auto compare = [&](const char* what, int64_t rows, int64_t columns, const auto& got, const auto& want,
                           double tolerance) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const double difference = got(i, j) - want(i, j);
        error += difference * difference;
        norm += want(i, j) * want(i, j);
      }
    if (!(std::sqrt(error) <= tolerance * std::sqrt(norm))) fail(what, std::sqrt(error / norm));  // NaN fails
  };
  using Sum = typename Numbers<T>::Sum;
  const bool wide = std::is_same_v<T, double>;
  const double rounding = std::is_same_v<T, HalfBits> ? 1e-3 : wide ? 1e-14 : std::is_same_v<T, float> ? 1e-6 : 8e-3;

  // What Python and the host give.
  std::vector<Adapter> table;
  int stack = 0, most_ranks = 0;
  int64_t count = 0, adapter_count = static_cast<int64_t>(c.ranks.size());
  for (size_t i = 0; i < c.ranks.size(); ++i) {
    const uint32_t threshold = dropout_threshold(c.ps[i]);
    table.push_back({0.5 + 0.25 * static_cast<double>(i), dropout_scale(threshold), stack, c.ranks[i], threshold, 0});
    stack += c.ranks[i];
    most_ranks = std::max(most_ranks, c.ranks[i]);
  }
  const auto segment_count = static_cast<int64_t>(c.adapters.size());
  const int64_t most = (c.rows + kStretchRows - 1) / kStretchRows + segment_count;
  std::vector<int64_t> starts(adapter_count + 1, -1);
  std::vector<Stretch> stretches(most, Stretch{-1, -1, -1});
  launch(plan_kernel, 1, kPlanThreads, Segments{c.offsets.data(), c.adapters.data(), segment_count, c.rows},
         static_cast<const Adapter*>(table.data()), static_cast<int>(adapter_count), starts.data(), stretches.data(),
         most);

  // Every row of an adapter is in one stretch of it, and no other row in any.
  std::vector<int64_t> owner(c.rows, -1), planned(c.rows, -1);
  for (int64_t i = 0; i < segment_count; ++i)
    for (int64_t row = std::max<int64_t>(0, c.offsets[i]); row < std::min(c.rows, c.offsets[i + 1]); ++row)
      if (c.adapters[i] >= 0 && c.adapters[i] < adapter_count && c.ranks[c.adapters[i]] > 0) owner[row] = c.adapters[i];
  for (int64_t a = 0; a < adapter_count; ++a)
    for (int64_t i = starts[a]; i < starts[a + 1]; ++i, ++count)
      for (int n = 0; n < stretches[i].rows; ++n) {
        if (stretches[i].adapter != a || planned[stretches[i].first + n] != -1) fail("plan", NAN);
        planned[stretches[i].first + n] = a;
      }
  for (; count < most; ++count)
    if (stretches[count].rows != 0) fail("end of the plan", NAN);
  if (planned != owner) fail("rows of the plan", NAN);

  const auto rank_of = [&](int64_t row) { return owner[row] < 0 ? 0 : c.ranks[owner[row]]; };
  const auto own = [&](int64_t row) { return table[owner[row]]; };
  Values<T> x(c.rows, c.in, padding), grad(c.rows, c.out, padding);
  Values<T> A(stack, c.in, padding, 0.2), B(stack, c.out, padding, 0.2);  // B transposed
  Values<T> y(c.rows, c.out, padding), grad_x(c.rows, c.in, padding);
  const int64_t h_columns = (most_ranks + 15) / 16 * 16;
  Values<T> h(c.rows, h_columns, 0), q(c.rows, h_columns, 0);
  h.fill(NAN);
  q.fill(NAN);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t j = 0; j < c.in && owner[row] < 0; ++j) x.set(row, j, NAN);
  const Values<T> y_before = y, grad_x_before = grad_x;

  std::vector<uint16_t> bits(128);
  std::vector<char> kept(c.rows * c.in);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.in; ++j) {
      if (j % 128 == 0) philox_bits(static_cast<uint32_t>(j / 8), i, kSeed, bits.data());
      kept[i * c.in + j] = owner[i] < 0 || bits[j % 128] >= own(i).threshold;
    }
  const auto dropped = [&](int64_t i, int64_t j) { return kept[i * c.in + j] ? own(i).keep_scale * x.at(i, j) : 0.0; };
  const auto plan = [&](bool scaled, bool drops) {
    return SegmentsPlan{table.data(), stretches.data(), starts.data(), drops ? &kSeed : nullptr, scaled};
  };
  const auto of_row = [&](const auto& value) {  // of ranks that the row's adapter has
    return [&](int64_t i, int64_t r) { return r < rank_of(i) ? value(i, r) : 0.0; };
  };
  const auto down = [&](const char* what, Values<T>& from, Values<T>& matrix, Values<T>& to, bool scaled, bool drops,
                        const auto& want) {
    const int chunks = (most_ranks + kSegmentsColumns - 1) / kSegmentsColumns;
    launch(segments_down_kernel<T>, most * chunks, kSegmentsThreads, plan(scaled, drops), from.in(),
           from.columns, matrix.in(), chunks, to.out());
    compare(what, c.rows, h_columns, of_row([&](int64_t i, int64_t r) { return to.at(i, r); }), of_row(want), rounding);
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t r = rank_of(i); r < h_columns; ++r)
        if (!std::isnan(to.at(i, r))) fail(what, 0);
  };
  const auto up = [&](const char* what, Values<T>& skinny, Values<T>& matrix, Values<T>& to, bool scaled, bool drops,
                      const auto& want) {
    const int strips = static_cast<int>((to.columns + kSegmentsColumns - 1) / kSegmentsColumns);
    launch(segments_up_kernel<T>, most * strips, kSegmentsThreads, plan(scaled, drops), skinny.in(),
           matrix.in(), strips, to.out(), to.columns);
    compare(what, c.rows, to.columns, [&](int64_t i, int64_t j) { return to.at(i, j); }, want, rounding);
  };
  const auto outer = [&](const char* what, Values<T>& skinny, Values<T>& from, bool scaled, bool drops,
                         const auto& term) {
    const int strips = static_cast<int>((from.columns + kSegmentsColumns - 1) / kSegmentsColumns);
    const int chunks = (most_ranks + kStretchRows - 1) / kStretchRows;
    std::vector<Sum> partial(splits * stack * from.columns, NAN);
    launch(segments_outer_kernel<T>, strips * splits * chunks * adapter_count, kSegmentsThreads, plan(scaled, drops),
           skinny.in(), from.in(), from.columns, strips, static_cast<int>(splits), chunks, int64_t{stack},
           partial.data());
    Values<T> to(stack, from.columns, 3);
    launch(segments_sum_kernel<T>, (stack * from.columns + kSegmentsThreads - 1) / kSegmentsThreads, kSegmentsThreads,
           static_cast<const Sum*>(partial.data()), splits, int64_t{stack}, from.columns, to.out());
    compare(
        what, stack, from.columns, [&](int64_t r, int64_t j) { return to.at(r, j); },
        [&](int64_t r, int64_t j) {
          double sum = 0;
          for (int64_t i = 0; i < c.rows; ++i)
            if (owner[i] >= 0 && r >= own(i).first && r < own(i).first + own(i).rank)
              sum += skinny.at(i, r - own(i).first) * term(i, j);
          return sum;
        },
        rounding);
  };

  down("h", x, A, h, false, true, [&](int64_t i, int64_t r) {
    double sum = 0;
    for (int64_t j = 0; j < c.in; ++j) sum += dropped(i, j) * A.at(own(i).first + r, j);
    return sum;
  });
  up("y", h, B, y, true, false, [&](int64_t i, int64_t j) {
    double sum = y_before.at(i, j);
    for (int64_t r = 0; r < rank_of(i); ++r) sum += own(i).scaling * h.at(i, r) * B.at(own(i).first + r, j);
    return sum;
  });
  down("q", grad, B, q, true, false, [&](int64_t i, int64_t r) {
    double sum = 0;
    for (int64_t j = 0; j < c.out; ++j) sum += own(i).scaling * grad.at(i, j) * B.at(own(i).first + r, j);
    return sum;
  });
  up("dx", q, A, grad_x, false, true, [&](int64_t i, int64_t j) {
    double sum = grad_x_before.at(i, j);
    for (int64_t r = 0; r < rank_of(i) && kept[i * c.in + j]; ++r)
      sum += own(i).keep_scale * q.at(i, r) * A.at(own(i).first + r, j);
    return sum;
  });
  outer("dA", q, x, false, true, [&](int64_t i, int64_t j) { return dropped(i, j); });
  outer("dB", h, grad, true, false, [&](int64_t i, int64_t j) { return own(i).scaling * grad.at(i, j); });
}

}  // namespace

int main() {
  const Case scattered{150, 72, 136, {7, 0, 33, 16, 80}, {0.3, 0, 0, 1, 0.1}, {2, 3, 40, 40, 61, 100, 133, 150},
                       {2, 0, 1, 4, -1, 2, 4}};
  check<Bfloat16Bits>(scattered, 8, 1);
  check<HalfBits>(scattered, 3, 3);
  check<float>(scattered, 3, 2);
  check<double>(scattered, 8, 1);
  const Case cut{37, 45, 29, {3, 5}, {0.5, 0}, {-9, 5, 20, 90}, {1, 7, 0}};
  check<Bfloat16Bits>(cut, 8, 2);
  check<HalfBits>(cut, 0, 1);
  check<float>(cut, 8, 1);
  check<double>(cut, 3, 2);
  Case singles{70, 16, 8, {1, 2, 17}, {0, 0.2, 0}, {}, {}};
  for (int64_t i = 0; i <= 70; ++i) singles.offsets.push_back(i);
  for (int64_t i = 0; i < 70; ++i) singles.adapters.push_back(5 * i % 4 - 1);
  check<Bfloat16Bits>(singles, 8, 4);
  check<float>(singles, 8, 1);
  const Case wide{33, 330, 200, {20, 3}, {0.1, 0}, {0, 20, 33}, {1, 0}};
  check<HalfBits>(wide, 8, 1);
  check<double>(wide, 3, 1);
  check<Bfloat16Bits>({40, 8, 1, {2, 1}, {0, 0}, {0, 9}, {1}}, 8, 1);
  std::puts("passed");
}
