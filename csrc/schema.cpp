// Every native op of the package. Python calls them as torch.ops.sensilora_C.<op>; their argument rules are
// written at the functions that <op>_cpu.cpp or <op>.h hold.
#include "common.h"

STABLE_TORCH_LIBRARY(sensilora_C, m) {
  m.def("autocorrelation_diag(Tensor x, Tensor? mask, Tensor(a!) out, bool accumulate) -> ()");
  m.def("fisher_diag(Tensor x, Tensor grad, Tensor lengths, int mode, Tensor(a!) out, bool accumulate) -> ()");
  m.def("diagonal_metrics(Tensor[] diags, int[] counts, float alpha) -> (Tensor, Tensor, Tensor)");
  m.def("hutchinson_accumulate(Tensor hz, Tensor(a!) out, int seed, int offset) -> ()");
  m.def("rademacher(Tensor(a!) out, int seed, int offset) -> ()");
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "float scaling, float dropout_p, Tensor? seed, bool need_grad_x) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lora_segments(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, int[] ranks, "
      "float[] scalings, float[] dropout_ps, Tensor offsets, Tensor adapters, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "lora_segments_backward(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "int[] ranks, float[] scalings, float[] dropout_ps, Tensor offsets, Tensor adapters, Tensor? seed, "
      "bool need_grad_x) -> (Tensor, Tensor, Tensor)");
  m.def("dropout(Tensor x, float p, Tensor seed) -> Tensor");
}
