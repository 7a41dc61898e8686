// torch's own CPU products, into tensors that are already there (any strides).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"

namespace sensilora {

// out = beta * self + alpha * (a b). `self` may be `out`; where beta is 0 it is not read.
inline void addmm_into(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                       double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

inline void mm_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace sensilora
