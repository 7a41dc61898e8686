// autocorrelation_diag on every device: what its arguments are, and what is checked of them.
#pragma once

#include <optional>

#include "common.h"

namespace sensilora {

// x (rows, in); mask (rows,) bool, true where a row counts, or none; out (in,) float32 or float64, any stride, which
// the sums of squares of x's columns over the counted rows are written or added to.
struct DiagArguments {
  Matrix x;
  std::optional<Tensor> mask;  // contiguous

  DiagArguments(const Tensor& x_tensor, const std::optional<Tensor>& mask_tensor, const Tensor& out)
      : x(as_matrix(x_tensor, "x")) {
    check_out(out);
    STD_TORCH_CHECK(out.dim() == 1 && out.size(0) == x.columns, "out must have shape (", x.columns, ",)");
    if (!mask_tensor.has_value()) return;
    STD_TORCH_CHECK(mask_tensor->scalar_type() == ScalarType::Bool && mask_tensor->dim() == 1 &&
                        mask_tensor->size(0) == x.rows,
                    "mask must be bool of shape (", x.rows, ",)");
    mask = torch::stable::contiguous(*mask_tensor);
  }

  const bool* counted() const {
    return mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  }
};

}  // namespace sensilora
