// What the CUDA ops share. Only torch's stable ABI is used, as in common.h.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // shows the CUDA part of torch's C interface; torch's own builds say so, extensions do not always
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "common.h"

namespace sensilora {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// A copy of `words` (at least one) in int64 on `like`'s device. They travel as arguments of kernels: without waiting
// for the device, without pinned memory that must outlive the copy, and into captured graphs too.
Tensor words_on_device(const std::vector<int64_t>& words, const Tensor& like);

// drop(x) of a 2-D x, or x itself where nothing is dropped; into += drop(x). seed may be null where p is 0.
Tensor dropped_cuda(const Tensor& x, double p, const int64_t* seed);
void add_dropped_cuda(const Tensor& into, const Tensor& x, double p, const int64_t* seed);

}  // namespace sensilora
