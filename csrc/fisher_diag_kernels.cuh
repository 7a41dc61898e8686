// fisher_diag on CUDA: sum over n of (G_n^T X_n)^2 per sequence, (G*G)^T (X*X) per position, without the gradient of
// a sequence ever lying in memory.
//
// A block makes one tile of the result, over the sequences of one split. It goes through their tokens in steps; a
// step's rows of G and X come by asynchronous copies, kFisherStages - 1 steps ahead, and a step never reaches over the
// end of a sequence: what lies behind it counts as zeros. Where a sequence ends, its finished sums are squared and
// added to a second set of registers. Every element is summed by one thread in the order of the tokens, and partial
// results of splits are added in order: the result does not depend on timing.
//
//   MmaTile   16-bit inputs, on tensor cores
//   FmaTile   float and double, in their own arithmetic
#pragma once

#include <cstdint>
#include <type_traits>

#include "half_types.cuh"
#include "shared_memory.cuh"

namespace sensilora {

constexpr int kFisherThreads = 256;
constexpr int kFisherStages = 3;

// A matrix (tokens, columns), rows `stride` elements apart.
template <class Element>
struct TokenRows {
  const Element* data;
  int64_t stride;
  int columns;
};

// Sequences that lie one behind the other, none of them empty: each up to its end, or of `length` tokens, the last one
// of fewer, where `ends` is null.
struct Sequences {
  const int64_t* ends;
  int64_t length, tokens;

  __device__ int64_t end(int64_t sequence) const {
    if (ends != nullptr) return ends[sequence];
    const int64_t end = (sequence + 1) * length;
    return end < tokens ? end : tokens;
  }
};

// Goes through the sequences from `first` up to `last` in steps of up to kTokens tokens.
template <int kTokens>
class Steps {
 public:
  __device__ Steps(const Sequences& sequences, int64_t first, int64_t last)
      : sequences_(sequences), sequence_(first), last_(last), token_(first > 0 ? sequences.end(first - 1) : 0) {
    end_ = done() ? token_ : sequences_.end(sequence_);
  }
  __device__ bool done() const { return sequence_ >= last_; }
  __device__ bool ends_sequence() const { return token_ + kTokens >= end_; }
  __device__ int64_t token() const { return token_; }
  __device__ int64_t end() const { return end_; }
  __device__ int tokens() const { return ends_sequence() ? static_cast<int>(end_ - token_) : kTokens; }
  __device__ void next() {
    token_ += kTokens;
    if (token_ < end_) return;
    token_ = end_;
    ++sequence_;
    if (!done()) end_ = sequences_.end(sequence_);
  }

 private:
  Sequences sequences_;
  int64_t sequence_, last_, token_, end_ = 0;
};

// Where 16 bytes of a row go in shared memory, so that the same 16 bytes of eight rows lie in different banks.
__device__ inline int swizzled(int row, int sixteen_bytes) { return sixteen_bytes ^ row % 8; }

// Starts copying kTokens rows from `token` on and kWidth columns, with zeros from row `end` on and behind the last
// column. kAligned says that every row begins at a multiple of 16 bytes and has whole ones.
template <bool kAligned, int kTokens, int kWidth, class Element>
__device__ inline void load_tokens(Element (&tile)[kTokens][kWidth], const TokenRows<Element>& from, int64_t token,
                                   int64_t end, int column) {
  constexpr int kVector = 16 / sizeof(Element), kVectors = kWidth / kVector;
  static_assert(kTokens * kVectors % kFisherThreads == 0 && kVectors % 8 == 0, "");
#pragma unroll
  for (int i = 0; i < kTokens * kVectors / kFisherThreads; ++i) {
    const int index = i * kFisherThreads + threadIdx.x;
    const int row = index / kVectors, first = column + index % kVectors * kVector;
    Element* to = &tile[row][swizzled(row, index % kVectors) * kVector];
    const int remaining = token + row < end ? from.columns - first : 0;
    const Element* at = from.data + (token + row) * from.stride + first;
    if constexpr (kAligned) {
      copy_async(to, remaining > 0 ? at : from.data, remaining > 0);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) to[e] = e < remaining ? at[e] : Element{0};
    }
  }
}

// The squares of a pair of 16-bit numbers as sums of bfloat16. A square has at most 22 bits and every part takes the
// next eight, so that nothing is lost.
template <class T, int kParts>
__device__ inline void split_squares(uint32_t pair, uint32_t (&parts)[kParts]) {
  float low = T::low(pair) * T::low(pair), high = T::high(pair) * T::high(pair);
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);  // the upper halves
    low -= Bfloat16Bits::low(parts[i]);
    high -= Bfloat16Bits::high(parts[i]);
  }
}

// Sums of products (kSquareParts 0) or of products of squares, each square in that many parts. A warp has
// 16 kMTiles x 32 of the block's tile.
template <class T, int kSquareParts>
class MmaTile {
 public:
  using Element = uint16_t;
  using Sum = float;
  static constexpr bool kSquares = kSquareParts > 0;
  static constexpr int kMTiles = kSquares ? 2 : 4;  // as many as the registers hold
  static constexpr int kRows = 32 * kMTiles, kColumns = 128, kTokens = 32;
  // Tensor cores cut off what they add, so no sum is made of many steps: longer ones are added up in `total_`, and
  // squares come in sequences of this length.
  static constexpr int kTokensAtOnce = kSquares ? 64 : 256;

  __device__ void add(const Element (&g)[kTokens][kRows], const Element (&x)[kTokens][kColumns], int tokens) {
    const int lane = threadIdx.x % 32, block = lane / 8;
#pragma unroll
    for (int k = 0; k < kTokens; k += 16) {
      if (k >= tokens) break;
      uint32_t b[4][kParts][2];
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t words[4];
        load(words, x, k + lane % 8 + block % 2 * 8, first_column() + 8 * n + block / 2 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) split(words[i], b[n + i / 2], i % 2);
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        uint32_t words[4], a[kParts][4];
        load(words, g, k + lane % 8 + block / 2 * 8, first_row() + 16 * m + block % 2 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) split(words[i], a, i);
        // Products of parts that are smaller than what fp32 keeps are left out.
#pragma unroll
        for (int p = 0; p < kParts; ++p)
#pragma unroll
          for (int q = 0; q < kParts; ++q)
            if (p + q <= 2)
#pragma unroll
              for (int n = 0; n < 4; ++n)
                Mma::mma(acc_[m][n], a[p][0], a[p][1], a[p][2], a[p][3], b[n][q][0], b[n][q][1]);
      }
    }
  }

  __device__ void next(bool ends_sequence) {
    tokens_ += kTokens;
    if (!ends_sequence && tokens_ < kTokensAtOnce) return;
    tokens_ = 0;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float more = acc_[m][n][e];
          acc_[m][n][e] = 0;
          if constexpr (kSquares) {
            sum_[m][n][e] += more;
          } else {
            float& total = total_[m][n][e];
            total += more;
            if (ends_sequence) {
              sum_[m][n][e] += total * total;
              total = 0;
            }
          }
        }
  }

  // Calls fn(row, column, sum) with every element that this thread has of the tile.
  template <class Fn>
  __device__ void for_each(const Fn& fn) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          fn(first_row() + 16 * m + g + e / 2 * 8, first_column() + 8 * n + 2 * t + e % 2, sum_[m][n][e]);
  }

 private:
  static constexpr int kParts = kSquares ? kSquareParts : 1;
  using Mma = std::conditional_t<kSquares, Bfloat16Bits, T>;

  static __device__ int first_row() { return threadIdx.x / 128 * (16 * kMTiles); }
  static __device__ int first_column() { return threadIdx.x / 32 % 4 * 32; }

  template <int kWidth>
  static __device__ void load(uint32_t (&words)[4], const Element (&tile)[kTokens][kWidth], int token, int column) {
    load_blocks<true>(words, &tile[token][swizzled(token, column / 8) * 8]);
  }

  // One word, or the parts of its squares, to place `at` of every part.
  template <int kWords>
  static __device__ void split(uint32_t word, uint32_t (&to)[kParts][kWords], int at) {
    if constexpr (kSquares) {
      uint32_t parts[kParts];
      split_squares<T>(word, parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) to[p][at] = parts[p];
    } else {
      to[0][at] = word;
    }
  }

  float acc_[kMTiles][4][4] = {}, sum_[kMTiles][4][4] = {};
  float total_[kSquares ? 1 : kMTiles][4][4] = {};
  int tokens_ = 0;
};

template <class F, bool kSquared>
class FmaTile {
 public:
  using Element = F;
  using Sum = F;
  static constexpr bool kSquares = kSquared;
  static constexpr int kVector = 16 / sizeof(F), kPer = 2 * kVector;
  static constexpr int kRows = 16 * kPer, kColumns = kRows, kTokens = 16;
  static constexpr int kTokensAtOnce = 256;

  __device__ void add(const F (&g)[kTokens][kRows], const F (&x)[kTokens][kColumns], int tokens) {
#pragma unroll 4
    for (int k = 0; k < tokens; ++k) {
      F left[kPer], right[kPer];
      load(left, g, k, threadIdx.x / 16);
      load(right, x, k, threadIdx.x % 16);
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) acc_[i][j] += left[i] * right[j];
    }
  }

  __device__ void next(bool ends_sequence) {
    if (!ends_sequence) return;
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        sum_[i][j] += kSquares ? acc_[i][j] : acc_[i][j] * acc_[i][j];
        acc_[i][j] = 0;
      }
  }

  template <class Fn>
  __device__ void for_each(const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) fn(place(threadIdx.x / 16, i), place(threadIdx.x % 16, j), sum_[i][j]);
  }

 private:
  // A thread has two vectors of rows and of columns, half a tile apart.
  static __device__ int place(int thread, int i) { return (i / kVector * 16 + thread) * kVector + i % kVector; }

  template <int kWidth>
  static __device__ void load(F (&to)[kPer], const F (&tile)[kTokens][kWidth], int token, int thread) {
    struct alignas(16) Vector {
      F value[kVector];
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto vector =
          *reinterpret_cast<const Vector*>(&tile[token][swizzled(token, 16 * half + thread) * kVector]);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        to[half * kVector + i] = kSquares ? vector.value[i] * vector.value[i] : vector.value[i];
    }
  }

  F acc_[kPer][kPer] = {}, sum_[kPer][kPer] = {};
};

// The place of a tile: eight rows of tiles at a time, so that blocks that run together share what they read.
__device__ inline void tile_place(int64_t tile, int row_tiles, int column_tiles, int& row, int& column) {
  constexpr int kGroup = 8;
  const int64_t group = int64_t{kGroup} * column_tiles;
  const int first = static_cast<int>(tile / group) * kGroup;
  const int height = row_tiles - first < kGroup ? row_tiles - first : kGroup;
  const int within = static_cast<int>(tile % group);
  row = first + within % height;
  column = within / height;
}

// Where sums go: (splits, size) of the kernel's own type, or the one and only split added to what float or double
// numbers lie there.
struct FisherOut {
  void* data;
  bool is_double, accumulate;
  int64_t size;

  template <class Sum>
  __device__ void put(int64_t index, Sum sum) const {
    if (is_double) {
      double& to = static_cast<double*>(data)[index];
      to = (accumulate ? to : 0) + static_cast<double>(sum);
    } else {
      float& to = static_cast<float*>(data)[index];
      to = (accumulate ? to : 0) + static_cast<float>(sum);
    }
  }
};

// out (g.columns, x.columns) of each split, which has the sequences from bounds[split] up to bounds[split + 1].
template <class Tile, bool kAligned>
__global__ void __launch_bounds__(kFisherThreads, 1)
    fisher_diag_kernel(TokenRows<typename Tile::Element> g, TokenRows<typename Tile::Element> x, Sequences sequences,
                       const int64_t* __restrict__ bounds, int row_tiles, int column_tiles, FisherOut out) {
  using Element = typename Tile::Element;
  alignas(128) __shared__ Element g_tile[kFisherStages][Tile::kTokens][Tile::kRows];
  alignas(128) __shared__ Element x_tile[kFisherStages][Tile::kTokens][Tile::kColumns];
  const int64_t tiles = int64_t{row_tiles} * column_tiles, split = blockIdx.x / tiles;
  int tile_row, tile_column;
  tile_place(blockIdx.x % tiles, row_tiles, column_tiles, tile_row, tile_column);
  const int first_row = tile_row * Tile::kRows, first_column = tile_column * Tile::kColumns;

  Steps<Tile::kTokens> now(sequences, bounds[split], bounds[split + 1]), ahead = now;
  const auto load = [&](int stage) {
    if (!ahead.done()) {
      load_tokens<kAligned>(g_tile[stage], g, ahead.token(), ahead.end(), first_row);
      load_tokens<kAligned>(x_tile[stage], x, ahead.token(), ahead.end(), first_column);
      ahead.next();
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kFisherStages - 1; ++stage) load(stage);

  Tile tile;
  for (int stage = 0; !now.done(); now.next()) {
    wait_for_copies<kFisherStages - 2>();
    __syncthreads();
    // Into the stage that was added up before the barrier.
    load(stage == 0 ? kFisherStages - 1 : stage - 1);
    tile.add(g_tile[stage], x_tile[stage], now.tokens());
    tile.next(now.ends_sequence());
    stage = stage == kFisherStages - 1 ? 0 : stage + 1;
  }

  tile.for_each([&](int row, int column, typename Tile::Sum sum) {
    const int64_t i = int64_t{first_row} + row;
    const int j = first_column + column;
    if (i < g.columns && j < x.columns) out.put(split * out.size + i * x.columns + j, sum);
  });
}

// out = the sum of `partial` (splits, out.size) over the splits, in order.
template <class Sum>
__global__ void __launch_bounds__(kFisherThreads)
    fisher_sum_kernel(const Sum* __restrict__ partial, int64_t splits, FisherOut out) {
  const int64_t index = int64_t{blockIdx.x} * kFisherThreads + threadIdx.x;
  if (index >= out.size) return;
  Sum sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * out.size + index];
  out.put(index, sum);
}

}  // namespace sensilora
