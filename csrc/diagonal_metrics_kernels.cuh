// Trace, mean of the largest values and effective rank of many non-negative vectors, exactly and without sorting: a
// radix select on the bit patterns of floats, which are ordered as non-negative floats are. Three passes read the
// values, each followed by a small kernel that finds the bins which the k-th value (kth) and the crossing of
// alpha * trace (crossing) fall into:
//
//   exponents   count and sum by the 8 bits of the exponent
//   digits      inside those two exponents, count and sum by the next 11 bits
//   tails       inside those two digits, count by the last 12 bits: bins of equal values
//
// Values in one exponent are integers of one unit, so their sums are exact in 64 bits. Sums over exponents are exact in
// fixed point (Wide). Integers add up to the same in any order, so results do not depend on timing.
//
// The exponents of real diagonals are few, and atomic additions to one address wait for one another. So each lane has a
// table of exponents of its own, in a bank of shared memory of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half_types.cuh"

// tests/native/cuda_on_cpu.h has its own.
#ifndef SENSILORA_DYNAMIC_SHARED
#define SENSILORA_DYNAMIC_SHARED(name) extern __shared__ uint32_t name[]
#endif

namespace sensilora {
namespace metrics {

constexpr int kThreads = 512;
constexpr int kThreadValues = 16;
constexpr int kChunk = kThreads * kThreadValues;  // values a block reads at once

constexpr int kExponents = 256, kDigits = 2048, kTails = 4096;
constexpr int kFractionBits = 23, kTailBits = 12;
constexpr uint32_t kSign = 0x80000000u, kImplicit = 1u << kFractionBits, kInfinity = 255u << kFractionBits;

// --- exact sums

// A non-negative multiple of 2^-149, the unit of subnormal floats; 2^32 of the largest floats fit.
struct Wide {
  static constexpr int kLimbs = 10;
  uint32_t limb[kLimbs];  // the lowest first
};

// The limb with index `limb` of value * 2^shift.
__host__ __device__ inline uint32_t limb_of(uint64_t value, int shift, int limb) {
  const int drop = 32 * limb - shift;
  if (drop >= 64 || drop <= -32) return 0;
  return static_cast<uint32_t>(drop >= 0 ? value >> drop : value << -drop);
}

__host__ __device__ inline bool less(const Wide& a, const Wide& b) {
  bool result = false;
  for (int j = 0; j < Wide::kLimbs; ++j) result = a.limb[j] != b.limb[j] ? a.limb[j] < b.limb[j] : result;
  return result;
}

__host__ __device__ inline void add(Wide& sum, uint64_t value, int shift) {
  uint64_t carry = 0;
  for (int j = 0; j < Wide::kLimbs; ++j) {
    carry += uint64_t{sum.limb[j]} + limb_of(value, shift, j);
    sum.limb[j] = static_cast<uint32_t>(carry);
    carry >>= 32;
  }
}

// ceil((a - b) / 2^shift) for a >= b, where it fits 64 bits.
__host__ __device__ inline uint64_t difference(const Wide& a, const Wide& b, int shift) {
  uint64_t result = 0, borrow = 0;
  bool rest = false;
  for (int j = 0; j < Wide::kLimbs; ++j) {
    const uint64_t wide = uint64_t{a.limb[j]} - b.limb[j] - borrow;
    const auto limb = static_cast<uint32_t>(wide);
    borrow = wide >> 63;
    const int lift = 32 * j - shift;
    if (lift >= 64) continue;
    if (lift >= 0) {
      result |= uint64_t{limb} << lift;
    } else if (lift > -32) {
      result |= limb >> -lift;
      rest |= (limb & ((1u << -lift) - 1)) != 0;
    } else {
      rest |= limb != 0;
    }
  }
  return result + rest;
}

// The nearest double, ties to even.
__host__ __device__ inline double to_double(const Wide& sum) {
  const auto limb = [&](int j) { return j >= 0 ? uint64_t{sum.limb[j]} : 0; };
  int top = Wide::kLimbs - 1;
  while (top > 0 && sum.limb[top] == 0) --top;
  uint64_t high = limb(top) << 32 | limb(top - 1), rest = limb(top - 2) << 32 | limb(top - 3);
  if (high == 0) return 0;
  int exponent = 32 * (top - 1) - 149;
  for (; high >> 63 == 0; --exponent) {
    high = high << 1 | rest >> 63;
    rest <<= 1;
  }
  for (int j = 0; j < top - 3; ++j) rest |= sum.limb[j];
  high |= rest != 0;  // below the 53 bits a double keeps, so that a conversion rounds as the whole sum would
  return std::ldexp(static_cast<double>(high), exponent);
}

// The smallest multiple of 2^-149 that is at least `value`, and no zero.
__host__ __device__ inline Wide at_least(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto exponent = static_cast<int>(bits >> 52);
  uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
  if (exponent > 0) mantissa |= uint64_t{1} << 52;
  int shift = (exponent > 0 ? exponent : 1) - 1075 + 149;
  if (shift < 0) {
    const uint64_t kept = shift > -64 ? mantissa >> -shift : 0;
    mantissa = kept + (shift <= -64 || kept << -shift != mantissa);
    shift = 0;
  }
  Wide result;
  for (int j = 0; j < Wide::kLimbs; ++j) result.limb[j] = limb_of(mantissa > 0 ? mantissa : 1, shift, j);
  return result;
}

// Floats of one exponent are multiples of 2^(shift - 149).
__host__ __device__ inline int shift_of(uint32_t bits) {
  const uint32_t exponent = bits >> kFractionBits & 0xFF;
  return exponent > 0 ? static_cast<int>(exponent) - 1 : 0;
}

// And this many of them, for a finite positive float or zero.
__host__ __device__ inline uint32_t mantissa_of(uint32_t bits) {
  return bits >= kImplicit ? (bits & (kImplicit - 1)) | kImplicit : bits;
}

// --- what the kernels share

struct Values {
  const void* data;
  int64_t size;
  int64_t first_chunk;  // of those of all matrices
  int64_t count;        // of the largest values, to be averaged
};

// Where in descending order the k-th value or the crossing is.
struct Cut {
  uint32_t prefix;     // the smallest bit pattern of the bin it is in
  uint64_t remaining;  // how many values, or what sum of mantissas, it is away from the upper end of the bin
  uint64_t above;      // values in the bins above
  uint64_t sum_above;  // mantissas of those that have its exponent
};
enum { kKth, kCrossing, kCuts };

// Of one matrix; zero at first.
struct Work {
  uint64_t exponent_count[kExponents], exponent_sum[kExponents];  // the latter of fractions
  uint64_t digit_count[kCuts * kDigits], digit_sum[kCuts * kDigits];  // the latter of tails
  uint64_t tail_count[kCuts * kTails];
  Cut cut[kCuts];
  Wide head;  // sum of the values that have a larger exponent than the k-th
  double trace;
  uint32_t negative;
  int32_t invalid;  // 0, or what the effective rank of an invalid diagonal is
};
constexpr int32_t kNonFinite = -1, kNegative = -2;
// A prefix that no value has.
constexpr uint32_t kNoPrefix = 0xFFFFFFFFu;

struct Batch {
  const Values* values;  // and one more, of no size
  Work* work;
  int64_t matrices, chunks;
};

__device__ inline void add_to(uint64_t& total, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&total), static_cast<unsigned long long>(value));
}

// --- passes

struct FloatValues {
  using Bits = uint32_t;
  __device__ static uint32_t float_bits(uint32_t bits) { return bits; }
};
struct Bfloat16Values {
  using Bits = uint16_t;
  __device__ static uint32_t float_bits(uint32_t bits) { return bits << 16; }
};
struct HalfValues {
  using Bits = uint16_t;
  __device__ static uint32_t float_bits(uint32_t bits) {
    const float value = HalfBits::low(bits);
    uint32_t result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  }
};

// Every lane's counts and sums of fractions by exponent, in two words: the lower bits of the fractions, and the upper
// bits below the count.
class ExponentPass {
 public:
  static constexpr int kWords = 2 * kExponents * 32;
  // A lane's column gets at most 2^13 values between flushes: 2^13 (2^19 - 1) < 2^32 and 2^13 (2^4 - 1) < 2^17.
  static constexpr int kMostChunks = (1 << 13) * 32 / kChunk;

  __device__ explicit ExponentPass(uint32_t* table) : table_(table), column_(table + threadIdx.x % 32) {}

  __device__ void begin(const Work&) {}

  __device__ void add(uint32_t bits) {
    largest_ = bits > largest_ ? bits : largest_;
    uint32_t* at = column_ + (bits >> (kFractionBits - 5) & (kExponents - 1) << 5);
    atomicAdd(at, bits & kLowMask);
    atomicAdd(at + kExponents * 32, (bits >> kLowBits & kHighMask) | 1u << kCountShift);
  }

  __device__ void flush(Work& work) {
    if (largest_ > kSign) work.negative = 1;  // kSign itself is minus zero
    largest_ = 0;
    static_assert(kThreads == 2 * kExponents);
    const int exponent = static_cast<int>(threadIdx.x) / 2;
    uint64_t sum = 0;
    uint32_t count = 0;
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      // The lanes of a warp read one bank each.
      uint32_t* at = table_ + exponent * 32 + threadIdx.x % 2 * 16 + (i + exponent) % 16;
      const uint32_t low = at[0], high = at[kExponents * 32];
      at[0] = at[kExponents * 32] = 0;
      sum += low + (uint64_t{high & ((1u << kCountShift) - 1)} << kLowBits);
      count += high >> kCountShift;
    }
    if (count == 0) return;
    add_to(work.exponent_count[exponent], count);
    add_to(work.exponent_sum[exponent], sum);
  }

 private:
  static constexpr int kLowBits = 19, kCountShift = 17;
  static constexpr uint32_t kLowMask = (1u << kLowBits) - 1, kHighMask = (1u << (kFractionBits - kLowBits)) - 1;
  static_assert(kMostChunks > 0);

  uint32_t *table_, *column_;
  uint32_t largest_ = 0;
};

class DigitPass {
 public:
  static constexpr int kWords = 2 * kCuts * kDigits;
  // One bin gets at most 2^20 values: 2^20 (2^12 - 1) < 2^32.
  static constexpr int kMostChunks = (1 << 20) / kChunk;

  __device__ explicit DigitPass(uint32_t* table) : table_(table) {}

  __device__ void begin(const Work& work) {
    kth_ = work.cut[kKth].prefix;
    crossing_ = work.cut[kCrossing].prefix;
  }

  __device__ void add(uint32_t bits) {
    const uint32_t prefix = bits & kInfinity;
    if (prefix != kth_ && prefix != crossing_) return;
    uint32_t* at = table_ + (bits >> kTailBits & (kDigits - 1)) + (prefix == kth_ ? 0 : kDigits);
    const uint32_t tail = bits & (kTails - 1);
    atomicAdd(at, 1u);
    if (tail != 0) atomicAdd(at + kCuts * kDigits, tail);
  }

  __device__ void flush(Work& work) {
    for (int bin = threadIdx.x; bin < kCuts * kDigits; bin += kThreads) {
      const uint32_t count = table_[bin], sum = table_[kCuts * kDigits + bin];
      if (count == 0) continue;
      table_[bin] = table_[kCuts * kDigits + bin] = 0;
      add_to(work.digit_count[bin], count);
      add_to(work.digit_sum[bin], sum);
    }
  }

 private:
  uint32_t* table_;
  uint32_t kth_, crossing_;
};

class TailPass {
 public:
  static constexpr int kWords = kCuts * kTails;
  static constexpr int kMostChunks = 1 << 18;  // fewer than 2^32 values

  __device__ explicit TailPass(uint32_t* table) : table_(table) {}

  __device__ void begin(const Work& work) {
    kth_ = work.cut[kKth].prefix;
    crossing_ = work.cut[kCrossing].prefix;
  }

  __device__ void add(uint32_t bits) {
    const uint32_t prefix = bits & ~(kSign | (kTails - 1));
    if (prefix != kth_ && prefix != crossing_) return;
    atomicAdd(table_ + (bits & (kTails - 1)) + (prefix == kth_ ? 0 : kTails), 1u);
  }

  __device__ void flush(Work& work) {
    for (int bin = threadIdx.x; bin < kCuts * kTails; bin += kThreads) {
      const uint32_t count = table_[bin];
      if (count == 0) continue;
      table_[bin] = 0;
      add_to(work.tail_count[bin], count);
    }
  }

 private:
  uint32_t* table_;
  uint32_t kth_, crossing_;
};

// Adds the values of a chunk, of which `remaining` are left. They are read once and need not stay in a cache.
template <class T, class Pass>
__device__ void add_chunk(const typename T::Bits* values, int64_t remaining, Pass& pass) {
  using Bits = typename T::Bits;
  constexpr int kInWord = sizeof(uint32_t) / sizeof(Bits), kVectors = kThreadValues / (4 * kInWord);
  const int thread = threadIdx.x;
  if (remaining >= kChunk && reinterpret_cast<uintptr_t>(values) % sizeof(uint4) == 0) {
    uint4 vectors[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      vectors[i] = __ldcs(reinterpret_cast<const uint4*>(values) + i * kThreads + thread);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      for (const uint32_t word : {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w})
#pragma unroll
        for (int j = 0; j < kInWord; ++j) pass.add(T::float_bits(static_cast<Bits>(word >> (16 * j))));
    return;
  }
  const int end = static_cast<int>(remaining < kChunk ? remaining : kChunk);
#pragma unroll 8
  for (int i = thread; i < end; i += kThreads) pass.add(T::float_bits(__ldcs(values + i)));
}

// A block has equally many chunks as any other, in order, so that it comes past few matrices.
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, 2) pass_kernel(Batch batch) {
  SENSILORA_DYNAMIC_SHARED(table);
  for (int i = threadIdx.x; i < Pass::kWords; i += kThreads) table[i] = 0;
  __syncthreads();
  const int64_t first = batch.chunks * blockIdx.x / gridDim.x, last = batch.chunks * (blockIdx.x + 1) / gridDim.x;
  // The last matrix that begins at the first chunk or before: those without values begin where the next one does.
  int64_t matrix = 0;
  for (int64_t end = batch.matrices; end - matrix > 1;) {
    const int64_t middle = matrix + (end - matrix) / 2;
    (batch.values[middle].first_chunk <= first ? matrix : end) = middle;
  }
  Pass pass(table);
  for (int64_t chunk = first; chunk < last;) {
    const Values values = batch.values[matrix];
    const int64_t values_end = batch.values[matrix + 1].first_chunk, end = values_end < last ? values_end : last;
    const auto* data = static_cast<const typename T::Bits*>(values.data);
    pass.begin(batch.work[matrix]);
    while (chunk < end) {
      const int64_t flush = chunk + Pass::kMostChunks < end ? chunk + Pass::kMostChunks : end;
      for (; chunk < flush; ++chunk) {
        const int64_t at = (chunk - values.first_chunk) * kChunk;
        add_chunk<T>(data + at, values.size - at, pass);
      }
      __syncthreads();
      pass.flush(batch.work[matrix]);
      __syncthreads();
    }
    ++matrix;
  }
}

// --- finding the cuts

// Replaces value by the sum of those of this thread and of the threads before it.
template <int kSize, int kBlock>
__device__ void inclusive_scan(uint64_t (&value)[kSize], uint64_t (&shared)[kSize][kBlock]) {
  const int thread = threadIdx.x;
  for (int distance = 1; distance < kBlock; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) shared[i][thread] = value[i];
    __syncthreads();
    if (thread >= distance)
#pragma unroll
      for (int i = 0; i < kSize; ++i) value[i] += shared[i][thread - distance];
    __syncthreads();
  }
}

// A block of kExponents threads a matrix: the exponents of the two cuts, the trace, and whether the values are valid.
__global__ void __launch_bounds__(kExponents) exponent_cuts_kernel(Batch batch, double alpha) {
  Work& work = batch.work[blockIdx.x];
  const auto kth = static_cast<uint64_t>(batch.values[blockIdx.x].count);
  const int thread = threadIdx.x;
  const uint32_t bits = static_cast<uint32_t>(kExponents - 1 - thread) << kFractionBits;  // descending
  const uint64_t count = work.exponent_count[bits >> kFractionBits];
  const uint64_t sum = work.exponent_sum[bits >> kFractionBits] + count * mantissa_of(bits);

  __shared__ uint64_t scan[Wide::kLimbs + 1][kExponents];
  uint64_t reached[Wide::kLimbs + 1];
  for (int j = 0; j < Wide::kLimbs; ++j) reached[j] = limb_of(sum, shift_of(bits), j);
  reached[Wide::kLimbs] = count;
  inclusive_scan(reached, scan);
  const uint64_t count_reached = reached[Wide::kLimbs];
  __shared__ Wide sums[kExponents];
  uint64_t carry = 0;
  for (int j = 0; j < Wide::kLimbs; ++j) {
    carry += reached[j];
    sums[thread].limb[j] = static_cast<uint32_t>(carry);
    carry >>= 32;
  }
  __shared__ Wide target;
  __shared__ int32_t invalid;
  __syncthreads();
  if (thread == 0) {
    const Wide& all = sums[kExponents - 1];
    work.trace = to_double(all);
    // The product rounds, and may round above the exact trace where alpha is 1.
    const Wide wanted = at_least(alpha * work.trace);
    target = less(wanted, all) ? wanted : all;
    invalid = count > 0 ? kNonFinite : work.negative ? kNegative : 0;
    work.invalid = invalid;
    for (Cut& cut : work.cut) cut.prefix = kNoPrefix;
  }
  __syncthreads();
  if (invalid != 0 || count == 0) return;
  const Wide above = thread > 0 ? sums[thread - 1] : Wide{};
  const uint64_t count_above = count_reached - count;
  if (count_above < kth && count_reached >= kth) {
    work.cut[kKth] = {bits, kth - count_above, count_above, 0};
    work.head = above;
  }
  // Without any trace nothing is below it and there is no crossing.
  if (less(above, target) && !less(sums[thread], target))
    work.cut[kCrossing] = {bits, difference(target, above, shift_of(bits)), count_above, 0};
}

// All threads of a block: which of kBins bins, kWidth bit patterns wide each, the cut is in. `count` values are in each,
// and `sum` is what their mantissas exceed those of the bins' lower ends by; null where a bin is one bit pattern.
template <int kBins, int kWidth>
__device__ void refine(Cut& cut, const uint64_t* count, const uint64_t* sum, bool by_count) {
  constexpr int kEach = kBins / kThreads;
  const Cut before = cut;
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // descending
  uint64_t counts[kEach], sums[kEach], own[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    counts[i] = count[first - i];
    sums[i] = counts[i] * mantissa_of(before.prefix + (first - i) * kWidth) + (sum == nullptr ? 0 : sum[first - i]);
    own[0] += counts[i];
    own[1] += sums[i];
  }
  __shared__ uint64_t scan[2][kThreads];
  uint64_t reached[2] = {own[0], own[1]};
  inclusive_scan(reached, scan);
  uint64_t above = reached[0] - own[0], sum_above = reached[1] - own[1];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint64_t passed = by_count ? above : sum_above;
    if (passed < before.remaining && before.remaining - passed <= (by_count ? counts[i] : sums[i]))
      cut = {before.prefix + static_cast<uint32_t>((first - i) * kWidth), before.remaining - passed,
             before.above + above, before.sum_above + sum_above};
    above += counts[i];
    sum_above += sums[i];
  }
}

// Refines both cuts. Values in the bins of both are in the table of the first.
template <int kBins, int kWidth>
__device__ void refine_both(Work& work, const uint64_t* count, const uint64_t* sum) {
  const int crossing_table = work.cut[kCrossing].prefix == work.cut[kKth].prefix ? 0 : kBins;
  __syncthreads();
  refine<kBins, kWidth>(work.cut[kKth], count, sum, true);
  refine<kBins, kWidth>(work.cut[kCrossing], count + crossing_table, sum == nullptr ? sum : sum + crossing_table, false);
}

// A block a matrix.
__global__ void __launch_bounds__(kThreads) digit_cuts_kernel(Batch batch) {
  Work& work = batch.work[blockIdx.x];
  refine_both<kDigits, kTails>(work, work.digit_count, work.digit_sum);
}

// A block a matrix: the last cuts, which are values, and the results.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Batch batch, double* trace, double* topk_mean, int64_t* effective_rank) {
  Work& work = batch.work[blockIdx.x];
  refine_both<kTails, 1>(work, work.tail_count, nullptr);
  __syncthreads();
  if (threadIdx.x > 0) return;
  const Values& values = batch.values[blockIdx.x];
  double topk = 0;
  int64_t rank = 0;
  if (work.invalid != 0) {
    work.trace = topk = NAN;
    rank = work.invalid;
  } else if (values.size > 0) {
    const Cut &kth = work.cut[kKth], &crossing = work.cut[kCrossing];
    Wide top = work.head;
    add(top, kth.sum_above + kth.remaining * mantissa_of(kth.prefix), shift_of(kth.prefix));
    topk = to_double(top) / static_cast<double>(values.count);
    // The fewest copies of the crossing value that reach the target.
    if (work.trace > 0) {
      const uint64_t mantissa = mantissa_of(crossing.prefix);
      rank = static_cast<int64_t>(crossing.above + (crossing.remaining + mantissa - 1) / mantissa);
    }
  }
  trace[blockIdx.x] = work.trace;
  topk_mean[blockIdx.x] = topk;
  effective_rank[blockIdx.x] = rank;
}

}  // namespace metrics
}  // namespace sensilora
