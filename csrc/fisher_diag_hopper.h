// fisher_diag's way for Hopper, which fisher_diag_cuda.cu asks first.
#pragma once

#include "fisher_diag.h"

namespace sensilora {

// out = or += the sum over sequences of (G_n^T X_n)^2; false, with nothing done, where another kernel has to serve: on
// another GPU, for other dtypes than 16-bit inputs and a float out, and for rows that the copy engine cannot read.
bool fisher_diag_hopper(const FisherInput& input, const Tensor& out, bool accumulate);

}  // namespace sensilora
