// What fisher_diag checks on every device.
#pragma once

#include "common.h"

namespace sensilora {

enum FisherMode : int64_t { kPerSequence = 0, kPerPosition = 1 };

struct FisherInput {
  Matrix x, g;
  Tensor length_tensor;
  const int64_t* lengths;
  int64_t sequences;
};

// x (tokens, in) and grad (tokens, out) of one dtype, the sequences one behind the other; lengths (N,) int64, the
// tokens of each; mode 0 per sequence, 1 per position; out (out, in) float32 or float64, written or added to.
inline FisherInput fisher_input(const Tensor& x, const Tensor& grad, const Tensor& lengths, int64_t mode,
                                const Tensor& out) {
  const Matrix x_matrix = as_matrix(x, "x"), g_matrix = as_matrix(grad, "grad");
  check_out(out);
  STD_TORCH_CHECK(x.scalar_type() == grad.scalar_type(), "x and grad must share a dtype");
  STD_TORCH_CHECK(x_matrix.rows == g_matrix.rows, "x has ", x_matrix.rows, " rows, grad has ", g_matrix.rows);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == g_matrix.columns && out.size(1) == x_matrix.columns &&
                      out.is_contiguous(),
                  "out must be contiguous, of shape (", g_matrix.columns, ", ", x_matrix.columns, ")");
  for (const Tensor* tensor : {&grad, &out})
    STD_TORCH_CHECK(tensor->is_cuda() == x.is_cuda() && tensor->get_device_index() == x.get_device_index(),
                    "x, grad and out must be on one device");
  STD_TORCH_CHECK(mode == kPerSequence || mode == kPerPosition, "mode must be 0 or 1, not ", mode);
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
                  "lengths must be a 1-D int64 tensor on the CPU");
  const Tensor length_tensor = torch::stable::contiguous(lengths);
  const auto* length = static_cast<const int64_t*>(length_tensor.const_data_ptr());
  int64_t tokens = 0;
  for (int64_t n = 0; n < lengths.size(0); ++n) {
    STD_TORCH_CHECK(length[n] >= 0, "lengths must not be negative");
    tokens += length[n];
  }
  STD_TORCH_CHECK(tokens == x_matrix.rows, "lengths sum to ", tokens, ", x has ", x_matrix.rows, " rows");
  return {x_matrix, g_matrix, length_tensor, length, lengths.size(0)};
}

}  // namespace sensilora
