// Trace, mean of the largest values and effective rank of non-negative vectors, exactly and without sorting.
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

#include "diagonal_metrics.h"

namespace sensilora {
namespace {

constexpr int64_t kBins = 1 << 15;
constexpr int64_t kLowBins = 1 << 16;
// Within one chunk a bin's sum of 16-bit parts stays below 2^36 and shares a word with its count.
constexpr int64_t kChunk = 1 << 20;
constexpr int kCountShift = 36;
constexpr int64_t kFew = 1 << 14;
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

// Values with one exponent and some equal upper bits, or only equal ones: their smallest possible bit pattern, how many
// there are, and the sum of what their mantissas hold beyond that pattern's.
struct Group {
  uint32_t float_bits;
  uint64_t count;
  uint64_t low_sum;
};
using Groups = std::vector<Group>;  // descending

// The values from the largest down to some point: how many, and their sum.
struct Head {
  uint64_t count = 0;
  ExactSum sum;

  Head with(uint64_t more, uint64_t low_sum, uint32_t float_bits) const {
    const Decoded value = decode(float_bits);
    Head result = *this;
    result.count += more;
    result.sum.add(static_cast<unsigned __int128>(value.mantissa) * more + low_sum, value.shift);
    return result;
  }
  Head with(const Group& group) const { return with(group.count, group.low_sum, group.float_bits); }
};

// Where the descending order is cut: the head of larger values and the group the cut falls into.
struct Cut {
  Head above;
  Group group{};
};

// Moves the cut down to the first of the groups whose end satisfies `reached`.
template <class Reached>
Cut advance(Cut cut, const Groups& groups, const Reached& reached) {
  for (const Group& group : groups) {
    cut.group = group;
    const Head next = cut.above.with(group);
    if (reached(next)) break;
    cut.above = next;
  }
  return cut;
}

struct Metrics {
  double trace, topk_mean;
  int64_t effective_rank;
};

// The metrics of values in `groups`; refine(a, b) gives the groups of equal values that two of the groups consist of.
template <class Refine>
Metrics metrics_of(const Groups& groups, int64_t count, double alpha, const Refine& refine) {
  const Head all = advance({}, groups, [](const Head&) { return false; }).above;
  const double trace = all.sum.to_double();
  // The product rounds, and may round above the exact trace where alpha is 1.
  const ExactSum target = std::min(ExactSum::at_least(alpha * trace), all.sum);
  const auto has_count = [&](const Head& head) { return head.count >= static_cast<uint64_t>(count); };
  const auto has_sum = [&](const Head& head) { return !(head.sum < target); };
  Cut kth = advance({}, groups, has_count);
  Cut crossing = advance({}, groups, has_sum);
  const auto [kth_groups, crossing_groups] = refine(kth.group, crossing.group);
  kth = advance(kth, kth_groups, has_count);
  crossing = advance(crossing, crossing_groups, has_sum);

  const Head top = kth.above.with(count - kth.above.count, 0, kth.group.float_bits);
  const double topk_mean = top.sum.to_double() / static_cast<double>(count);
  if (trace == 0) return {trace, topk_mean, 0};
  // Fewest copies of the crossing value that reach the target; all of them do.
  uint64_t too_few = 0, enough = crossing.group.count;
  while (enough - too_few > 1) {
    const uint64_t middle = too_few + (enough - too_few) / 2;
    (has_sum(crossing.above.with(middle, 0, crossing.group.float_bits)) ? enough : too_few) = middle;
  }
  return {trace, topk_mean, static_cast<int64_t>(crossing.above.count + enough)};
}

// How values that have no metrics are reported.
constexpr Metrics kNonFinite{NAN, NAN, kNonFiniteDiagonal};
constexpr Metrics kNegative{NAN, NAN, kNegativeDiagonal};

template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kLowBits = 16;
  static constexpr uint32_t kInfinity = 0x7f80;  // upper 16 bits
  static uint32_t float_bits(uint32_t bits) { return bits; }
};
template <>
struct Format<BFloat16> {
  using Bits = uint16_t;
  static constexpr int kLowBits = 0;
  static constexpr uint32_t kInfinity = 0x7f80;
  static uint32_t float_bits(uint32_t bits) { return bits << 16; }
};
template <>
struct Format<Half> {
  using Bits = uint16_t;
  static constexpr int kLowBits = 0;
  static constexpr uint32_t kInfinity = 0x7c00;
  static uint32_t float_bits(uint32_t bits) {
    const float value = Half(static_cast<uint16_t>(bits), Half::from_bits());
    uint32_t result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  }
};
template <class T>
constexpr typename Format<T>::Bits kSign = typename Format<T>::Bits{1} << (8 * sizeof(typename Format<T>::Bits) - 1);

struct Histogram {
  std::vector<uint64_t> count = std::vector<uint64_t>(kBins, 0);
  std::vector<uint64_t> low_sum = std::vector<uint64_t>(kBins, 0);
  bool negative = false;
};

template <class T>
Histogram count_bins(const typename Format<T>::Bits* values, int64_t size) {
  using Bits = typename Format<T>::Bits;
  constexpr int kLow = Format<T>::kLowBits;
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
        table[(bits & ~kSign<T>) >> kLow] += (uint64_t{1} << kCountShift) | (bits & kLowMask);
      };
      int64_t i = chunk * kChunk;
      for (; i + 1 < end; i += 2) {
        put(even, values[i]);
        put(odd, values[i + 1]);
      }
      if (i < end) put(even, values[i]);
      const std::lock_guard<std::mutex> lock(merging);
      total.negative |= largest > kSign<T>;  // kSign itself is minus zero
      for (int64_t bin = 0; bin < kBins; ++bin) {
        const uint64_t word = even[bin] + odd[bin];
        total.count[bin] += word >> kCountShift;
        total.low_sum[bin] += word & kSumMask;
      }
    }
  });
  return total;
}

// The equal values that two bins of float32 values consist of.
std::array<Groups, 2> split_bins(const uint32_t* values, int64_t size, std::array<uint32_t, 2> bins) {
  std::array<std::vector<uint64_t>, 2> counts{std::vector<uint64_t>(kLowBins, 0), std::vector<uint64_t>(kLowBins, 0)};
  std::mutex merging;
  torch::stable::parallel_for(0, ceil_div(size, kChunk), 1, [&](int64_t first, int64_t last) {
    auto mine = std::array{std::vector<uint64_t>(kLowBins, 0), std::vector<uint64_t>(kLowBins, 0)};
    const int64_t end = std::min(size, last * kChunk);
    for (int64_t i = first * kChunk; i < end; ++i) {
      const uint32_t bin = (values[i] & ~kSign<float>) >> 16;
      if (bin == bins[0]) ++mine[0][values[i] & 0xffff];
      if (bin == bins[1]) ++mine[1][values[i] & 0xffff];
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (int b = 0; b < 2; ++b)
      for (int64_t low = 0; low < kLowBins; ++low) counts[b][low] += mine[b][low];
  });
  std::array<Groups, 2> groups;
  for (int b = 0; b < 2; ++b)
    for (int64_t low = kLowBins - 1; low >= 0; --low)
      if (counts[b][low] != 0) groups[b].push_back({bins[b] << 16 | static_cast<uint32_t>(low), counts[b][low], 0});
  return groups;
}

template <class T>
Metrics metrics_of_many(const typename Format<T>::Bits* values, int64_t size, int64_t count, double alpha) {
  const Histogram histogram = count_bins<T>(values, size);
  Groups groups;
  for (int64_t bin = kBins - 1; bin >= 0; --bin) {
    if (histogram.count[bin] == 0) continue;
    if (bin >= Format<T>::kInfinity) return kNonFinite;
    const uint32_t first = static_cast<uint32_t>(bin) << Format<T>::kLowBits;
    groups.push_back({Format<T>::float_bits(first), histogram.count[bin], histogram.low_sum[bin]});
  }
  if (histogram.negative) return kNegative;
  return metrics_of(groups, count, alpha, [&](const Group& a, const Group& b) {
    if constexpr (Format<T>::kLowBits == 0)
      return std::array<Groups, 2>{Groups{a}, Groups{b}};
    else
      return split_bins(values, size, {a.float_bits >> 16, b.float_bits >> 16});
  });
}

// The same for so few values that clearing those tables would take most of the time: one group an exponent, and
// inside the groups that are cut, sorting.
template <class T>
Metrics metrics_of_few(const typename Format<T>::Bits* values, int64_t size, int64_t count, double alpha) {
  constexpr int kFraction = 23;
  std::vector<uint32_t> patterns(size);
  std::array<Group, 256> by_exponent{};
  bool negative = false;
  for (int64_t i = 0; i < size; ++i) {
    negative |= values[i] > kSign<T>;  // kSign itself is minus zero
    const uint32_t bits = Format<T>::float_bits(values[i] & ~kSign<T>);
    patterns[i] = bits;
    Group& group = by_exponent[bits >> kFraction];
    ++group.count;
    group.low_sum += bits & ((1u << kFraction) - 1);
  }
  if (by_exponent[255].count != 0) return kNonFinite;
  if (negative) return kNegative;
  Groups groups;
  for (uint32_t exponent = 255; exponent-- > 0;)
    if (by_exponent[exponent].count != 0)
      groups.push_back({exponent << kFraction, by_exponent[exponent].count, by_exponent[exponent].low_sum});

  const auto split = [&](const Group& group) {
    std::vector<uint32_t> inside;
    for (const uint32_t bits : patterns)
      if (bits >> kFraction == group.float_bits >> kFraction) inside.push_back(bits);
    std::sort(inside.begin(), inside.end(), std::greater<uint32_t>());
    Groups equal;
    for (const uint32_t bits : inside) {
      if (equal.empty() || equal.back().float_bits != bits) equal.push_back({bits, 0, 0});
      ++equal.back().count;
    }
    return equal;
  };
  return metrics_of(groups, count, alpha, [&](const Group& a, const Group& b) {
    return std::array<Groups, 2>{split(a), split(b)};
  });
}

template <class T>
Metrics metrics(const void* data, int64_t size, int64_t count, double alpha) {
  const auto* values = static_cast<const typename Format<T>::Bits*>(data);
  if (size == 0) return {0.0, 0.0, 0};
  return size < kFew ? metrics_of_few<T>(values, size, count, alpha) : metrics_of_many<T>(values, size, count, alpha);
}

template <class T>
Tensor vector_of(const Tensor& like, ScalarType type, const std::vector<Metrics>& results, T Metrics::*member) {
  const Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(results.size())}, type);
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  for (const Metrics& result : results) *to++ = result.*member;
  return out;
}

DiagonalMetrics diagonal_metrics(std::vector<Tensor> diags, std::vector<int64_t> counts, double alpha) {
  const NoGrad guard;
  check_diagonals(diags, counts, alpha);
  for (Tensor& diag : diags) diag = torch::stable::contiguous(diag);
  const ScalarType type = diags[0].scalar_type();
  std::vector<Metrics> results(diags.size());
  const auto measure = [&](size_t i) {
    const void* data = diags[i].const_data_ptr();
    const int64_t size = diags[i].numel();
    results[i] = type == ScalarType::Float      ? metrics<float>(data, size, counts[i], alpha)
                 : type == ScalarType::BFloat16 ? metrics<BFloat16>(data, size, counts[i], alpha)
                                                : metrics<Half>(data, size, counts[i], alpha);
  };
  // Threads share out the values of a large diagonal, but small ones among themselves.
  torch::stable::parallel_for(0, static_cast<int64_t>(diags.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (diags[i].numel() < kFew) measure(i);
  });
  for (size_t i = 0; i < diags.size(); ++i)
    if (diags[i].numel() >= kFew) measure(i);
  return {vector_of(diags[0], ScalarType::Double, results, &Metrics::trace),
          vector_of(diags[0], ScalarType::Double, results, &Metrics::topk_mean),
          vector_of(diags[0], ScalarType::Long, results, &Metrics::effective_rank)};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("diagonal_metrics", TORCH_BOX(&sensilora::diagonal_metrics));
}
