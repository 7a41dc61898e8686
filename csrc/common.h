// What every native op shares: argument checks, typed access to tensors, threading.
// Only torch's stable ABI is used, so a build against one torch loads into later ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu.h"

namespace sensilora {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type sums over elements of T are made in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

SENSILORA_INLINE float to_float(float value) { return value; }
SENSILORA_INLINE double to_float(double value) { return value; }
SENSILORA_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
SENSILORA_INLINE float to_float(Half value) { return static_cast<float>(value); }

// Calls fn with a value of the C++ type that `type` names.
template <class Fn>
void for_floating_type(ScalarType type, const char* name, const Fn& fn) {
  switch (type) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Double: return fn(double{});
    case ScalarType::BFloat16: return fn(BFloat16{});
    case ScalarType::Half: return fn(Half{});
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// A matrix whose rows are contiguous, a row stride apart. Holds the tensor that owns the memory.
struct Matrix {
  Tensor tensor;
  int64_t rows, columns, stride;

  template <class T>
  const T* row(int64_t index) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + index * stride;
  }
};

inline Matrix as_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not ", tensor.dim());
  const bool rows_contiguous = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  Tensor usable = rows_contiguous ? tensor : torch::stable::contiguous(tensor);
  const int64_t stride = usable.stride(0);
  return {usable, tensor.size(0), tensor.size(1), stride};
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline void check_out(const Tensor& out) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::Double,
                  "out must be float32 or float64");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The dispatcher only records gradients of the ops it is called with while grad mode is on; kernels want none.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace sensilora
