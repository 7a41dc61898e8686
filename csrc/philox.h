// The dropout mask: Philox4x32-7 keyed by the seed and counted by (column block, row), so that it depends on
// neither tiling nor threads, and forward and backward make it anew instead of storing it.
//
// Element (row t, column c) belongs to call n = 4 (c / 32) + c % 8 / 2. Counter (n, t low, t high, 0), key (seed low,
// seed high). It takes the lower 15 bits of one half of output word c % 32 / 8: of the lower half for even c, of the
// upper for odd. So one call serves what one thread holds of a tensor core's operand or accumulator. Kept where those
// bits >= round(p * 32768).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu.h"

namespace sensilora {

constexpr int kPhiloxBlocks = 16;
constexpr int kPhiloxColumns = 8 * kPhiloxBlocks;

// Philox4x32-7 on 16 counters at once, in their place.
SENSILORA_INLINE void philox(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, int64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < kPhiloxBlocks; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0[i];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// The 15-bit numbers of columns [8 * block, 8 * block + 128) of a row; block is a multiple of 4.
SENSILORA_INLINE void philox_bits(uint32_t block, int64_t row, int64_t seed, uint16_t* bits) {
  uint32_t c0[kPhiloxBlocks], c1[kPhiloxBlocks], c2[kPhiloxBlocks], c3[kPhiloxBlocks];
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    c0[i] = block + i;
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    c3[i] = 0;
  }
  philox(c0, c1, c2, c3, seed);
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int l = 0; l < 8; ++l)
      bits[32 * (i / 4) + 8 * (l >> 1) + 2 * (i % 4) + (l & 1)] = words[l >> 1] >> (16 * (l & 1)) & 0x7FFF;
  }
}

constexpr uint32_t kDropoutLevels = 32768;

// round(p * 32768), half to even; 32768 drops everything.
inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(std::nearbyint(p * kDropoutLevels)); }

// What kept elements are multiplied by.
inline double dropout_scale(uint32_t threshold) {
  return threshold >= kDropoutLevels ? 0.0 : kDropoutLevels / (kDropoutLevels - static_cast<double>(threshold));
}

}  // namespace sensilora
