// The dropout mask of philox.h, made by the threads that need it.
#pragma once

#include <cstdint>

namespace sensilora {

struct Dropout {
  const int64_t* seed;
  uint32_t thresholds;  // the threshold, of at most 32768, in both halves of a word
};

// One for each half of a word.
__host__ __device__ inline uint32_t pair_of_thresholds(uint32_t threshold) { return threshold * 0x00010001u; }

inline Dropout make_dropout(const int64_t* seed, uint32_t threshold) { return {seed, pair_of_thresholds(threshold)}; }

// One word a pair of columns, with ones in the halves of those that are kept.
struct Kept {
  uint32_t pair[4];
};

// Philox4x32-7 on one counter, in its place.
__device__ inline void philox(uint32_t (&counter)[4], int64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = static_cast<uint32_t>(product1);
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Ones in the halves of a word whose lower 15 bits reach the threshold.
__device__ inline uint32_t kept_halves(uint32_t word, uint32_t thresholds) {
  // What is left of the 16th bit tells, so that the halves borrow nothing from one another.
  return (((word | 0x80008000u) - thresholds) >> 15 & 0x00010001u) * 0xFFFFu;
}

// Which of columns 8 * block ... 8 * block + 7 of a row are kept. The whole warp calls this: four lanes that are
// kLaneStep apart share a row and ask for the four blocks of one span of 32 columns, in the order of the lanes. A
// Philox call serves one pair of columns in each block of the span, so each lane makes one call and they exchange.
template <int kLaneStep>
__device__ inline Kept kept_columns(int64_t seed, uint32_t thresholds, int64_t row, uint32_t block) {
  const uint64_t t = static_cast<uint64_t>(row);
  uint32_t words[4] = {block, static_cast<uint32_t>(t), static_cast<uint32_t>(t >> 32), 0};
  philox(words, seed);
  Kept kept;
#pragma unroll
  for (int w = 0; w < 4; ++w) kept.pair[w] = kept_halves(words[w], thresholds);

  // Word w of call n belongs to pair n of block w: transpose the four lanes' words.
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = block & bit;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w & bit) continue;
      uint32_t &low = kept.pair[w], &high = kept.pair[w + bit];
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFF, upper ? low : high, bit * kLaneStep);
      (upper ? low : high) = received;
    }
  }
  return kept;
}

}  // namespace sensilora
