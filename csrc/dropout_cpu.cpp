// The dropout of the LoRA input, with a mask that any part of it can be made again from (philox.h).
#include "dropout.h"

#include <algorithm>

#include "philox.h"

namespace sensilora {
namespace {

template <class T, bool kAdd>
struct DropRow {
  template <int kVectorBytes>
  SENSILORA_INLINE static void run(const T* x, T* out, int64_t columns, int64_t row, int64_t seed,
                                   uint32_t threshold) {
    using A = accumulate_t<T>;
    const A scale = static_cast<A>(dropout_scale(threshold));
    for (int64_t begin = 0; begin < columns; begin += kPhiloxColumns) {
      uint16_t bits[kPhiloxColumns];
      philox_bits(static_cast<uint32_t>(begin / 8), row, seed, bits);
      const int64_t width = std::min<int64_t>(kPhiloxColumns, columns - begin);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        const A kept = bits[j] >= threshold ? static_cast<A>(to_float(x[begin + j])) * scale : A{0};
        out[begin + j] = static_cast<T>(kAdd ? static_cast<A>(to_float(out[begin + j])) + kept : kept);
      }
    }
  }
};

template <bool kAdd>
void drop_rows(const Matrix& x, const Tensor& out, uint32_t threshold, int64_t seed, int64_t first_row) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, x.columns));
  for_floating_type(out.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, x.rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        dispatch<DropRow<T, kAdd>>(x.row<T>(t), data + t * x.columns, x.columns, first_row + t, seed, threshold);
    });
  });
}

// x (rows, columns), p in [0, 1], seed an int64 tensor of one element -> a new tensor of x's shape and dtype.
Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const NoGrad guard;
  const int64_t* key = seed_pointer(seed, p, x);
  const Matrix matrix = as_matrix(x, "x");
  Tensor out = torch::stable::new_empty(x, {matrix.rows, matrix.columns});
  drop_rows<false>(matrix, out, dropout_threshold(p), key == nullptr ? 0 : *key, 0);
  return out;
}

}  // namespace

Tensor dropped(const Tensor& x, double p, int64_t seed) {
  if (!drops_any(p)) return x;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  drop_into(out, x, p, seed);
  return out;
}

void drop_into(const Tensor& out, const Tensor& x, double p, int64_t seed, int64_t first_row) {
  drop_rows<false>(as_matrix(x, "x"), out, dropout_threshold(p), seed, first_row);
}

void add_dropped(const Tensor& into, const Tensor& x, double p, int64_t seed, int64_t first_row) {
  drop_rows<true>(as_matrix(x, "x"), into, dropout_threshold(p), seed, first_row);
}

}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("dropout", TORCH_BOX(&sensilora::dropout));
}
