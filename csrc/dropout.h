#pragma once

#include <optional>

#include "common.h"
#include "philox.h"

namespace sensilora {

inline void check_dropout(double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "the dropout probability must be in [0, 1], not ", p);
}

// Whether p, rounded to a multiple of 2^-15, is above zero.
inline bool drops_any(double p) { return dropout_threshold(p) > 0; }

// Where the mask's key lies: an int64 tensor of one element on x's device. Null where nothing is dropped.
inline const int64_t* seed_pointer(const std::optional<Tensor>& seed, double p, const Tensor& x) {
  check_dropout(p);
  if (!drops_any(p)) return nullptr;
  STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cuda() == x.is_cuda() &&
                      seed->get_device_index() == x.get_device_index(),
                  "seed must be an int64 tensor of one element on x's device");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// --- on the CPU

// A new drop(x) of a 2-D x, or x itself where nothing is dropped.
Tensor dropped(const Tensor& x, double p, int64_t seed);

// out = drop(x), into += drop(x); both contiguous and of one shape and dtype. Row 0 takes the mask's row `first_row`.
void drop_into(const Tensor& out, const Tensor& x, double p, int64_t seed, int64_t first_row = 0);
void add_dropped(const Tensor& into, const Tensor& x, double p, int64_t seed, int64_t first_row = 0);

}  // namespace sensilora
