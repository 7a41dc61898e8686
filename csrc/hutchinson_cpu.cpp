// Hutchinson's diagonal on the CPU: signs made where they are used, 64 words of them at a time.
#include <algorithm>

#include "hutchinson.h"
#include "philox.h"

namespace sensilora {
namespace {

constexpr int kWords = 4 * kPhiloxBlocks;
constexpr int64_t kSpan = 32 * kWords;  // elements that kPhiloxBlocks calls serve
constexpr int64_t kGrain = 8;           // spans that are worth a thread

// The words of elements [begin, begin + kSpan); begin is a multiple of kSpan.
SENSILORA_INLINE void sign_words(int64_t begin, int64_t seed, int64_t offset, uint32_t* words) {
  uint32_t c0[kPhiloxBlocks], c1[kPhiloxBlocks], c2[kPhiloxBlocks], c3[kPhiloxBlocks];
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    const uint64_t call = static_cast<uint64_t>(begin) / 128 + i;
    c0[i] = static_cast<uint32_t>(call);
    c1[i] = static_cast<uint32_t>(call >> 32);
    c2[i] = static_cast<uint32_t>(offset);
    c3[i] = static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32);
  }
  philox(c0, c1, c2, c3, seed);
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// `value` with its sign turned where bit j of `word` is set.
SENSILORA_INLINE float signed_by(float value, uint32_t word, int j) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^= word << (31 - j) & 0x80000000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
SENSILORA_INLINE double signed_by(double value, uint32_t word, int j) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^= uint64_t{word} << (63 - j) & uint64_t{1} << 63;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <class T, class Out>
struct Accumulate {
  const T* hz;
  Out* out;
  SENSILORA_INLINE void operator()(int64_t i, uint32_t word, int j) const {
    out[i] += signed_by(static_cast<Out>(to_float(hz[i])), word, j);
  }
};

template <class T>
struct Fill {
  T* out;
  SENSILORA_INLINE void operator()(int64_t i, uint32_t word, int j) const {
    out[i] = static_cast<T>(signed_by(accumulate_t<T>{1}, word, j));
  }
};

// set(i, word, j) for each element i of [begin, end), whose sign is bit j of `word`; begin is a multiple of kSpan.
template <class Set>
struct ForEachSign {
  template <int kVectorBytes>
  SENSILORA_INLINE static void run(Set set, int64_t begin, int64_t end, int64_t seed, int64_t offset) {
    for (; begin < end; begin += kSpan) {
      uint32_t words[kWords];
      sign_words(begin, seed, offset, words);
      const int64_t whole = std::min<int64_t>(kWords, (end - begin) / 32);
      for (int64_t w = 0; w < whole; ++w) {
#pragma GCC ivdep
        for (int j = 0; j < 32; ++j) set(begin + 32 * w + j, words[w], j);
      }
      if (whole < kWords)
        for (int64_t i = begin + 32 * whole; i < end; ++i) set(i, words[whole], static_cast<int>(i - begin) % 32);
    }
  }
};

template <class Set>
void for_each_sign(int64_t size, int64_t seed, int64_t offset, const Set& set) {
  torch::stable::parallel_for(0, ceil_div(size, kSpan), kGrain, [&](int64_t first, int64_t last) {
    dispatch<ForEachSign<Set>>(set, first * kSpan, std::min(size, last * kSpan), seed, offset);
  });
}

// out += z * hz, in out's type; both contiguous and of one size, hz of any floating type, out float32 or float64.
void hutchinson_accumulate(const Tensor& hz, Tensor out, int64_t seed, int64_t offset) {
  check_accumulation(hz, out);
  for_floating_type(hz.scalar_type(), "hz", [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(hz.const_data_ptr());
    const auto add = [&](auto* to) {
      using Out = std::remove_pointer_t<decltype(to)>;
      for_each_sign(out.numel(), seed, offset, Accumulate<T, Out>{from, to});
    };
    if (out.scalar_type() == ScalarType::Double)
      add(static_cast<double*>(out.mutable_data_ptr()));
    else
      add(static_cast<float*>(out.mutable_data_ptr()));
  });
}

// out = z; contiguous, of any floating type.
void rademacher(Tensor out, int64_t seed, int64_t offset) {
  check_signs(out);
  for_floating_type(out.scalar_type(), "out", [&](auto tag) {
    using T = decltype(tag);
    for_each_sign(out.numel(), seed, offset, Fill<T>{static_cast<T*>(out.mutable_data_ptr())});
  });
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("hutchinson_accumulate", TORCH_BOX(&sensilora::hutchinson_accumulate));
  m.impl("rademacher", TORCH_BOX(&sensilora::rademacher));
}
