#pragma once

#include "common.h"

namespace sensilora {

// p is in [0, 1].
void check_dropout(double p);

// Whether p, rounded to a multiple of 2^-16, is above zero.
bool drops_any(double p);

// A new drop(x) of a 2-D x, or x itself where nothing is dropped.
Tensor dropped(const Tensor& x, double p, int64_t seed);

// out = drop(x), into += drop(x); both contiguous and of one shape and dtype. Row 0 takes the mask's row `first_row`.
void drop_into(const Tensor& out, const Tensor& x, double p, int64_t seed, int64_t first_row = 0);
void add_dropped(const Tensor& into, const Tensor& x, double p, int64_t seed, int64_t first_row = 0);

}  // namespace sensilora
