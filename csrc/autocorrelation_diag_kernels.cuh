// Column sums of squares on CUDA: one read of x, partial sums to a workspace, and these added in order. Results do
// not depend on timing.
#pragma once

#include <cstdint>

#include "half_types.cuh"

namespace sensilora {

// The types of x: as they are stored, and what their squares are summed in.
template <class Bits>
struct HalfElement {
  using Stored = uint16_t;
  using Sum = float;
  static __device__ Sum value(Stored stored) { return Bits::low(stored); }
};

template <class T>
struct WholeElement {
  using Stored = T;
  using Sum = T;
  static __device__ Sum value(Stored stored) { return stored; }
};

// What a thread reads of a row.
template <class Stored>
struct alignas(16) Columns {
  static constexpr int kCount = 16 / sizeof(Stored);
  Stored at[kCount];
};

constexpr int kSquaresWarps = 8;
constexpr int kSquaresRows = 4;  // that a warp has on their way at once

template <class Stored>
constexpr int kStripColumns = 32 * Columns<Stored>::kCount;

// partial (splits, columns) = sums of squares over the counted rows of each split. A block has a strip of columns of
// one split, and its warps take the rows in turn. kAligned says that every thread's columns of every row lie within x
// and on a multiple of 16 bytes. mask may be null.
template <class T, bool kAligned>
__global__ void __launch_bounds__(32 * kSquaresWarps)
    autocorrelation_diag_partial_kernel(const typename T::Stored* __restrict__ x, int64_t rows, int64_t columns,
                                        int64_t stride, const bool* __restrict__ mask, int64_t strips,
                                        int64_t rows_per_split, typename T::Sum* __restrict__ partial) {
  using Stored = typename T::Stored;
  using Sum = typename T::Sum;
  constexpr int kCount = Columns<Stored>::kCount, kStrip = kStripColumns<Stored>;
  __shared__ Sum parts[kSquaresWarps][kStrip];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t strip = blockIdx.x % strips, split = blockIdx.x / strips;
  const int64_t column = strip * kStrip + lane * kCount;
  const int64_t end = (split + 1) * rows_per_split < rows ? (split + 1) * rows_per_split : rows;

  Sum total[kCount] = {};
  for (int64_t first = split * rows_per_split + warp; first < end; first += kSquaresWarps * kSquaresRows) {
    bool counted[kSquaresRows];
#pragma unroll
    for (int i = 0; i < kSquaresRows; ++i) {
      const int64_t row = first + i * kSquaresWarps;
      counted[i] = row < end && column < columns && (mask == nullptr || mask[row]);
    }
    Columns<Stored> read[kSquaresRows];
#pragma unroll
    for (int i = 0; i < kSquaresRows; ++i) {
      read[i] = {};
      const Stored* at = x + (first + i * kSquaresWarps) * stride + column;
      if constexpr (kAligned) {
        if (counted[i]) read[i] = *reinterpret_cast<const Columns<Stored>*>(at);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          if (counted[i] && column + j < columns) read[i].at[j] = at[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kSquaresRows; ++i)
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const Sum value = T::value(read[i].at[j]);
        total[j] += value * value;
      }
  }

#pragma unroll
  for (int j = 0; j < kCount; ++j) parts[warp][lane * kCount + j] = total[j];
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine < kStrip && strip * kStrip + mine < columns) {
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < kSquaresWarps; ++w) sum += parts[w][mine];
    partial[split * columns + strip * kStrip + mine] = sum;
  }
}

constexpr int kSumsWarps = 8;

// out[j * stride] = the sum of partial (splits, columns) over the splits, or that more. A block has 32 columns, and
// its warps take the splits in turn.
template <class Sum, class Out>
__global__ void __launch_bounds__(32 * kSumsWarps)
    autocorrelation_diag_reduce_kernel(const Sum* __restrict__ partial, int64_t splits, int64_t columns,
                                       bool accumulate, Out* __restrict__ out, int64_t stride) {
  __shared__ double parts[kSumsWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  double sum = 0;
  if (column < columns)
    for (int64_t split = warp; split < splits; split += kSumsWarps) sum += partial[split * columns + column];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
#pragma unroll
  for (int w = 1; w < kSumsWarps; ++w) sum += parts[w][lane];
  Out& to = out[column * stride];
  to = static_cast<Out>(accumulate ? static_cast<double>(to) + sum : sum);
}

}  // namespace sensilora
