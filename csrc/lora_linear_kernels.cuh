// The skinny passes of lora_linear over 16-bit activations: every operand with a side of kRanks (16, 32 or 64: the
// rank, padded with zeros) goes through the tensor cores, and the time is that of reading the activations once.
//
// A product sums over an index whose numbering is free, and so is that of its rows and columns. The numberings are
// chosen such that what one lane of a tensor core's operand or accumulator holds is 16 bytes of a row in memory.
// Activations therefore go straight between memory and registers, without shared memory or barriers, and whole
// 128-byte lines at a time. With lane = 4 g + t there are two layouts of a tile of 16 rows and 64 columns:
//
//   by rows      rows g and g + 8, columns 32 s + 8t ... + 7 for s = 0, 1: sums over columns
//   by columns   rows 4t ... 4t + 3, columns 8g ... 8g + 7: sums over rows, and outer products of rank and rank
//
// Results do not depend on timing: partial sums go to a workspace and are added in order.
#pragma once

#include <cstdint>

#include "half_types.cuh"
#include "philox.cuh"

namespace sensilora {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;

struct alignas(16) Eight {
  uint32_t pair[4];
};

__device__ inline int lane_g() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_t() { return threadIdx.x % 4; }

// The next eight elements of a row that has `remaining` more, zero beyond them; nothing is read where that is not
// positive. kAligned says that `at` is a multiple of 16 bytes and `remaining` one of 8.
template <bool kAligned>
__device__ inline Eight load8(const uint16_t* at, int remaining) {
  Eight value = {};
  if constexpr (kAligned) {
    if (remaining > 0) value = *reinterpret_cast<const Eight*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < remaining) value.pair[i / 2] |= static_cast<uint32_t>(at[i]) << (16 * (i % 2));
  }
  return value;
}

template <bool kAligned>
__device__ inline void store8(uint16_t* at, int remaining, const Eight& value) {
  if constexpr (kAligned) {
    if (remaining > 0) *reinterpret_cast<Eight*>(at) = value;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < remaining) at[i] = static_cast<uint16_t>(value.pair[i / 2] >> (16 * (i % 2)));
  }
}

__device__ inline Eight load_operand(const uint16_t* at) { return *reinterpret_cast<const Eight*>(at); }

__device__ inline void keep(Eight& value, const Kept& kept) {
#pragma unroll
  for (int i = 0; i < 4; ++i) value.pair[i] &= kept.pair[i];
}

// A matrix of activations: rows `stride` elements apart, of `columns` elements.
template <class Element>
struct Rows {
  Element* data;
  int64_t rows, stride;
  int columns;

  // Where (row, column) is, and how many elements the row has from there on: none in a row that does not exist.
  __device__ Element* at(int64_t row, int column) const { return data + row * stride + column; }
  __device__ int remaining(int64_t row, int column) const { return row >= 0 && row < rows ? columns - column : 0; }
};

// --- sums over columns

// total[n] (16 rows, ranks 8n ... + 7) += tile (16 rows, 32 columns, by rows) operand^T. operand[n] is of rank 8n + g,
// at the tile's columns.
template <class T, int kEights>
__device__ inline void add_sums_over_columns(float (&total)[kEights][4], const Eight (&tile)[2],
                                             const Eight (&operand)[kEights]) {
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    T::mma(total[n], tile[0].pair[0], tile[1].pair[0], tile[0].pair[1], tile[1].pair[1], operand[n].pair[0],
           operand[n].pair[1]);
    T::mma(total[n], tile[0].pair[2], tile[1].pair[2], tile[0].pair[3], tile[1].pair[3], operand[n].pair[2],
           operand[n].pair[3]);
  }
}

// One warp's sums over its columns, for ranks `first` on, for a sum over warps.
template <int kRanks, int kEights>
__device__ inline void write_part(float (&part)[kTileRows][kRanks], int first, const float (&total)[kEights][4]) {
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    *reinterpret_cast<float2*>(&part[g][first + 8 * n + 2 * t]) = make_float2(total[n][0], total[n][1]);
    *reinterpret_cast<float2*>(&part[g + 8][first + 8 * n + 2 * t]) = make_float2(total[n][2], total[n][3]);
  }
}

template <int kWarps, int kRanks>
__device__ inline float sum_of_parts(const float (&parts)[kWarps][kTileRows][kRanks], int row, int rank) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp][row][rank];
  return sum;
}

constexpr int kDownWarps = 8;
constexpr int kDownTiles = 2;  // of rows, for a block

// h (rows, h_columns) = scale * drop(x) A^T, zero from column `rank` on; and again as (rows, kRanks) unless padded_h is
// null. lora_A is (kRanks, padded), zero beyond its own size. The warps of a block share its rows and take columns in
// turn.
template <class T, int kRanks, bool kAligned, bool kDropout>
__global__ void __launch_bounds__(32 * kDownWarps, kAligned && kRanks <= (kDropout ? 16 : 32) ? 2 : 1)
    down_kernel(Rows<const uint16_t> x, const uint16_t* __restrict__ lora_A, int padded, Dropout dropout, float scale,
                uint16_t* __restrict__ h, int rank, int h_columns, uint16_t* __restrict__ padded_h) {
  alignas(8) __shared__ float parts[kDownWarps][kTileRows][kRanks];
  const int warp = threadIdx.x / 32, g = lane_g(), t = lane_t();
  const int64_t first_row = int64_t{blockIdx.x} * (kDownTiles * kTileRows);
  const int64_t seed = kDropout ? *dropout.seed : 0;

  const uint16_t* at[2 * kDownTiles];
#pragma unroll
  for (int i = 0; i < 2 * kDownTiles; ++i) at[i] = x.at(first_row + 8 * i + g, kTileColumns * warp + 8 * t);
  const uint16_t* operand_at = lora_A + static_cast<int64_t>(g) * padded + kTileColumns * warp + 8 * t;
  constexpr int kStep = kTileColumns * kDownWarps;

  Eight tile[2][kDownTiles][2];  // by s and half, by rows
  const auto load = [&](int s, int column) {
#pragma unroll
    for (int i = 0; i < 2 * kDownTiles; ++i) {
      tile[s][i / 2][i % 2] =
          load8<kAligned>(at[i] + 32 * s, x.remaining(first_row + 8 * i + g, column + 32 * s + 8 * t));
      if (s == 1) at[i] += kStep;
    }
  };

  float total[kDownTiles][kRanks / 8][4] = {};
  load(0, kTileColumns * warp);
  load(1, kTileColumns * warp);
  for (int column = kTileColumns * warp; column < x.columns; column += kStep) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      Eight operand[kRanks / 8];
#pragma unroll
      for (int n = 0; n < kRanks / 8; ++n)
        operand[n] = load_operand(operand_at + static_cast<int64_t>(8 * n) * padded + 32 * s);
#pragma unroll
      for (int m = 0; m < kDownTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if constexpr (kDropout)
            keep(tile[s][m][half], kept_columns<1>(seed, dropout.thresholds, first_row + kTileRows * m + 8 * half + g,
                                                   (column + 32 * s) / 8 + t));
        add_sums_over_columns<T>(total[m], tile[s][m], operand);
      }
      // At once into the registers that have just been read: one half is on its way while the other is summed.
      load(s, column + kStep);
    }
    operand_at += kStep;
  }

#pragma unroll
  for (int m = 0; m < kDownTiles; ++m) {
    if (m > 0) __syncthreads();
    write_part(parts[warp], 0, total[m]);
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kRanks; i += 32 * kDownWarps) {
      const int64_t at = first_row + kTileRows * m + i / kRanks;
      const int r = i % kRanks;
      if (at >= x.rows) continue;
      const float sum = sum_of_parts(parts, i / kRanks, r);
      const auto bits = static_cast<uint16_t>(r < rank ? T::pack(scale * sum, 0) : 0);
      if (r < h_columns) h[at * h_columns + r] = bits;
      if (padded_h != nullptr) padded_h[at * kRanks + r] = bits;
    }
  }
}

// --- outer products

// What a lane needs of `right` (columns, kRanks) for 64 columns: ranks 16 k + 4t ... + 3 of column 8g + i.
template <int kRanks>
struct RightOperand {
  uint2 value[kRanks / 16][8];

  __device__ void load(const uint16_t* __restrict__ right, int first_column) {
#pragma unroll
    for (int k = 0; k < kRanks / 16; ++k)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        value[k][i] = *reinterpret_cast<const uint2*>(
            right + static_cast<int64_t>(first_column + 8 * lane_g() + i) * kRanks + 16 * k + 4 * lane_t());
  }
};

// tile (16 rows from first_row on, 64 columns, by columns) += scale * kept∘(left right^T), left (rows, kRanks).
template <class T, int kRanks, bool kDropout>
__device__ inline void add_outer_product(Eight (&tile)[4], const uint16_t* __restrict__ left, int64_t first_row,
                                         int64_t rows, const RightOperand<kRanks>& right, float scale,
                                         const Kept (&kept)[4]) {
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int u = 0; u < 2; ++u) {  // rows 4t + 2u and 4t + 2u + 1
    const int64_t row = first_row + 4 * (g / 2) + 2 * u + g % 2;
    float total[4][4] = {};
#pragma unroll
    for (int k = 0; k < kRanks / 16; ++k) {
      uint2 value = make_uint2(0, 0);
      if (row < rows) value = *reinterpret_cast<const uint2*>(left + row * kRanks + 16 * k + 4 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        T::mma(total[i], right.value[k][2 * i].x, right.value[k][2 * i + 1].x, right.value[k][2 * i].y,
               right.value[k][2 * i + 1].y, value.x, value.y);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& pair = tile[2 * u + e].pair[i];
        float low = total[i][e], high = total[i][2 + e];
        if constexpr (kDropout) {
          low = kept[2 * u + e].pair[i] & 0x0000FFFFu ? low : 0;
          high = kept[2 * u + e].pair[i] & 0xFFFF0000u ? high : 0;
        }
        pair = T::pack(T::low(pair) + scale * low, T::high(pair) + scale * high);
      }
  }
}

template <bool kAligned, class Element>
__device__ inline void load_by_columns(Eight (&tile)[4], const Rows<Element>& from, int64_t first_row, int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + 4 * lane_t() + i;
    const int first = column + 8 * lane_g();
    tile[i] = load8<kAligned>(from.at(row, first), from.remaining(row, first));
  }
}

template <bool kAligned>
__device__ inline void store_by_columns(const Eight (&tile)[4], const Rows<uint16_t>& to, int64_t first_row,
                                        int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + 4 * lane_t() + i;
    const int first = column + 8 * lane_g();
    store8<kAligned>(to.at(row, first), to.remaining(row, first), tile[i]);
  }
}

__device__ inline void kept_by_columns(Kept (&kept)[4], int64_t seed, uint32_t thresholds, int64_t first_row,
                                       int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    kept[i] = kept_columns<4>(seed, thresholds, first_row + 4 * lane_t() + i, column / 8 + lane_g());
}

constexpr int kUpWarps = 8;
constexpr int kUpTiles = 4;  // of rows, for a warp

// out (rows, columns) += scale * kept∘(left right^T); left (rows, kRanks), right (columns padded to 64, kRanks).
// The last rows come first: what the product before this pass wrote last is still in the second-level cache.
template <class T, int kRanks, bool kAligned, bool kDropout>
__global__ void __launch_bounds__(32 * kUpWarps, kAligned && kRanks <= 32 ? 2 : 1)
    up_kernel(Rows<uint16_t> out, const uint16_t* __restrict__ left, const uint16_t* __restrict__ right, int strips,
              Dropout dropout, float scale) {
  const int column = (blockIdx.x % strips * kUpWarps + threadIdx.x / 32) * kTileColumns;
  const int64_t turn = (gridDim.x - 1 - blockIdx.x) / strips;
  const int64_t first_row = turn * (kUpTiles * kTileRows);
  if (column >= out.columns) return;
  const int64_t seed = kDropout ? *dropout.seed : 0;
  RightOperand<kRanks> operand;
  operand.load(right, column);

  Eight next[4];
  load_by_columns<kAligned>(next, out, first_row, column);
#pragma unroll 2
  for (int i = 0; i < kUpTiles; ++i) {
    const int64_t row = first_row + kTileRows * i;
    Eight tile[4] = {next[0], next[1], next[2], next[3]};
    if (i + 1 < kUpTiles) load_by_columns<kAligned>(next, out, row + kTileRows, column);
    Kept kept[4];
    if constexpr (kDropout) kept_by_columns(kept, seed, dropout.thresholds, row, column);
    add_outer_product<T, kRanks, kDropout>(tile, left, row, out.rows, operand, scale, kept);
    store_by_columns<kAligned>(tile, out, row, column);
  }
}

// --- sums over rows

// Ranks g * kRanks / 8 ... of rows 4t ... 4t + 3 of a matrix of kRanks columns, zero beyond its rows.
template <int kRanks>
struct RankOperand {
  uint32_t pair[4][kRanks / 16];

  __device__ void load(const uint16_t* __restrict__ from, int64_t stride, int64_t first_row, int64_t rows) {
    struct alignas(kRanks / 4) Words {
      uint32_t pair[kRanks / 16];
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + 4 * lane_t() + i;
      Words words = {};
      if (row < rows) words = *reinterpret_cast<const Words*>(from + row * stride + kRanks / 8 * lane_g());
#pragma unroll
      for (int m = 0; m < kRanks / 16; ++m) pair[i][m] = words.pair[m];
    }
  }
};

// total[m][j] += ranks^T tile over the 16 rows. total[m][j] has ranks g * kRanks / 8 + 2m (elements 0, 1) and + 2m + 1
// (2, 3) at columns 16t + j (0, 2) and 16t + 8 + j (1, 3).
template <class T, int kRanks>
__device__ inline void add_sums_over_rows(float (&total)[kRanks / 16][8][4], const Eight (&tile)[4],
                                          const RankOperand<kRanks>& ranks) {
  constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;  // the lower or upper halves of two words
#pragma unroll
  for (int m = 0; m < kRanks / 16; ++m) {
    const uint32_t a0 = __byte_perm(ranks.pair[0][m], ranks.pair[1][m], kLow);
    const uint32_t a1 = __byte_perm(ranks.pair[0][m], ranks.pair[1][m], kHigh);
    const uint32_t a2 = __byte_perm(ranks.pair[2][m], ranks.pair[3][m], kLow);
    const uint32_t a3 = __byte_perm(ranks.pair[2][m], ranks.pair[3][m], kHigh);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t half = j % 2 ? kHigh : kLow;
      T::mma(total[m][j], a0, a1, a2, a3, __byte_perm(tile[0].pair[j / 2], tile[1].pair[j / 2], half),
             __byte_perm(tile[2].pair[j / 2], tile[3].pair[j / 2], half));
    }
  }
}

// Writes total to (kRanks, padded) at 64 columns from `column` on.
template <int kRanks>
__device__ inline void write_sums_over_rows(float* to, int padded, int column,
                                            const float (&total)[kRanks / 16][8][4]) {
#pragma unroll
  for (int m = 0; m < kRanks / 16; ++m)
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int rank = lane_g() * (kRanks / 8) + 2 * m + f;
      float4* at = reinterpret_cast<float4*>(to + static_cast<int64_t>(rank) * padded + column + 16 * lane_t());
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int j = 0; j < 8; j += 4)
          at[2 * side + j / 4] = make_float4(total[m][j][2 * f + side], total[m][j + 1][2 * f + side],
                                             total[m][j + 2][2 * f + side], total[m][j + 3][2 * f + side]);
    }
}

// The first row of the tile of rows that one of `splits` takes at this turn, the last rows first; below 0 if none.
__device__ inline int64_t tile_row(int64_t rows, int64_t turn, int splits, int split) {
  return ((rows + kTileRows - 1) / kTileRows - 1 - turn * splits - split) * kTileRows;
}

constexpr int kGradBWarps = 8;

// One read of grad (rows, out): q_partial (strips, rows, kRanks) of grad B, and b_partial (splits, kRanks, padded) of
// (grad^T h)^T. h is (rows, kRanks), rows h_stride apart; lora_B is (kRanks, padded), transposed. A block has a strip of
// 512 columns and the rows of one split.
template <class T, int kRanks, bool kAligned>
__global__ void __launch_bounds__(32 * kGradBWarps, kAligned && kRanks == 16 ? 2 : 1)
    grad_b_kernel(Rows<const uint16_t> grad, const uint16_t* __restrict__ h, int64_t h_stride, const uint16_t* lora_B,
                  int padded, int strips, float* __restrict__ q_partial, float* __restrict__ b_partial) {
  constexpr int kBuffers = kRanks <= 32 ? 2 : 1;  // two spare a barrier, where they fit into 48 KB
  alignas(8) __shared__ float parts[kBuffers][kGradBWarps][kTileRows][kRanks];
  const int warp = threadIdx.x / 32, g = lane_g(), t = lane_t();
  const int strip = blockIdx.x % strips, split = blockIdx.x / strips, splits = gridDim.x / strips;
  const int column = (strip * kGradBWarps + warp) * kTileColumns;

  // Registers for the operand, which is the same at every turn, and for a tile ahead: too many beside 64 ranks' sums,
  // where q is made in parts.
  constexpr bool kSpare = kRanks <= 32;
  constexpr int kEights = kSpare ? kRanks / 8 : 2;
  Eight operand[2][kEights] = {};
  const auto load_operand_of = [&](int first) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int n = 0; n < kEights; ++n)
        if (column < padded)
          operand[s][n] =
              load_operand(lora_B + static_cast<int64_t>(first + 8 * n + g) * padded + column + 32 * s + 8 * t);
  };
  if (kSpare) load_operand_of(0);

  float total[kRanks / 16][8][4] = {};
  Eight next[4];
  const auto load_next = [&](int64_t turn) {
    load_by_columns<kAligned>(next, grad, tile_row(grad.rows, turn, splits, split), column);
  };
  load_next(0);
  for (int64_t turn = 0;; ++turn) {
    const int64_t first_row = tile_row(grad.rows, turn, splits, split);
    if (first_row < 0) break;
    const Eight tile[4] = {next[0], next[1], next[2], next[3]};
    if (kSpare) load_next(turn + 1);

    RankOperand<kRanks> ranks;
    ranks.load(h, h_stride, first_row, grad.rows);
    // The same tile in the other layout: its lines are in the first-level cache.
    Eight by_rows[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + 8 * half + g;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int first_column = column + 32 * s + 8 * t;
        by_rows[s][half] = load8<kAligned>(grad.at(row, first_column), grad.remaining(row, first_column));
      }
    }
    add_sums_over_rows<T, kRanks>(total, tile, ranks);
    if (!kSpare) load_next(turn + 1);
    auto& buffer = parts[turn % kBuffers];
#pragma unroll 1
    for (int first = 0; first < kRanks; first += 8 * kEights) {
      if (!kSpare) load_operand_of(first);
      float q[kEights][4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) add_sums_over_columns<T>(q, by_rows[s], operand[s]);
      write_part(buffer[warp], first, q);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kRanks; i += 32 * kGradBWarps) {
      const int64_t row = first_row + i / kRanks;
      if (row < grad.rows)
        q_partial[(strip * grad.rows + row) * kRanks + i % kRanks] = sum_of_parts(buffer, i / kRanks, i % kRanks);
    }
    if (kBuffers == 1) __syncthreads();
  }
  if (column < padded)
    write_sums_over_rows<kRanks>(b_partial + static_cast<int64_t>(split) * kRanks * padded, padded, column, total);
}

constexpr int kGradAWarps = 4;

// Above this the two accumulators do not fit into the registers together: grad_x is then up_kernel's.
constexpr int kGradAMaxUpdateRanks = 32;

// One read of x (rows, in): a_partial (splits, kRanks, padded) of q^T kept∘x; and unless grad_x.data is null,
// grad_x += scale * kept∘(q A), with the same mask. q is (rows, kRanks); lora_A is (padded, kRanks), transposed.
template <class T, int kRanks, bool kAligned, bool kDropout>
__global__ void __launch_bounds__(32 * kGradAWarps, kRanks == 16 ? 3 : 2)
    grad_a_kernel(Rows<const uint16_t> x, const uint16_t* __restrict__ q, const uint16_t* __restrict__ lora_A,
                  int padded, int strips, Dropout dropout, float scale, Rows<uint16_t> grad_x,
                  float* __restrict__ a_partial) {
  const int strip = blockIdx.x % strips, split = blockIdx.x / strips, splits = gridDim.x / strips;
  const int column = (strip * kGradAWarps + threadIdx.x / 32) * kTileColumns;
  if (column >= padded) return;
  const bool update = kRanks <= kGradAMaxUpdateRanks && grad_x.data != nullptr;
  const int64_t seed = kDropout ? *dropout.seed : 0;
  RightOperand<kRanks> operand;
  if (update) operand.load(lora_A, column);

  float total[kRanks / 16][8][4] = {};
  Eight next_x[4], next_grad[4];
  const auto load_next = [&](int64_t turn) {
    const int64_t row = tile_row(x.rows, turn, splits, split);
    load_by_columns<kAligned>(next_x, x, row, column);
    if (update) load_by_columns<kAligned>(next_grad, grad_x, row, column);
  };
  load_next(0);
  for (int64_t turn = 0;; ++turn) {
    const int64_t first_row = tile_row(x.rows, turn, splits, split);
    if (first_row < 0) break;
    Eight tile[4] = {next_x[0], next_x[1], next_x[2], next_x[3]};
    Eight grad[4] = {next_grad[0], next_grad[1], next_grad[2], next_grad[3]};
    load_next(turn + 1);
    RankOperand<kRanks> ranks;
    ranks.load(q, kRanks, first_row, x.rows);
    Kept kept[4];
    if constexpr (kDropout) {
      kept_by_columns(kept, seed, dropout.thresholds, first_row, column);
#pragma unroll
      for (int i = 0; i < 4; ++i) keep(tile[i], kept[i]);
    }
    add_sums_over_rows<T, kRanks>(total, tile, ranks);
    if (update) {
      add_outer_product<T, kRanks, kDropout>(grad, q, first_row, x.rows, operand, scale, kept);
      store_by_columns<kAligned>(grad, grad_x, first_row, column);
    }
  }
  write_sums_over_rows<kRanks>(a_partial + static_cast<int64_t>(split) * kRanks * padded, padded, column, total);
}

// --- the adapter's matrices in and out: any floating type and strides, few bytes

enum class Kind { kFloat, kDouble, kBfloat16, kHalf };

__device__ inline float load_as_float(const void* data, Kind kind, int64_t index) {
  switch (kind) {
    case Kind::kFloat: return static_cast<const float*>(data)[index];
    case Kind::kDouble: return static_cast<float>(static_cast<const double*>(data)[index]);
    case Kind::kBfloat16: return Bfloat16Bits::low(static_cast<const uint16_t*>(data)[index]);
    default: return HalfBits::low(static_cast<const uint16_t*>(data)[index]);
  }
}

__device__ inline void store_as(void* data, Kind kind, int64_t index, float value) {
  switch (kind) {
    case Kind::kFloat: static_cast<float*>(data)[index] = value; break;
    case Kind::kDouble: static_cast<double*>(data)[index] = value; break;
    case Kind::kBfloat16: static_cast<uint16_t*>(data)[index] = Bfloat16Bits::pack(value, 0) & 0xFFFF; break;
    default: static_cast<uint16_t*>(data)[index] = HalfBits::pack(value, 0) & 0xFFFF;
  }
}

// to (to_rows, to_columns), contiguous, = from (rows, columns), and zero beyond.
struct PackJob {
  const void* from;
  Kind kind;
  int64_t rows, columns, row_stride, column_stride;
  uint16_t* to;
  int64_t to_rows, to_columns;

  __host__ __device__ int64_t elements() const { return to_rows * to_columns; }

  template <class T>
  __device__ void run(int64_t index) const {
    const int64_t row = index / to_columns, column = index % to_columns;
    float value = 0;
    if (row < rows && column < columns)
      value = load_as_float(from, kind, row * row_stride + column * column_stride);
    to[index] = static_cast<uint16_t>(T::pack(value, 0));
  }
};

// to (rows, columns; any strides) = scale * sum over the first dimension of from (parts, part_size), whose element
// (row, column) lies at row * from_stride + column. Added in order.
struct ReduceJob {
  const float* from;
  int64_t parts, part_size, from_stride;
  float scale;
  void* to;
  Kind kind;
  int64_t rows, columns, row_stride, column_stride;

  __host__ __device__ int64_t elements() const { return rows * columns; }

  template <class>
  __device__ void run(int64_t index) const {
    const int64_t row = index / columns, column = index % columns;
    const float* at = from + row * from_stride + column;
    float sum = 0;
#pragma unroll 8
    for (int64_t part = 0; part < parts; ++part) sum += at[part * part_size];
    store_as(to, kind, row * row_stride + column * column_stride, scale * sum);
  }
};

// Small jobs of one kind that share a launch, each in whole blocks.
template <class Job>
struct Jobs {
  static constexpr int kMost = 3, kBlock = 256;
  Job job[kMost];
  int count = 0;

  void add(const Job& more) { job[count++] = more; }
  static __host__ __device__ int64_t blocks_of(const Job& one) { return (one.elements() + kBlock - 1) / kBlock; }
  int64_t blocks() const {
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += blocks_of(job[i]);
    return sum;
  }
};

template <class T, class Job>
__global__ void __launch_bounds__(Jobs<Job>::kBlock) jobs_kernel(Jobs<Job> jobs) {
  int64_t block = blockIdx.x;
#pragma unroll
  for (int i = 0; i < Jobs<Job>::kMost; ++i) {
    if (i == jobs.count) return;
    const int64_t blocks = Jobs<Job>::blocks_of(jobs.job[i]);
    const int64_t index = block * Jobs<Job>::kBlock + threadIdx.x;
    if (block >= 0 && index < jobs.job[i].elements()) jobs.job[i].template run<T>(index);
    block -= blocks;
  }
}

}  // namespace sensilora
