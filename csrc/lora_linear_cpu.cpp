// y = x W^T + b + s (drop(x) A^T) B^T and its gradients. The products are torch's own; what is saved are the passes
// over y and dx that scaling and adding the low-rank part would take, and the dropout mask.
#include <optional>
#include <tuple>

#include "common.h"
#include "dropout.h"
#include "products_cpu.h"

namespace sensilora {
namespace {

struct Shape {
  int64_t tokens, in, out, rank;
};

Shape check_shapes(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  for (const Tensor* tensor : {&x, &weight, &lora_A, &lora_B}) {
    STD_TORCH_CHECK(tensor->dim() == 2, "x, weight, lora_A and lora_B must have 2 dimensions");
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), "x, weight, lora_A and lora_B must share a dtype");
  }
  const Shape shape{x.size(0), x.size(1), weight.size(0), lora_A.size(0)};
  STD_TORCH_CHECK(weight.size(1) == shape.in, "weight has ", weight.size(1), " columns, x has ", shape.in);
  STD_TORCH_CHECK(lora_A.size(1) == shape.in, "lora_A has ", lora_A.size(1), " columns, x has ", shape.in);
  STD_TORCH_CHECK(lora_B.size(0) == shape.out && lora_B.size(1) == shape.rank, "lora_B must have shape (", shape.out,
                  ", ", shape.rank, ")");
  return shape;
}

// x (T, in), weight (out, in), bias (out,), lora_A (r, in), lora_B (out, r), one dtype. Gives y (T, out) and
// h = drop(x) A^T (T, r), which the backward pass needs.
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                       const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                       int64_t seed) {
  const NoGrad guard;
  const Shape shape = check_shapes(x, weight, lora_A, lora_B);
  check_dropout(dropout_p);
  Tensor y = torch::stable::new_empty(x, {shape.tokens, shape.out});
  Tensor h = torch::stable::new_empty(x, {shape.tokens, shape.rank});
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.out, "bias must have shape (", shape.out, ",)");
    addmm_into(y, *bias, x, transposed(weight), 1.0, 1.0);
  } else {
    mm_into(y, x, transposed(weight));
  }
  if (shape.rank > 0) {
    mm_into(h, dropped(x, dropout_p, seed), transposed(lora_A));
    addmm_into(y, y, h, transposed(lora_B), 1.0, scaling);
  }
  return {y, h};
}

// grad (T, out) and what the forward pass took and gave -> the gradients of x (T, in), lora_A and lora_B. Where
// need_grad_x is false the first is empty, of shape (0,).
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                                        const Tensor& weight, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        int64_t seed, bool need_grad_x) {
  const NoGrad guard;
  const Shape shape = check_shapes(x, weight, lora_A, lora_B);
  check_dropout(dropout_p);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == shape.tokens && grad.size(1) == shape.out,
                  "grad must have shape (", shape.tokens, ", ", shape.out, ")");
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == shape.tokens && h.size(1) == shape.rank, "h must have shape (",
                  shape.tokens, ", ", shape.rank, ")");
  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_A = torch::stable::new_empty(x, {shape.rank, shape.in});
  Tensor grad_B = torch::stable::new_empty(x, {shape.out, shape.rank});
  if (need_grad_x) {
    grad_x = torch::stable::new_empty(x, {shape.tokens, shape.in});
    mm_into(grad_x, grad, weight);
  }
  if (shape.rank == 0) return {grad_x, grad_A, grad_B};

  Tensor q = torch::stable::new_empty(x, {shape.tokens, shape.rank});  // s dY B
  addmm_into(q, q, grad, lora_B, 0.0, scaling);
  mm_into(grad_A, transposed(q), dropped(x, dropout_p, seed));
  addmm_into(grad_B, grad_B, transposed(grad), h, 0.0, scaling);
  if (need_grad_x && !drops_any(dropout_p)) {
    addmm_into(grad_x, grad_x, q, lora_A, 1.0, 1.0);
  } else if (need_grad_x) {
    Tensor grad_dropped = torch::stable::new_empty(x, {shape.tokens, shape.in});
    mm_into(grad_dropped, q, lora_A);
    add_dropped(grad_x, grad_dropped, dropout_p, seed);
  }
  return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&sensilora::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&sensilora::lora_linear_backward));
}
