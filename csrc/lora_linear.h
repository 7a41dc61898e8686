// y = x W^T + b + s (drop(x) A^T) B^T and its gradients by torch's own products, on any device. `Device` has
// addmm_into, mm_into (products_cpu.h), dropped and add_dropped (dropout.h).
#pragma once

#include <optional>
#include <tuple>

#include "common.h"
#include "dropout.h"

namespace sensilora {

struct LoraShape {
  int64_t tokens, in, out, rank;

  // h is kept with zeros up to a multiple of 16 columns, so that kernels read every rank aligned.
  int64_t h_columns() const { return ceil_div(rank, 16) * 16; }
};

inline Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, count);
}

// For x (T, in) and weight (out, in) of one dtype, lora_A (r, in) and lora_B (out, r) of any floating dtypes.
inline LoraShape lora_shape(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  for (const Tensor* tensor : {&x, &weight, &lora_A, &lora_B})
    STD_TORCH_CHECK(tensor->dim() == 2, "x, weight, lora_A and lora_B must have 2 dimensions");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "x and weight must share a dtype");
  const LoraShape shape{x.size(0), x.size(1), weight.size(0), lora_A.size(0)};
  STD_TORCH_CHECK(weight.size(1) == shape.in, "weight has ", weight.size(1), " columns, x has ", shape.in);
  STD_TORCH_CHECK(lora_A.size(1) == shape.in, "lora_A has ", lora_A.size(1), " columns, x has ", shape.in);
  STD_TORCH_CHECK(lora_B.size(0) == shape.out && lora_B.size(1) == shape.rank, "lora_B must have shape (", shape.out,
                  ", ", shape.rank, ")");
  return shape;
}

inline void check_bias(const Tensor& bias, const Tensor& x, const LoraShape& shape) {
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == shape.out && bias.scalar_type() == x.scalar_type(),
                  "bias must have shape (", shape.out, ",) and x's dtype");
}

inline void check_grad_and_h(const Tensor& grad, const Tensor& h, const Tensor& x, const LoraShape& shape) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == shape.tokens && grad.size(1) == shape.out &&
                      grad.scalar_type() == x.scalar_type(),
                  "grad must have shape (", shape.tokens, ", ", shape.out, ") and x's dtype");
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == shape.tokens && h.size(1) == shape.h_columns() &&
                      h.scalar_type() == x.scalar_type(),
                  "h must have shape (", shape.tokens, ", ", shape.h_columns(), ") and x's dtype");
}

inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class Device>
Tensor base_output(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const LoraShape& shape) {
  Tensor y = torch::stable::new_empty(x, {shape.tokens, shape.out});
  if (bias.has_value()) {
    check_bias(*bias, x, shape);
    Device::addmm_into(y, *bias, x, transposed(weight), 1.0, 1.0);
  } else {
    Device::mm_into(y, x, transposed(weight));
  }
  return y;
}

// Gives y (T, out) and what the backward pass needs: h = drop(x) A^T (T, r), and zeros to h_columns.
template <class Device>
std::tuple<Tensor, Tensor> lora_linear_by_products(const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, const Tensor& lora_A,
                                                   const Tensor& lora_B, double scaling, double dropout_p,
                                                   const std::optional<Tensor>& seed) {
  const LoraShape shape = lora_shape(x, weight, lora_A, lora_B);
  Tensor y = base_output<Device>(x, weight, bias, shape);
  Tensor padded_h = torch::stable::new_empty(x, {shape.tokens, shape.h_columns()});
  if (shape.rank > 0) {
    const ScalarType dtype = x.scalar_type();
    const Tensor h = columns_of(padded_h, 0, shape.rank);
    if (shape.rank < shape.h_columns()) {
      Tensor padding = columns_of(padded_h, shape.rank, shape.h_columns() - shape.rank);
      torch::stable::zero_(padding);
    }
    Device::mm_into(h, Device::dropped(x, dropout_p, seed), transposed(as_dtype(lora_A, dtype)));
    Device::addmm_into(y, y, h, transposed(as_dtype(lora_B, dtype)), 1.0, scaling);
  }
  return {y, padded_h};
}

// grad (T, out) and what the forward pass took and gave -> the gradients of x (T, in), lora_A and lora_B, the last two
// in their dtypes. Where need_grad_x is false the first is empty, of shape (0,).
template <class Device>
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_by_products(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& padded_h, const Tensor& weight,
                                                                    const Tensor& lora_A, const Tensor& lora_B,
                                                                    double scaling, double dropout_p,
                                                                    const std::optional<Tensor>& seed,
                                                                    bool need_grad_x) {
  const LoraShape shape = lora_shape(x, weight, lora_A, lora_B);
  check_grad_and_h(grad, padded_h, x, shape);
  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_A = torch::stable::new_empty(x, {shape.rank, shape.in});
  Tensor grad_B = torch::stable::new_empty(x, {shape.out, shape.rank});
  if (need_grad_x) {
    grad_x = torch::stable::new_empty(x, {shape.tokens, shape.in});
    Device::mm_into(grad_x, grad, weight);
  }
  if (shape.rank > 0) {
    const Tensor A = as_dtype(lora_A, x.scalar_type()), B = as_dtype(lora_B, x.scalar_type());
    Tensor q = torch::stable::new_empty(x, {shape.tokens, shape.rank});  // s dY B
    Device::addmm_into(q, q, grad, B, 0.0, scaling);
    Device::mm_into(grad_A, transposed(q), Device::dropped(x, dropout_p, seed));
    Device::addmm_into(grad_B, grad_B, transposed(grad), columns_of(padded_h, 0, shape.rank), 0.0, scaling);
    if (need_grad_x && !drops_any(dropout_p)) {
      Device::addmm_into(grad_x, grad_x, q, A, 1.0, 1.0);
    } else if (need_grad_x) {
      Tensor grad_dropped = torch::stable::new_empty(x, {shape.tokens, shape.in});
      Device::mm_into(grad_dropped, q, A);
      Device::add_dropped(grad_x, grad_dropped, dropout_p, seed);
    }
  }
  return {grad_x, as_dtype(grad_A, lora_A.scalar_type()), as_dtype(grad_B, lora_B.scalar_type())};
}

}  // namespace sensilora
