// The skinny passes of lora_segments on CUDA, for float, double, bfloat16 and float16.
//
// plan_kernel cuts every adapter's segments into stretches of up to kStretchRows rows. There are at most as many as
// rows / kStretchRows and segments together, so that grids need nothing from the device; blocks without a stretch end
// at once. Three passes then make all that adapters add, each product C = L R tile by tile through shared memory:
//
//   down    h = drop(x) A^T, q = s dY B             a stretch and 64 ranks a block
//   up      y += s h B^T, dx += kept∘(q A)          a stretch and 64 columns
//   outer   dA = q^T drop(x), dB^T = s h^T dY       32 ranks of an adapter, 64 columns and a share of its stretches
//
// An adapter's ranks are its own: nothing is read or written for those that another one has more. 16-bit types go
// through tensor cores, the others have their own arithmetic. Sums over stretches are made in one order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "half_types.cuh"
#include "philox.cuh"
#include "shared_memory.cuh"

namespace sensilora {

constexpr int kStretchRows = 32;
constexpr int kSegmentsColumns = 64;  // of C
constexpr int kSegmentsThreads = 128;
constexpr int kPlanThreads = 1024;

struct Adapter {
  double scaling, keep_scale;
  int32_t first, rank;  // its rows of lora_A and columns of lora_B
  uint32_t threshold;   // of its dropout
  int32_t unused;
};

struct Stretch {
  int64_t first;
  int32_t rows, adapter;
};

// --- which rows belong to which adapter

// The sum of `value` over the lanes up to this one.
__device__ inline int sum_up_to_lane(int value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFF, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += before;
  }
  return value;
}

// The segments of a batch: rows offsets[i] to offsets[i + 1] take adapter adapters[i].
struct Segments {
  const int64_t *offsets, *adapters;
  int64_t count, rows;

  __device__ int64_t offset(int64_t i) const {
    const int64_t offset = offsets[i];
    return offset < 0 ? 0 : offset < rows ? offset : rows;
  }
  // Stretches of segment i if it is `adapter`'s, else 0.
  __device__ int stretches(int64_t i, int64_t adapter) const {
    if (i >= count || adapters[i] != adapter) return 0;
    const int64_t length = offset(i + 1) - offset(i);
    return length <= 0 ? 0 : static_cast<int>((length + kStretchRows - 1) / kStretchRows);
  }
};

// The stretches of adapter a, in the order of its rows: from starts[a] up to starts[a + 1], and empty ones behind the
// last adapter's. One block; a warp goes through the segments of one adapter after the other.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(Segments segments, const Adapter* __restrict__ table, int adapters, int64_t* __restrict__ starts,
                Stretch* __restrict__ stretches, int64_t most) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kWarps = kPlanThreads / 32;
  for (int a = warp; a < adapters; a += kWarps) {
    int64_t total = 0;
    for (int64_t first = 0; first < segments.count && table[a].rank > 0; first += 32)
      total += __shfl_sync(0xFFFFFFFF, sum_up_to_lane(segments.stretches(first + lane, a)), 31);
    if (lane == 0) starts[a + 1] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    starts[0] = 0;
    // Segments that are not in ascending order could make too many.
    for (int a = 0; a < adapters; ++a) {
      const int64_t end = starts[a] + starts[a + 1];
      starts[a + 1] = end < most ? end : most;
    }
  }
  __syncthreads();
  for (int a = warp; a < adapters; a += kWarps) {
    int64_t at = starts[a];
    const int64_t end = starts[a + 1];
    for (int64_t first = 0; first < segments.count && at < end; first += 32) {
      const int64_t i = first + lane;
      const int own = segments.stretches(i, a), up_to = sum_up_to_lane(own);
      const int64_t begin = own > 0 ? segments.offset(i) : 0, stop = own > 0 ? segments.offset(i + 1) : 0;
      for (int n = 0; n < own && at + up_to - own + n < end; ++n) {
        const int64_t row = begin + int64_t{n} * kStretchRows;
        const int64_t rows = stop - row < kStretchRows ? stop - row : kStretchRows;
        stretches[at + up_to - own + n] = {row, static_cast<int32_t>(rows), a};
      }
      at += __shfl_sync(0xFFFFFFFF, up_to, 31);
    }
  }
  for (int64_t i = starts[adapters] + threadIdx.x; i < most; i += kPlanThreads) stretches[i] = {0, 0, 0};
}

// --- types

// T is float, double, Bfloat16Bits or HalfBits; Element is what lies in memory, Sum what is summed in.
template <class T>
struct Numbers {
  using Element = uint16_t;
  using Sum = float;
  static __device__ Sum read(Element element) { return T::low(element); }
  static __device__ Element make(Sum value) { return static_cast<Element>(T::pack(value, 0) & 0xFFFF); }
};

template <class F>
struct WideNumbers {
  using Element = F;
  using Sum = F;
  static __device__ F read(F element) { return element; }
  static __device__ F make(F value) { return value; }
};
template <>
struct Numbers<float> : WideNumbers<float> {};
template <>
struct Numbers<double> : WideNumbers<double> {};

// A matrix; element (row, column) lies at row * row_stride + column * column_stride.
template <class Element>
struct Strided {
  Element* data;
  int64_t row_stride, column_stride;

  __device__ Element* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// Whether every eight elements of a row, from its first on, can be moved 16 bytes at a time.
template <class Element>
__device__ inline bool sixteen_bytes_serve(const Strided<Element>& matrix) {
  return matrix.column_stride == 1 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.row_stride * static_cast<int64_t>(sizeof(Element)) % 16 == 0;
}

// --- tiles

template <class Element, int kRows, int kColumns>
struct SharedTile {
  // Rows are 16 bytes longer than they hold, so that one column of eight rows lies in different banks.
  static constexpr int kStride = kColumns + 16 / sizeof(Element);
  alignas(16) Element row[kRows][kStride];
};

// Eight neighbouring elements, zero to begin with.
template <class Element>
struct alignas(16) EightElements {
  Element value[8] = {};

  __device__ Element get(int i) const { return value[i]; }
  __device__ void set(int i, Element element) { value[i] = element; }
  __device__ void keep(const Kept& kept) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!(kept.pair[i / 2] >> (16 * (i % 2)) & 1)) value[i] = 0;
  }
};
template <>
struct alignas(16) EightElements<uint16_t> {
  uint32_t pair[4] = {};

  __device__ uint16_t get(int i) const { return static_cast<uint16_t>(pair[i / 2] >> (16 * (i % 2))); }
  __device__ void set(int i, uint16_t element) {
    const uint32_t other = pair[i / 2] & (i % 2 ? 0x0000FFFFu : 0xFFFF0000u);
    pair[i / 2] = other | static_cast<uint32_t>(element) << (16 * (i % 2));
  }
  __device__ void keep(const Kept& kept) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] &= kept.pair[i];
  }
};

// A tile on its way from memory to shared memory: threads have eight neighbouring elements of a row each.
template <class Element, int kRows, int kColumns>
struct MovingTile {
  static constexpr int kEights = kColumns / 8, kLoads = kRows * kEights / kSegmentsThreads;
  static_assert(kRows * kEights % kSegmentsThreads == 0 && kColumns % 32 == 0, "");
  EightElements<Element> part[kLoads];

  static __device__ int row(int i) { return (i * kSegmentsThreads + threadIdx.x) / kEights; }
  static __device__ int column(int i) { return (i * kSegmentsThreads + threadIdx.x) % kEights * 8; }

  // From a matrix of `rows` rows and `columns` columns, zero beyond them.
  __device__ void load(const Strided<const Element>& from, int64_t rows, int64_t columns) {
    const bool whole = sixteen_bytes_serve(from);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t remaining = row(i) < rows ? columns - column(i) : 0;
      const Element* at = from.at(row(i), column(i));
      if (whole && remaining >= 8) {
        part[i] = *reinterpret_cast<const EightElements<Element>*>(at);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) part[i].set(e, e < remaining ? at[e * from.column_stride] : Element{0});
      }
    }
  }

  // Zeros in place of what dropout does not keep, where the tile begins at this row and column (a multiple of 32).
  __device__ void drop(int64_t seed, uint32_t thresholds, int64_t first_row, int64_t first_column) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      part[i].keep(kept_columns<1>(seed, thresholds, first_row + row(i),
                                   static_cast<uint32_t>((first_column + column(i)) / 8)));
  }

  __device__ void store(SharedTile<Element, kRows, kColumns>& to) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      *reinterpret_cast<EightElements<Element>*>(&to.row[row(i)][column(i)]) = part[i];
  }
};

// C (32, 64) += L (32, depth) R (depth, 64); the block's threads have C in their registers. L lies as it is in shared
// memory or, if kLeftByK, transposed, a row an index that is summed over; kRightByK says that R lies as it is.
template <class T>
class Products {
 public:
  template <bool kLeftByK, bool kRightByK, class Left, class Right>
  __device__ void add(const Left& left, const Right& right, int depth, int64_t columns) {
    const int lane = threadIdx.x % 32, low = lane % 8 + lane / 8 % 2 * 8, high = lane % 8 + lane / 16 * 8;
    const int to_low = lane / 8 % 2 * 8, to_high = lane / 16 * 8;
    if (first_column() >= columns) return;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[4];
      if constexpr (kLeftByK)
        load_blocks<true>(a, &left.row[k + high][first_row() + to_low]);
      else
        load_blocks<false>(a, &left.row[first_row() + low][k + to_high]);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        if constexpr (kRightByK)
          load_blocks<true>(b, &right.row[k + low][first_column() + 8 * n + to_high]);
        else
          load_blocks<false>(b, &right.row[first_column() + 8 * n + high][k + to_low]);
        T::mma(acc_[n], a[0], a[1], a[2], a[3], b[0], b[1]);
        T::mma(acc_[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  }

  template <class Tile>
  __device__ void store(Tile& c) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c.row[first_row() + g + e / 2 * 8][first_column() + 8 * n + 2 * t + e % 2] = acc_[n][e];
  }

 private:
  // A warp has 16 rows and 32 columns.
  static __device__ int first_row() { return threadIdx.x / 64 * 16; }
  static __device__ int first_column() { return threadIdx.x / 32 % 2 * 32; }

  float acc_[4][4] = {};
};

template <class F>
class WideProducts {
 public:
  template <bool kLeftByK, bool kRightByK, class Left, class Right>
  __device__ void add(const Left& left, const Right& right, int depth, int64_t columns) {
    const int row = threadIdx.x / 4, first = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      const F value = kLeftByK ? left.row[k][row] : left.row[row][k];
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (4 * i < columns) acc_[i] += value * (kRightByK ? right.row[k][4 * i + first] : right.row[4 * i + first][k]);
    }
  }

  template <class Tile>
  __device__ void store(Tile& c) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) c.row[threadIdx.x / 4][4 * i + threadIdx.x % 4] = acc_[i];
  }

 private:
  F acc_[16] = {};
};
template <>
class Products<float> : public WideProducts<float> {};
template <>
class Products<double> : public WideProducts<double> {};

// Indices summed over at once: lines of 128 bytes, or what fits into shared memory.
template <class T>
constexpr int kSegmentsDepth = std::is_same_v<typename Numbers<T>::Element, uint16_t> ? 64 : 32;

// What a pass takes of the batch and of the adapters.
struct SegmentsPlan {
  const Adapter* table;
  const Stretch* stretches;
  const int64_t* starts;
  const int64_t* seed;  // null where nothing is dropped in this pass
  bool scaled;          // by the adapters' scaling, else by what dropout makes up for

  __device__ double factor(const Adapter& adapter) const { return scaled ? adapter.scaling : adapter.keep_scale; }
  __device__ bool drops(const Adapter& adapter) const { return seed != nullptr && adapter.threshold > 0; }
};

__device__ inline uint32_t dropout_thresholds(const Adapter& adapter) { return pair_of_thresholds(adapter.threshold); }

// --- the passes

// h (rows, ranks) = factor * drop(x) matrix^T with each row's own adapter; x (rows, in), matrix (stack, in). Columns
// of h from the row's rank on are left as they are.
template <class T>
__global__ void __launch_bounds__(kSegmentsThreads, 3)
    segments_down_kernel(SegmentsPlan plan, Strided<const typename Numbers<T>::Element> x, int64_t in,
                         Strided<const typename Numbers<T>::Element> matrix, int chunks,
                         Strided<typename Numbers<T>::Element> h) {
  using Element = typename Numbers<T>::Element;
  using Sum = typename Numbers<T>::Sum;
  constexpr int kDepth = kSegmentsDepth<T>;
  __shared__ SharedTile<Element, kStretchRows, kDepth> left;
  __shared__ SharedTile<Element, kSegmentsColumns, kDepth> right;
  __shared__ SharedTile<Sum, kStretchRows, kSegmentsColumns> c;

  const Stretch stretch = plan.stretches[blockIdx.x / chunks];
  if (stretch.rows == 0) return;
  const Adapter adapter = plan.table[stretch.adapter];
  const int first_rank = blockIdx.x % chunks * kSegmentsColumns, ranks = adapter.rank - first_rank;
  if (ranks <= 0) return;
  const bool drops = plan.drops(adapter);
  const int64_t seed = drops ? *plan.seed : 0;

  // Two steps ahead: a batch has few stretches for a device's blocks, so each of them has to have much on its way.
  constexpr int kAhead = 2;
  MovingTile<Element, kStretchRows, kDepth> next_left[kAhead];
  MovingTile<Element, kSegmentsColumns, kDepth> next_right[kAhead];
  const auto load = [&](int i, int64_t k) {
    next_left[i].load({x.at(stretch.first, k), x.row_stride, x.column_stride}, stretch.rows, in - k);
    next_right[i].load({matrix.at(adapter.first + first_rank, k), matrix.row_stride, matrix.column_stride}, ranks,
                       in - k);
  };
  Products<T> products;
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (i * kDepth < in) load(i, i * kDepth);
  for (int64_t first = 0; first < in; first += kAhead * kDepth) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t k = first + i * kDepth;
      if (k >= in) break;
      if (drops) next_left[i].drop(seed, dropout_thresholds(adapter), stretch.first, k);
      __syncthreads();
      next_left[i].store(left);
      next_right[i].store(right);
      __syncthreads();
      if (k + kAhead * kDepth < in) load(i, k + kAhead * kDepth);
      products.template add<false, false>(left, right, static_cast<int>(in - k < kDepth ? in - k : kDepth), ranks);
    }
  }

  products.store(c);
  __syncthreads();
  const auto factor = static_cast<Sum>(plan.factor(adapter));
  for (int i = threadIdx.x; i < kStretchRows * kSegmentsColumns; i += kSegmentsThreads) {
    const int row = i / kSegmentsColumns, rank = i % kSegmentsColumns;
    if (row < stretch.rows && rank < ranks)
      *h.at(stretch.first + row, first_rank + rank) = Numbers<T>::make(factor * c.row[row][rank]);
  }
}

// out (rows, columns) += factor * kept∘(h matrix) with each row's own adapter; h (rows, ranks), matrix (stack,
// columns).
template <class T>
__global__ void __launch_bounds__(kSegmentsThreads)
    segments_up_kernel(SegmentsPlan plan, Strided<const typename Numbers<T>::Element> h,
                       Strided<const typename Numbers<T>::Element> matrix, int strips,
                       Strided<typename Numbers<T>::Element> out, int64_t columns) {
  using Element = typename Numbers<T>::Element;
  using Sum = typename Numbers<T>::Sum;
  constexpr int kDepth = kSegmentsDepth<T>;
  __shared__ SharedTile<Element, kStretchRows, kDepth> left;
  __shared__ SharedTile<Element, kDepth, kSegmentsColumns> right;
  __shared__ SharedTile<Sum, kStretchRows, kSegmentsColumns> c;

  const Stretch stretch = plan.stretches[blockIdx.x / strips];
  if (stretch.rows == 0) return;
  const Adapter adapter = plan.table[stretch.adapter];
  const int64_t column = int64_t{blockIdx.x % strips} * kSegmentsColumns;
  using Moving = MovingTile<Element, kStretchRows, kSegmentsColumns>;
  Moving tile;
  tile.load({out.at(stretch.first, column), out.row_stride, out.column_stride}, stretch.rows, columns - column);

  Products<T> products;
  for (int rank = 0; rank < adapter.rank; rank += kDepth) {
    const int ranks = adapter.rank - rank;
    MovingTile<Element, kStretchRows, kDepth> next_left;
    MovingTile<Element, kDepth, kSegmentsColumns> next_right;
    next_left.load({h.at(stretch.first, rank), h.row_stride, h.column_stride}, stretch.rows, ranks);
    next_right.load({matrix.at(adapter.first + rank, column), matrix.row_stride, matrix.column_stride}, ranks,
                    columns - column);
    __syncthreads();
    next_left.store(left);
    next_right.store(right);
    __syncthreads();
    products.template add<false, true>(left, right, ranks < kDepth ? ranks : kDepth, columns - column);
  }

  products.store(c);
  __syncthreads();
  const auto factor = static_cast<Sum>(plan.factor(adapter));
  const bool drops = plan.drops(adapter), whole = sixteen_bytes_serve(out);
  const int64_t seed = drops ? *plan.seed : 0;
#pragma unroll
  for (int i = 0; i < Moving::kLoads; ++i) {
    const int row = Moving::row(i);
    const int64_t first = column + Moving::column(i), remaining = row < stretch.rows ? columns - first : 0;
    Kept kept = {~0u, ~0u, ~0u, ~0u};
    if (drops)
      kept = kept_columns<1>(seed, dropout_thresholds(adapter), stretch.first + row, static_cast<uint32_t>(first / 8));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const Sum update = factor * c.row[row][Moving::column(i) + e];
      const bool keep = kept.pair[e / 2] >> (16 * (e % 2)) & 1;
      const Sum before = Numbers<T>::read(tile.part[i].get(e));
      tile.part[i].set(e, Numbers<T>::make(before + (keep ? update : Sum{0})));
    }
    Element* to = out.at(stretch.first + row, first);
    if (whole && remaining >= 8) {
      *reinterpret_cast<EightElements<Element>*>(to) = tile.part[i];
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < remaining) to[e * out.column_stride] = tile.part[i].get(e);
    }
  }
}

// partial (splits, stack, columns) = factor * h^T drop(x) over every adapter's own rows, a split's share of them;
// h (rows, ranks), x (rows, columns). A block has kStretchRows ranks of one adapter.
template <class T>
__global__ void __launch_bounds__(kSegmentsThreads)
    segments_outer_kernel(SegmentsPlan plan, Strided<const typename Numbers<T>::Element> h,
                          Strided<const typename Numbers<T>::Element> x, int64_t columns, int strips, int splits,
                          int chunks, int64_t stack, typename Numbers<T>::Sum* __restrict__ partial) {
  using Element = typename Numbers<T>::Element;
  using Sum = typename Numbers<T>::Sum;
  __shared__ SharedTile<Element, kStretchRows, kStretchRows> left;
  __shared__ SharedTile<Element, kStretchRows, kSegmentsColumns> right;
  __shared__ SharedTile<Sum, kStretchRows, kSegmentsColumns> c;

  int64_t index = blockIdx.x;
  const int64_t column = index % strips * kSegmentsColumns;
  index /= strips;
  const int64_t split = index % splits;
  index /= splits;
  const int first_rank = static_cast<int>(index % chunks) * kStretchRows;
  const int64_t owner = index / chunks;
  const Adapter adapter = plan.table[owner];
  const int ranks = adapter.rank - first_rank;
  if (ranks <= 0) return;
  const bool drops = plan.drops(adapter);
  const int64_t seed = drops ? *plan.seed : 0, end = plan.starts[owner + 1];

  MovingTile<Element, kStretchRows, kStretchRows> next_left;
  MovingTile<Element, kStretchRows, kSegmentsColumns> next_right;
  Stretch next = {};
  const auto load = [&](int64_t at) {
    next = plan.stretches[at];
    next_left.load({h.at(next.first, first_rank), h.row_stride, h.column_stride}, next.rows, ranks);
    next_right.load({x.at(next.first, column), x.row_stride, x.column_stride}, next.rows, columns - column);
  };
  Products<T> products;
  int64_t at = plan.starts[owner] + split;
  if (at < end) load(at);
  for (; at < end; at += splits) {
    if (drops) next_right.drop(seed, dropout_thresholds(adapter), next.first, column);
    __syncthreads();
    next_left.store(left);
    next_right.store(right);
    __syncthreads();
    const int rows = next.rows;
    if (at + splits < end) load(at + splits);
    products.template add<true, true>(left, right, rows, columns - column);
  }

  products.store(c);
  __syncthreads();
  const auto factor = static_cast<Sum>(plan.factor(adapter));
  for (int i = threadIdx.x; i < kStretchRows * kSegmentsColumns; i += kSegmentsThreads) {
    const int rank = i / kSegmentsColumns, place = i % kSegmentsColumns;
    if (rank < ranks && column + place < columns)
      partial[(split * stack + adapter.first + first_rank + rank) * columns + column + place] =
          factor * c.row[rank][place];
  }
}

// to (stack, columns) = the sum of partial (splits, stack, columns) over the splits, in order.
template <class T>
__global__ void __launch_bounds__(kSegmentsThreads)
    segments_sum_kernel(const typename Numbers<T>::Sum* __restrict__ partial, int64_t splits, int64_t stack,
                        int64_t columns, Strided<typename Numbers<T>::Element> to) {
  const int64_t index = int64_t{blockIdx.x} * kSegmentsThreads + threadIdx.x;
  if (index >= stack * columns) return;
  typename Numbers<T>::Sum sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * stack * columns + index];
  *to.at(index / columns, index % columns) = Numbers<T>::make(sum);
}

}  // namespace sensilora
