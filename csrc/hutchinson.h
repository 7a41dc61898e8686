// Hutchinson's estimate of a diagonal: out += z * hz, with random signs z that are one bit of a Philox call each.
//
// Element i takes bit i % 32 of word i / 32 % 4 of call n = i / 128; a set bit is -1. Counter (n low, n high, offset low,
// offset high), key (seed low, seed high).
#pragma once

#include "common.h"

namespace sensilora {

inline void check_signs(const Tensor& out) { STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous"); }

inline void check_accumulation(const Tensor& hz, const Tensor& out) {
  check_out(out);
  check_signs(out);
  STD_TORCH_CHECK(hz.is_contiguous() && hz.numel() == out.numel(), "hz must be contiguous and of out's size");
  STD_TORCH_CHECK(hz.is_cuda() == out.is_cuda() && hz.get_device_index() == out.get_device_index(),
                  "hz and out must be on one device");
}

}  // namespace sensilora
