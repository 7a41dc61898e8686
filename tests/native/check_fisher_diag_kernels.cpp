// The kernels of fisher_diag on CUDA, run on the CPU, against sums in double over the same rounded inputs.
#include "cuda_on_cpu.h"
// after it
#include <cmath>
#include <random>
#include <type_traits>

#include "../../csrc/fisher_diag_kernels.cuh"

using namespace sensilora;
using cuda_on_cpu::launch;

namespace {

std::mt19937 generator(0);

template <class T>
struct Numbers;  // how an input's elements are written and read

template <>
struct Numbers<float> {
  static float make(float value) { return value; }
  static double read(float value) { return value; }
};
template <>
struct Numbers<double> {
  static double make(float value) { return value; }
  static double read(double value) { return value; }
};
template <>
struct Numbers<Bfloat16Bits> {
  static uint16_t make(float value) { return static_cast<uint16_t>(Bfloat16Bits::pack(value, 0)); }
  static double read(uint16_t bits) { return Bfloat16Bits::low(bits); }
};
template <>
struct Numbers<HalfBits> {
  static uint16_t make(float value) { return static_cast<uint16_t>(HalfBits::pack(value, 0)); }
  static double read(uint16_t bits) { return HalfBits::low(bits); }
};

// Rows `stride` apart; NaN before, between and behind them.
template <class T>
struct Inputs {
  using Element = decltype(Numbers<T>::make(0));
  int64_t tokens, stride, offset;
  int columns;
  std::vector<Element> storage;

  Inputs(int64_t tokens, int columns, bool aligned)
      : tokens(tokens), stride(columns + (aligned ? 8 : 3)), offset(aligned ? 8 : 1), columns(columns),
        storage(offset + tokens * stride + 8 + 16, Numbers<T>::make(NAN)) {
    // The allocation's own alignment, made certain.
    while (aligned && reinterpret_cast<uintptr_t>(data()) % 16 != 0) ++offset;
    std::normal_distribution<float> normal;
    for (int64_t t = 0; t < tokens; ++t)
      for (int c = 0; c < columns; ++c) storage[offset + t * stride + c] = Numbers<T>::make(normal(generator));
  }
  Element* data() { return storage.data() + offset; }
  double at(int64_t t, int c) const { return Numbers<T>::read(storage[offset + t * stride + c]); }
  TokenRows<Element> rows() { return {data(), stride, columns}; }
};

template <class Tile, class T, bool kAligned>
void check(const std::vector<int64_t>& lengths, int out_features, int in_features, int64_t splits) {
  using Sum = typename Tile::Sum;
  std::vector<int64_t> ends, bounds{0};
  int64_t tokens = 0;
  for (const int64_t length : lengths) ends.push_back(tokens += length);
  Sequences sequences{ends.data(), 0, tokens};
  auto count = static_cast<int64_t>(ends.size());
  if (Tile::kSquares) {
    sequences = {nullptr, Tile::kTokensAtOnce, tokens};
    count = (tokens + Tile::kTokensAtOnce - 1) / Tile::kTokensAtOnce;
  }
  for (int64_t split = 1; split <= splits; ++split) bounds.push_back(count * split / splits);

  Inputs<T> g(tokens, out_features, kAligned), x(tokens, in_features, kAligned);
  const int row_tiles = (out_features + Tile::kRows - 1) / Tile::kRows;
  const int column_tiles = (in_features + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t size = int64_t{out_features} * in_features;
  constexpr bool kDouble = std::is_same_v<Sum, double>;
  std::vector<Sum> partial(splits * size, NAN);
  std::vector<double> out(size, 0.5);
  const FisherOut part{partial.data(), kDouble, false, size}, whole{out.data(), true, true, size};
  launch(fisher_diag_kernel<Tile, kAligned>, splits * row_tiles * column_tiles, kFisherThreads, g.rows(), x.rows(),
         sequences, static_cast<const int64_t*>(bounds.data()), row_tiles, column_tiles, splits == 1 ? whole : part);
  if (splits > 1)
    launch(fisher_sum_kernel<Sum>, (size + kFisherThreads - 1) / kFisherThreads, kFisherThreads,
           static_cast<const Sum*>(partial.data()), splits, whole);

  double error = 0, norm = 0;
  for (int i = 0; i < out_features; ++i)
    for (int j = 0; j < in_features; ++j) {
      double want = 0.5;
      int64_t token = 0;
      for (const int64_t end : ends) {
        double sum = 0;
        for (; token < end; ++token) {
          const double product = g.at(token, i) * x.at(token, j);
          sum += Tile::kSquares ? product * product : product;
        }
        want += Tile::kSquares ? sum : sum * sum;
      }
      const double difference = out[i * in_features + j] - want;
      error += difference * difference;
      norm += want * want;
    }
  if (std::sqrt(error) <= (kDouble ? 1e-14 : 1e-6) * std::sqrt(norm)) return;  // NaN fails
  std::printf("relative error %g: out %d, in %d, tokens %ld, splits %ld, squares %d, aligned %d\n",
              std::sqrt(error / norm), out_features, in_features, static_cast<long>(tokens), static_cast<long>(splits),
              Tile::kSquares, kAligned);
  std::exit(1);
}

// Every tile of the result is the place of one number.
void check_places(int row_tiles, int column_tiles) {
  std::vector<int> seen(row_tiles * column_tiles);
  for (int tile = 0; tile < row_tiles * column_tiles; ++tile) {
    int row = -1, column = -1;
    tile_place(tile, row_tiles, column_tiles, row, column);
    if (row < 0 || row >= row_tiles || column < 0 || column >= column_tiles ||
        seen[row * column_tiles + column]++ != 0) {
      std::printf("tile %d of %d x %d is at %d, %d\n", tile, row_tiles, column_tiles, row, column);
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  for (const int rows : {1, 7, 8, 9, 32})
    for (const int columns : {1, 5, 33}) check_places(rows, columns);

  const std::vector<int64_t> ragged{1, 15, 16, 17, 31, 32, 33, 64};
  check<MmaTile<Bfloat16Bits, 0>, Bfloat16Bits, true>(ragged, 136, 136, 1);
  check<MmaTile<Bfloat16Bits, 0>, Bfloat16Bits, false>({300, 5, 530}, 129, 33, 1);
  check<MmaTile<HalfBits, 0>, HalfBits, true>({40, 3, 70}, 24, 264, 2);
  check<MmaTile<HalfBits, 0>, HalfBits, false>({1}, 1, 1, 1);
  check<MmaTile<Bfloat16Bits, 2>, Bfloat16Bits, true>({150, 20}, 72, 136, 2);
  check<MmaTile<Bfloat16Bits, 2>, Bfloat16Bits, false>({33}, 65, 5, 1);
  check<MmaTile<HalfBits, 3>, HalfBits, true>({70}, 40, 48, 1);
  check<MmaTile<HalfBits, 3>, HalfBits, false>({20}, 3, 131, 1);
  check<FmaTile<float, false>, float, true>(ragged, 136, 20, 3);
  check<FmaTile<float, false>, float, false>({70}, 5, 130, 1);
  check<FmaTile<float, true>, float, true>({300, 9}, 12, 132, 2);
  check<FmaTile<double, false>, double, true>({17, 1, 40}, 66, 10, 1);
  check<FmaTile<double, true>, double, false>({300}, 7, 65, 2);
  check<FmaTile<float, false>, float, true>({}, 4, 8, 1);
  std::puts("passed");
}
