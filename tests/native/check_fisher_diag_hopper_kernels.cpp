// The kernel of fisher_diag for Hopper, run on the CPU, against sums in double over the same rounded inputs.
#include "hopper_on_cpu.h"
// after it
#include <cmath>
#include <random>

#include "../../csrc/fisher_diag_hopper.cuh"

using namespace sensilora;

namespace {

std::mt19937 generator(0);

template <class T>
std::vector<uint16_t> random_rows(int64_t rows, int columns) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> found(rows * columns);
  for (uint16_t& element : found) element = static_cast<uint16_t>(T::pack(normal(generator), 0));
  return found;
}

template <class Tile, class T>
void check(const std::vector<int64_t>& lengths, int out_features, int in_features, int clusters, bool accumulate) {
  std::vector<int64_t> starts{0};
  for (const int64_t length : lengths) starts.push_back(starts.back() + length);
  const int64_t tokens = starts.back();
  const int row_tiles = (out_features + 2 * Tile::kRows - 1) / (2 * Tile::kRows);
  const int column_tiles = (in_features + Tile::kColumns - 1) / Tile::kColumns, tiles = row_tiles * column_tiles;
  const int splits = hopper_splits(tiles, clusters, static_cast<int64_t>(lengths.size()));
  const int divided = splits > 1 ? tiles % clusters : 0;
  const std::vector<int64_t> bounds = hopper_bounds(starts, splits);
  const HopperWork work{starts.data(), bounds.data(), static_cast<int>(lengths.size()), row_tiles, column_tiles,
                        tiles - divided, splits, tiles - divided + divided * splits};
  const auto g = random_rows<T>(tokens, out_features), x = random_rows<T>(tokens, in_features);
  const auto map = [&](const std::vector<uint16_t>& rows, int columns, int box) {
    return CUtensorMap{rows.data(), static_cast<int>(tokens), columns, columns, box};
  };
  std::vector<float> out(int64_t{out_features} * in_features, NAN);
  for (size_t i = 0; accumulate && i < out.size(); ++i) out[i] = static_cast<float>(i % 97);
  std::vector<float> partial(int64_t{divided} * splits * 2 * Tile::kRows * Tile::kColumns, NAN);
  const HopperOut to{out.data(), out_features, in_features, accumulate};
  hopper_on_cpu::launch(fisher_diag_hopper_kernel<Tile>, 2 * std::min(clusters, work.units), kHopperThreads,
                        map(g, out_features, kHopperTokens), map(x, in_features, kHopperTokens / kHopperCluster), work,
                        to, partial.data());
  if (divided > 0)
    cuda_on_cpu::launch(fisher_diag_hopper_sum_kernel<Tile>, divided * 4 * (Tile::kSums / 2), 128,
                        static_cast<const float*>(partial.data()), work, to);

  double error = 0, norm = 0;
  for (int i = 0; i < out_features; ++i)
    for (int j = 0; j < in_features; ++j) {
      double want = accumulate ? (int64_t{i} * in_features + j) % 97 : 0;
      for (size_t n = 0; n < lengths.size(); ++n) {
        double sum = 0;
        for (int64_t t = starts[n]; t < starts[n + 1]; ++t)
          sum += double{T::low(g[t * out_features + i])} * T::low(x[t * in_features + j]);
        want += sum * sum;
      }
      const double difference = out[int64_t{i} * in_features + j] - want;
      error += difference * difference;
      norm += want * want;
    }
  if (std::sqrt(error) <= 1e-6 * std::sqrt(norm)) return;  // NaN fails
  std::printf("relative error %g: out %d, in %d, tokens %ld, sequences %zu, splits %d, divided %d\n",
              std::sqrt(error / norm), out_features, in_features, static_cast<long>(tokens), lengths.size(), splits,
              divided);
  std::exit(1);
}

// The units have every tile with every sequence once, and no split much more than its share.
void check_division(int row_tiles, int column_tiles, const std::vector<int64_t>& lengths, int clusters) {
  std::vector<int64_t> starts{0};
  for (const int64_t length : lengths) starts.push_back(starts.back() + length);
  const int tiles = row_tiles * column_tiles, sequences = static_cast<int>(lengths.size());
  const int splits = hopper_splits(tiles, clusters, sequences), divided = splits > 1 ? tiles % clusters : 0;
  const std::vector<int64_t> bounds = hopper_bounds(starts, splits);
  const HopperWork work{starts.data(), bounds.data(), sequences, row_tiles, column_tiles, tiles - divided, splits,
                        tiles - divided + divided * splits};
  std::vector<int> seen(int64_t{tiles} * sequences);
  for (int unit = 0; unit < work.units; ++unit) {
    const HopperUnit found = hopper_unit(work, unit);
    for (int n = found.first; n < found.last; ++n)
      ++seen.at((int64_t{found.row_tile} * column_tiles + found.column_tile) * sequences + n);
  }
  const auto wrong = std::find_if(seen.begin(), seen.end(), [](int count) { return count != 1; });
  if (wrong == seen.end() && static_cast<int>(bounds.size()) == splits + 1) return;
  std::printf("%d x %d tiles, %d sequences, %d clusters: one is summed %d times\n", row_tiles, column_tiles, sequences,
              clusters, *wrong);
  std::exit(1);
}

template <int kColumnTiles, bool kLong>
using Bfloat16Tile = HopperTile<Bfloat16Products, kColumnTiles, kLong>;

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> several{{512}, {9, 3000, 1, 2}, std::vector<int64_t>(40, 65)};
  for (const int rows : {1, 3, 4, 5, 16})
    for (const int columns : {1, 22})
      for (const auto& lengths : several)
        for (const int clusters : {1, 3, 66}) check_division(rows, columns, lengths, clusters);

  for (const bool late : {false, true}) {
    hopper_on_cpu::late = late;
    check<Bfloat16Tile<3, false>, Bfloat16Bits>({1, 15, 16, 17, 63, 64, 65, 130}, 136, 200, 1, true);
    check<Bfloat16Tile<3, false>, Bfloat16Bits>({64, 5, 200, 64, 33}, 264, 8, 3, false);
    check<Bfloat16Tile<3, false>, Bfloat16Bits>({70, 20}, 8, 392, 2, true);
    check<HopperTile<HalfProducts, 3, false>, HalfBits>({512}, 72, 192, 1, false);
    check<Bfloat16Tile<2, true>, Bfloat16Bits>({600, 3, 1030}, 24, 136, 1, true);
    check<HopperTile<HalfProducts, 2, true>, HalfBits>({513, 40}, 16, 24, 4, false);
  }
  std::puts("passed");
}
