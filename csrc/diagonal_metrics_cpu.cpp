// Trace, mean of the largest values and effective rank of a non-negative vector, exactly and without sorting.
//
// The bit patterns of non-negative floats are ordered as the floats are. One pass counts the values by the upper 16
// bits of their pattern and adds up the lower 16 (values that share the upper 16 bits share an exponent, so those
// sums are exact integers). A second pass counts the lower 16 bits inside the one or two bins where the k-th value
// and the crossing of alpha * trace fall. bfloat16 and float16 need the first pass alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <mutex>
#include <vector>

#include "common.h"

namespace sensilora {
namespace {

constexpr int64_t kBins = 1 << 15;
constexpr int64_t kLowBins = 1 << 16;
// Within one chunk a bin's sum of 16-bit parts stays below 2^36 and shares a word with its count.
constexpr int64_t kChunk = 1 << 20;
constexpr int kCountShift = 36;
constexpr int64_t kSortBelow = 1 << 13;
constexpr uint64_t kSumMask = (uint64_t{1} << kCountShift) - 1;

// A value as mantissa * 2^(shift - 149).
struct Decoded {
  uint64_t mantissa;
  int shift;
};

Decoded decode(uint32_t float_bits) {
  const uint32_t exponent = float_bits >> 23;
  const uint32_t fraction = float_bits & 0x7fffff;
  return exponent == 0 ? Decoded{fraction, 0} : Decoded{fraction | 0x800000, static_cast<int>(exponent) - 1};
}

// A sum of non-negative multiples of 2^-149 without any rounding: 2^43 of the largest floats fit.
class ExactSum {
 public:
  // Adds mantissa * 2^(shift - 149).
  void add(unsigned __int128 mantissa, int shift) {
    for (int limb = shift / 64, offset = shift % 64; mantissa != 0; ++limb, offset = 0) {
      const int room = 64 - offset;
      add_limb(limb, static_cast<uint64_t>(mantissa << offset));
      mantissa >>= room;
    }
  }

  // The smallest such sum that is at least `value`.
  static ExactSum at_least(double value) {
    int exponent;
    const double fraction = std::frexp(value, &exponent);
    auto mantissa = static_cast<uint64_t>(std::ldexp(fraction, 53));
    int shift = exponent - 53 + 149;
    if (shift < 0) {
      const int drop = -shift;
      const uint64_t kept = drop < 64 ? mantissa >> drop : 0;
      const bool exact = drop < 64 && (kept << drop) == mantissa;
      mantissa = kept + (exact ? 0 : 1);
      shift = 0;
    }
    ExactSum sum;
    sum.add(mantissa, shift);
    return sum;
  }

  bool operator<(const ExactSum& other) const {
    for (int i = kLimbs - 1; i >= 0; --i)
      if (limbs_[i] != other.limbs_[i]) return limbs_[i] < other.limbs_[i];
    return false;
  }

  // The nearest double, ties to even.
  double to_double() const {
    int top = kLimbs - 1;
    while (top > 0 && limbs_[top] == 0) --top;
    uint64_t high = limbs_[top];
    if (high == 0) return 0.0;
    const int lead = __builtin_clzll(high);
    uint64_t rest = top > 0 ? limbs_[top - 1] : 0;
    if (lead > 0) {
      high = high << lead | rest >> (64 - lead);
      rest <<= lead;
    }
    for (int i = top - 2; i >= 0; --i) rest |= limbs_[i] != 0;
    high |= rest != 0;  // below the 53 bits a double keeps, so that a conversion rounds as the whole sum would
    return std::ldexp(static_cast<double>(high), top * 64 - lead - 149);
  }

 private:
  static constexpr int kLimbs = 5;

  void add_limb(int limb, uint64_t value) {
    for (; value != 0 && limb < kLimbs; ++limb) {
      limbs_[limb] += value;
      value = limbs_[limb] < value;
    }
  }

  std::array<uint64_t, kLimbs> limbs_{};
};

template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kLowBits = 16;
  static constexpr uint32_t kInfinity = 0x7f80;  // upper 16 bits
  static uint32_t float_bits(uint32_t bin) { return bin << 16; }
};
template <>
struct Format<BFloat16> {
  using Bits = uint16_t;
  static constexpr int kLowBits = 0;
  static constexpr uint32_t kInfinity = 0x7f80;
  static uint32_t float_bits(uint32_t bin) { return bin << 16; }
};
template <>
struct Format<Half> {
  using Bits = uint16_t;
  static constexpr int kLowBits = 0;
  static constexpr uint32_t kInfinity = 0x7c00;
  static uint32_t float_bits(uint32_t bin) {
    const float value = Half(static_cast<uint16_t>(bin), Half::from_bits());
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
};

// What is reported as the effective rank of a vector that has none.
constexpr int64_t kNonFinite = -1;
constexpr int64_t kNegative = -2;

struct Histogram {
  std::vector<uint64_t> count = std::vector<uint64_t>(kBins, 0);
  std::vector<uint64_t> low_sum = std::vector<uint64_t>(kBins, 0);
  bool negative = false;
};

template <class T>
Histogram count_bins(const typename Format<T>::Bits* values, int64_t size) {
  using Bits = typename Format<T>::Bits;
  constexpr int kLow = Format<T>::kLowBits;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  constexpr Bits kLowMask = (Bits{1} << kLow) - 1;
  Histogram total;
  std::mutex merging;
  torch::stable::parallel_for(0, ceil_div(size, kChunk), 1, [&](int64_t first, int64_t last) {
    // Two tables, used in turn: a run of equal values would otherwise wait on its own additions.
    std::vector<uint64_t> even(kBins), odd(kBins);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(even.begin(), even.end(), 0);
      std::fill(odd.begin(), odd.end(), 0);
      const int64_t end = std::min(size, (chunk + 1) * kChunk);
      Bits largest = 0;
      const auto put = [&](std::vector<uint64_t>& table, Bits bits) {
        largest = std::max(largest, bits);
        table[(bits & ~kSign) >> kLow] += (uint64_t{1} << kCountShift) | (bits & kLowMask);
      };
      int64_t i = chunk * kChunk;
      for (; i + 1 < end; i += 2) {
        put(even, values[i]);
        put(odd, values[i + 1]);
      }
      if (i < end) put(even, values[i]);
      const std::lock_guard<std::mutex> lock(merging);
      total.negative |= largest > kSign;  // kSign itself is minus zero
      for (int64_t bin = 0; bin < kBins; ++bin) {
        const uint64_t word = even[bin] + odd[bin];
        total.count[bin] += word >> kCountShift;
        total.low_sum[bin] += word & kSumMask;
      }
    }
  });
  return total;
}

// For each of two bins, how many of its values have each lower half.
using LowCounts = std::array<std::vector<uint64_t>, 2>;

LowCounts count_low_halves(const uint32_t* values, int64_t size, std::array<uint32_t, 2> bins) {
  LowCounts total{std::vector<uint64_t>(kLowBins, 0), std::vector<uint64_t>(kLowBins, 0)};
  std::mutex merging;
  torch::stable::parallel_for(0, ceil_div(size, kChunk), 1, [&](int64_t first, int64_t last) {
    LowCounts mine{std::vector<uint64_t>(kLowBins, 0), std::vector<uint64_t>(kLowBins, 0)};
    const int64_t end = std::min(size, last * kChunk);
    for (int64_t i = first * kChunk; i < end; ++i) {
      const uint32_t bin = (values[i] & 0x7fffffff) >> 16;
      if (bin == bins[0]) ++mine[0][values[i] & 0xffff];
      if (bin == bins[1]) ++mine[1][values[i] & 0xffff];
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (int b = 0; b < 2; ++b)
      for (int64_t low = 0; low < kLowBins; ++low) total[b][low] += mine[b][low];
  });
  return total;
}

// The values from the largest down to some point: how many, and their sum.
struct Head {
  uint64_t count = 0;
  ExactSum sum;

  Head with(uint64_t more, Decoded value) const {
    Head result = *this;
    result.count += more;
    result.sum.add(static_cast<unsigned __int128>(value.mantissa) * more, value.shift);
    return result;
  }
};

// A point in the descending order: the head of larger values, then `copies` equal values.
struct Position {
  Head above;
  uint64_t copies = 0;
  Decoded value{0, 0};
  uint32_t bin = 0;
};

// Walks the lower halves of a bin downwards until the head satisfies `reached`.
template <class Reached>
Position refine(Position position, const std::vector<uint64_t>& low_counts, const Reached& reached) {
  for (int64_t low = kLowBins - 1; low >= 0; --low) {
    if (low_counts[low] == 0) continue;
    position.copies = low_counts[low];
    position.value = decode(position.bin << 16 | static_cast<uint32_t>(low));
    const Head next = position.above.with(position.copies, position.value);
    if (reached(next)) break;
    position.above = next;
  }
  return position;
}

// What the three metrics are made from, with the descending order cut at the count and at the alpha crossing.
struct Cuts {
  int64_t problem = 0;  // kNonFinite or kNegative: the rest is empty
  Head all{};
  Position kth{}, crossing{};
};

// The conditions on a head of the order that place the two cuts.
struct Reached {
  uint64_t count;
  ExactSum target;

  // The product rounds, and may round above the exact trace where alpha is 1.
  Reached(int64_t count, double alpha, const ExactSum& total)
      : count(count), target(std::min(ExactSum::at_least(alpha * total.to_double()), total)) {}
  bool by_count(const Head& head) const { return head.count >= count; }
  bool by_sum(const Head& head) const { return !(head.sum < target); }
};

template <class T>
Cuts cut_by_histogram(const typename Format<T>::Bits* values, int64_t size, int64_t count, double alpha) {
  const Histogram histogram = count_bins<T>(values, size);
  for (int64_t bin = Format<T>::kInfinity; bin < kBins; ++bin)
    if (histogram.count[bin] != 0) return {kNonFinite};
  if (histogram.negative) return {kNegative};
  // Visits the bins downwards: each with its first value, its count and the head that ends with it.
  const auto descend = [&](const auto& visit) {
    Position position;
    for (int64_t bin = kBins - 1; bin >= 0; --bin) {
      if (histogram.count[bin] == 0) continue;
      position.bin = static_cast<uint32_t>(bin);
      position.copies = histogram.count[bin];
      position.value = decode(Format<T>::float_bits(position.bin));
      Head next = position.above.with(position.copies, position.value);
      next.sum.add(histogram.low_sum[bin], position.value.shift);
      if (visit(next)) break;
      position.above = next;
    }
    return position;
  };
  const Head all = descend([](const Head&) { return false; }).above;
  const Reached reached(count, alpha, all.sum);
  const auto by_count = [&](const Head& head) { return reached.by_count(head); };
  const auto by_sum = [&](const Head& head) { return reached.by_sum(head); };
  Cuts cuts{0, all, descend(by_count), descend(by_sum)};
  if constexpr (Format<T>::kLowBits != 0) {
    const LowCounts low = count_low_halves(values, size, {cuts.kth.bin, cuts.crossing.bin});
    cuts.kth = refine(cuts.kth, low[0], by_count);
    cuts.crossing = refine(cuts.crossing, low[1], by_sum);
  }
  return cuts;
}

// For a few values clearing the tables would take longer than sorting.
template <class T>
Cuts cut_by_sorting(const typename Format<T>::Bits* values, int64_t size, int64_t count, double alpha) {
  using Bits = typename Format<T>::Bits;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  constexpr Bits kInfinity = Format<T>::kInfinity << Format<T>::kLowBits;
  std::vector<Bits> sorted(values, values + size);
  bool negative = false;
  for (Bits& bits : sorted) {
    negative |= bits > kSign;  // kSign itself is minus zero
    bits &= ~kSign;
    if (bits >= kInfinity) return {kNonFinite};
  }
  if (negative) return {kNegative};
  std::sort(sorted.begin(), sorted.end(), std::greater<Bits>());
  const auto descend = [&](const auto& visit) {
    Position position;
    for (auto run = sorted.begin(); run != sorted.end();) {
      const auto end = std::find_if(run, sorted.end(), [&](Bits bits) { return bits != *run; });
      position.copies = end - run;
      position.value = decode(Format<T>::kLowBits != 0 ? *run : Format<T>::float_bits(*run));
      const Head next = position.above.with(position.copies, position.value);
      if (visit(next)) break;
      position.above = next;
      run = end;
    }
    return position;
  };
  const Head all = descend([](const Head&) { return false; }).above;
  const Reached reached(count, alpha, all.sum);
  return {0, all, descend([&](const Head& head) { return reached.by_count(head); }),
          descend([&](const Head& head) { return reached.by_sum(head); })};
}

struct Metrics {
  double trace, topk_mean;
  int64_t effective_rank;
};

template <class T>
Metrics metrics(const void* data, int64_t size, int64_t count, double alpha) {
  const auto* values = static_cast<const typename Format<T>::Bits*>(data);
  if (size == 0) return {0.0, 0.0, 0};
  const auto [problem, all, kth, crossing] = size < kSortBelow ? cut_by_sorting<T>(values, size, count, alpha)
                                                               : cut_by_histogram<T>(values, size, count, alpha);
  if (problem != 0) return {std::nan(""), std::nan(""), problem};
  const Reached reached(count, alpha, all.sum);
  const Head top = kth.above.with(count - kth.above.count, kth.value);
  int64_t effective_rank = 0;
  if (all.sum.to_double() > 0) {
    // Fewest copies of the crossing value that reach the target; all of them do.
    uint64_t too_few = 0, enough = crossing.copies;
    while (enough - too_few > 1) {
      const uint64_t middle = too_few + (enough - too_few) / 2;
      (reached.by_sum(crossing.above.with(middle, crossing.value)) ? enough : too_few) = middle;
    }
    effective_rank = static_cast<int64_t>(crossing.above.count + enough);
  }
  return {all.sum.to_double(), top.sum.to_double() / static_cast<double>(count), effective_rank};
}

template <class T>
Tensor scalar(const Tensor& like, ScalarType type, T value) {
  Tensor result = torch::stable::new_empty(like, {}, type);
  *static_cast<T*>(result.mutable_data_ptr()) = value;
  return result;
}

// diag (m,) float32, bfloat16 or float16; count, how many of the largest values to average, in [1, m]; alpha in (0, 1].
// Gives (trace float64, mean of the largest float64, effective rank int64), where the effective rank is the smallest
// j whose j largest values sum to at least alpha * trace, and 0 where the trace is 0. Sums are exact and rounded
// once. An empty diag gives zeros. A NaN or Inf gives effective rank -1, else a negative value -2; so the caller
// words the error.
std::tuple<Tensor, Tensor, Tensor> diagonal_metrics(const Tensor& diag, int64_t count, double alpha) {
  const NoGrad guard;
  STD_TORCH_CHECK(diag.dim() == 1, "diag must have 1 dimension, not ", diag.dim());
  const int64_t size = diag.numel();
  STD_TORCH_CHECK(size == 0 || (count >= 1 && count <= size), "count must be in [1, ", size, "], not ", count);
  STD_TORCH_CHECK(alpha > 0 && alpha <= 1, "alpha must be in (0, 1], not ", alpha);
  const Tensor values = torch::stable::contiguous(diag);
  const void* data = values.const_data_ptr();
  Metrics result{};
  switch (diag.scalar_type()) {
    case ScalarType::Float: result = metrics<float>(data, size, count, alpha); break;
    case ScalarType::BFloat16: result = metrics<BFloat16>(data, size, count, alpha); break;
    case ScalarType::Half: result = metrics<Half>(data, size, count, alpha); break;
    default: STD_TORCH_CHECK(false, "diag must be float32, bfloat16 or float16");
  }
  return {scalar(diag, ScalarType::Double, result.trace), scalar(diag, ScalarType::Double, result.topk_mean),
          scalar(diag, ScalarType::Long, result.effective_rank)};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("diagonal_metrics", TORCH_BOX(&sensilora::diagonal_metrics));
}
