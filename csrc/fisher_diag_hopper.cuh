// fisher_diag per sequence on Hopper: sum over n of (G_n^T X_n)^2, of 16-bit rows.
//
// One warpgroup copies, two multiply. A block makes a tile of the result, 128 rows by 64 kColumnTiles columns, over the
// sequences of one unit of work: their rows come in steps of 64 by the copy engine, kStages steps ahead, G's tile for
// this block and X's for both blocks of the cluster, each of which fetches half of it. A step may begin at any row;
// what it reads behind the end of a sequence is left out 16 rows at a time, and what remains of it is set to zero in
// G's tile. Where a sequence ends, the sums are squared into a second set of registers.
//
// Blocks stay for many tiles, which all take the same time. The tiles that would not fill the last wave are divided by
// sequences: their partial sums are added by a second launch, in order.
//
// A tensor core cuts off what it adds to a sum, so that long sums of one sign fall short, their squares by 1.05e-5 after
// 1024 rows. kLong leaves kLongSteps steps to it and sums those sums in fp32 proper, in a third set of registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hopper.cuh"

namespace sensilora {

constexpr int kHopperThreads = 384;
constexpr int kHopperCluster = 2;
constexpr int kHopperTokens = 64;
constexpr int kLongSteps = 8;

template <class Products, int kColumnTiles_, bool kLong_>
struct HopperTile {
  using Multiply = Products;
  static constexpr bool kLong = kLong_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRows = 128, kColumns = 64 * kColumnTiles;
  static constexpr int kTileBytes = 64 * kHopperTokens * 2;  // of 64 columns
  static constexpr int kStageBytes = (kRows / 64 + kColumnTiles) * kTileBytes;
  static constexpr int kStages = 200 * 1024 / kStageBytes;
  static constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + 16);
  static constexpr int kSums = kColumns / 2;  // of a thread
};

// Into how many splits each of the tiles goes that do not fill the last wave: where all tiles of a wave take 1, the
// fewest that bring it and what a split costs near the least.
inline int hopper_splits(int64_t tiles, int64_t clusters, int64_t sequences) {
  constexpr double kSplitCost = 0.02;
  const int64_t rest = tiles % clusters;
  int best = 1;
  double least = 1.0;
  for (int splits = 2; rest > 0 && splits <= 16 && splits <= sequences; ++splits) {
    const int64_t waves = (rest * splits + clusters - 1) / clusters;
    const double cost = static_cast<double>(waves) / splits + kSplitCost * splits;
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

// The first sequence of each split and, last, of none: where the steps before it come nearest to its share. starts has
// the first row of every sequence and the end of the last one.
inline std::vector<int64_t> hopper_bounds(const std::vector<int64_t>& starts, int splits) {
  std::vector<int64_t> steps{0}, bounds{0};
  for (size_t n = 1; n < starts.size(); ++n)
    steps.push_back(steps.back() + (starts[n] - starts[n - 1] + kHopperTokens - 1) / kHopperTokens);
  for (int split = 1; split < splits; ++split) {
    const int64_t share = steps.back() * split / splits;
    auto next = std::lower_bound(steps.begin(), steps.end(), share);
    if (next != steps.begin() && share - next[-1] < *next - share) --next;
    bounds.push_back(std::max<int64_t>(bounds.back(), next - steps.begin()));
  }
  bounds.push_back(static_cast<int64_t>(starts.size()) - 1);
  return bounds;
}

// What is to be done: the tiles of the result, the first `whole` of them over all sequences, those behind them over the
// sequences of each split in turn, from bounds[split] to bounds[split + 1].
struct HopperWork {
  const int64_t* starts;  // the first row of every sequence, and the end of the last one
  const int64_t* bounds;
  int sequences, row_tiles, column_tiles, whole, splits, units;
};

struct HopperUnit {
  int row_tile, column_tile, first, last, part;  // part: of the partial sums, or -1
};

// Which tile and sequences a unit has. Groups of kGroup row tiles share their columns while these are in L2.
__device__ inline HopperUnit hopper_unit(const HopperWork& work, int unit) {
  constexpr int kGroup = 4;
  const int part = work.splits > 1 ? unit - work.whole : -1;
  const int tile = part < 0 ? unit : work.whole + part / work.splits;
  const int group = tile / (kGroup * work.column_tiles), first = group * kGroup;
  const int rows = min(kGroup, work.row_tiles - first), within = tile - first * work.column_tiles;
  HopperUnit found{first + within % rows, within / rows, 0, work.sequences, part < 0 ? -1 : part};
  if (part >= 0) {
    found.first = static_cast<int>(work.bounds[part % work.splits]);
    found.last = static_cast<int>(work.bounds[part % work.splits + 1]);
  }
  return found;
}

// The result, written or added to.
struct HopperOut {
  float* data;
  int rows, columns;
  bool accumulate;
};

// Where in the result the sums i and i + 1 (even i) of a thread of a warpgroup belong; null outside of it.
template <class Tile>
__device__ inline float2* hopper_place(const HopperOut& out, const HopperUnit& unit, int rank, int warpgroup, int i) {
  const int thread = threadIdx.x % 128;
  const int row = (unit.row_tile * kHopperCluster + rank) * Tile::kRows + 64 * warpgroup + thread / 32 * 16 +
                  thread % 32 / 4 + i % 4 / 2 * 8;
  const int column = unit.column_tile * Tile::kColumns + thread % 4 * 2 + i / 4 * 8;
  if (row >= out.rows || column >= out.columns) return nullptr;
  return reinterpret_cast<float2*>(out.data + static_cast<int64_t>(row) * out.columns + column);
}

// Where the partial sums of a warpgroup begin: the first of each of its threads, then the second, and so on.
template <class Tile>
__device__ inline int64_t hopper_part(int part, int rank, int warpgroup) {
  return ((static_cast<int64_t>(part) * kHopperCluster + rank) * 2 + warpgroup) * 128 * Tile::kSums;
}

// A place in the ring of stages, and the parity of the turn around it.
template <int kStages>
struct HopperStage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

template <class Tile>
__device__ inline void hopper_copy(const CUtensorMap& g, const CUtensorMap& x, const HopperWork& work,
                                   uint32_t stages, uint32_t full, uint32_t empty) {
  const int rank = cluster_rank();
  HopperStage<Tile::kStages> stage;
  for (int unit = blockIdx.x / kHopperCluster; unit < work.units; unit += gridDim.x / kHopperCluster) {
    const HopperUnit here = hopper_unit(work, unit);
    const int row = (here.row_tile * kHopperCluster + rank) * Tile::kRows, column = here.column_tile * Tile::kColumns;
    auto token = static_cast<int>(work.starts[here.first]);
    for (int n = here.first; n < here.last; ++n) {
      const auto end = static_cast<int>(work.starts[n + 1]);
      for (; token < end; token += kHopperTokens) {
        const uint32_t tile = stages + stage.index * Tile::kStageBytes, ready = full + 8 * stage.index;
        barrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
        barrier_expect(ready, Tile::kStageBytes);
#pragma unroll
        for (int i = 0; i < Tile::kRows / 64; ++i)
          copy_tile(tile + i * Tile::kTileBytes, g, row + 64 * i, token, ready);
        constexpr int kHalf = kHopperTokens / kHopperCluster;
        const uint32_t half = tile + Tile::kRows / 64 * Tile::kTileBytes + rank * (Tile::kTileBytes / kHopperCluster);
#pragma unroll
        for (int i = 0; i < Tile::kColumnTiles; ++i)
          copy_tile_to((1 << kHopperCluster) - 1, half + i * Tile::kTileBytes, x, column + 64 * i, token + rank * kHalf,
                       ready);
        stage.next();
      }
      token = end;
    }
  }
}

// Rows from `rows` on up to the next multiple of 16 of a warpgroup's tile, to zero.
__device__ inline void hopper_clear(uint32_t tile, int rows, int warpgroup) {
  const int row = rows + threadIdx.x % 128 / 8;
  if (row < (rows + 15) / 16 * 16) clear_shared(tile + row * 128 + threadIdx.x % 8 * 16);
  shared_to_async();
  warpgroup_sync(warpgroup + 1);
}

template <class Tile>
__device__ inline void hopper_multiply(const HopperWork& work, uint32_t stages, uint32_t full, uint32_t empty,
                                       const HopperOut& out, float* __restrict__ partial) {
  constexpr int kSums = Tile::kSums;
  const int warpgroup = threadIdx.x / 128 - 1, rank = cluster_rank(), thread = threadIdx.x % 128;
  const uint32_t my_rows = stages + warpgroup * Tile::kTileBytes;
  const uint64_t a = operand_descriptor(my_rows, Tile::kTileBytes);
  const uint64_t b = operand_descriptor(stages + Tile::kRows / 64 * Tile::kTileBytes, Tile::kTileBytes);
  HopperStage<Tile::kStages> stage;
  // The first threads tell one block each that a stage may be written again.
  const auto release = [&](int index) {
    if (thread < kHopperCluster) barrier_arrive(empty + 8 * index, thread);
  };
  float sums[kSums] = {}, total[kSums], gradient[Tile::kLong ? kSums : 1];
  for (int unit = blockIdx.x / kHopperCluster; unit < work.units; unit += gridDim.x / kHopperCluster) {
    const HopperUnit here = hopper_unit(work, unit);
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
    auto token = static_cast<int>(work.starts[here.first]);
    auto end = static_cast<int>(work.starts[min(here.first + 1, work.sequences)]);
    for (int n = here.first; n < here.last; ++n) {
      const auto next = static_cast<int>(work.starts[min(n + 2, work.sequences)]);
      int previous = -1, steps = 0;
      if constexpr (Tile::kLong) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) gradient[i] = 0.0f;
      }
      for (; token < end; token += kHopperTokens) {
        const int rows = end - token;
        barrier_wait(full + 8 * stage.index, stage.parity);
        if (rows < kHopperTokens && rows % 16 != 0)
          hopper_clear(my_rows + stage.index * Tile::kStageBytes, rows, warpgroup);
        const uint64_t offset = stage.index * (Tile::kStageBytes >> 4);
        if (rows >= kHopperTokens) {
          products_begin();
#pragma unroll
          for (int k = 0; k < kHopperTokens / 16; ++k)
            Tile::Multiply::multiply(sums, a + offset + 128 * k, b + offset + 128 * k, steps + k);
          products_commit();
        } else {
          for (int k = 0; 16 * k < rows; ++k) {
            products_begin();
            Tile::Multiply::multiply(sums, a + offset + 128 * k, b + offset + 128 * k, steps + k);
          }
          products_commit();
        }
        if (previous >= 0) {
          products_wait<1>();
          release(previous);
        }
        previous = stage.index;
        stage.next();
        ++steps;
        if constexpr (Tile::kLong) {
          if (steps == kLongSteps && token + kHopperTokens < end) {
            products_wait<0>();
            products_done(sums);
            release(previous);
#pragma unroll
            for (int i = 0; i < kSums; ++i) gradient[i] += sums[i];
            previous = -1, steps = 0;
          }
        }
      }
      products_wait<0>();
      products_done(sums);
      release(previous);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float value = Tile::kLong ? gradient[i] + sums[i] : sums[i];
        total[i] += value * value;
      }
      token = end;
      end = next;
    }
    if (here.part >= 0) {
      float* to = partial + hopper_part<Tile>(here.part, rank, warpgroup) + thread;
#pragma unroll
      for (int i = 0; i < kSums; ++i) to[i * 128] = total[i];
    } else {
      // Loads come before the stores, behind which the compiler would leave them, one wait after another; as many at
      // once as there are registers for.
      if (out.accumulate) {
        constexpr int kAtOnce = 16;  // sums, of those a thread has
        static_assert(kSums % kAtOnce == 0, "");
#pragma unroll
        for (int first = 0; first < kSums; first += kAtOnce) {
          float2 before[kAtOnce / 2];
#pragma unroll
          for (int i = 0; i < kAtOnce; i += 2) {
            const float2* at = hopper_place<Tile>(out, here, rank, warpgroup, first + i);
            before[i / 2] = at != nullptr ? *at : float2{0.0f, 0.0f};
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; i += 2) {
            total[first + i] += before[i / 2].x;
            total[first + i + 1] += before[i / 2].y;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; i += 2)
        if (float2* at = hopper_place<Tile>(out, here, rank, warpgroup, i)) *at = {total[i], total[i + 1]};
    }
  }
}

// out = or += the sum of squares; blocks of kHopperThreads threads in clusters of kHopperCluster, as many as are on the
// device at once. partial holds the sums of every split.
template <class Tile>
__global__ void __launch_bounds__(kHopperThreads, 1)
    fisher_diag_hopper_kernel(const __grid_constant__ CUtensorMap g, const __grid_constant__ CUtensorMap x,
                              const __grid_constant__ HopperWork work, const __grid_constant__ HopperOut out,
                              float* __restrict__ partial) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // The swizzle's pattern repeats every 1024 bytes.
  const uint32_t stages = (dynamic_shared() + 1023) / 1024 * 1024;
  const uint32_t full = stages + Tile::kStages * Tile::kStageBytes, empty = full + 8 * Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2 * kHopperCluster);
    }
    barrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) hopper_copy<Tile>(g, x, work, stages, full, empty);
  } else {
    registers_up<232>();
    hopper_multiply<Tile>(work, stages, full, empty, out, partial);
  }
  // A block's shared memory must be there until the other one has arrived at its barriers for the last time.
  cluster_sync();
#else
  // Whoever runs this was given other code than that for 9.0a, and would find the result as it was.
  asm volatile("trap;");
#endif
}

// The tiles that were divided: out = or += the sum of their splits, in order. A block of 128 threads has two of the
// sums of each thread of a warpgroup.
template <class Tile>
__global__ void __launch_bounds__(128)
    fisher_diag_hopper_sum_kernel(const float* __restrict__ partial, HopperWork work, HopperOut out) {
  constexpr int kPairs = Tile::kSums / 2;
  const int i = 2 * (blockIdx.x % kPairs), block = blockIdx.x / kPairs;
  const int warpgroup = block % 2, rank = block / 2 % kHopperCluster;
  const int part = block / (2 * kHopperCluster) * work.splits;
  float2* to = hopper_place<Tile>(out, hopper_unit(work, work.whole + part), rank, warpgroup, i);
  if (to == nullptr) return;
  float2 sum = {0.0f, 0.0f};
  for (int split = 0; split < work.splits; ++split) {
    const float* from = partial + hopper_part<Tile>(part + split, rank, warpgroup) + threadIdx.x;
    sum.x += from[i * 128], sum.y += from[(i + 1) * 128];
  }
  if (out.accumulate) sum.x += to->x, sum.y += to->y;
  *to = sum;
}

}  // namespace sensilora
