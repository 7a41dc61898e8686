// torch's own CUDA products, into tensors that are already there (any strides).
#pragma once

#include "cuda_common.cuh"

namespace sensilora {

// out = beta * self + alpha * (a b). `self` may be `out`; where beta is 0 it is not read.
inline void addmm_into_cuda(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                            double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

inline void mm_into_cuda(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace sensilora
