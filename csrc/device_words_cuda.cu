// Few numbers from the host to the device.
#include <algorithm>

#include "cuda_common.cuh"

namespace sensilora {
namespace {

constexpr int kMostWords = 480;  // of the 4 KB that arguments may take

struct Words {
  int64_t word[kMostWords];
};

__global__ void __launch_bounds__(kMostWords) words_kernel(Words words, int64_t* __restrict__ to, int count) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = words.word[threadIdx.x];
}

}  // namespace

Tensor words_on_device(const std::vector<int64_t>& words, const Tensor& like) {
  const auto size = static_cast<int64_t>(words.size());
  Tensor to = torch::stable::new_empty(like, {size}, ScalarType::Long);
  auto* at = static_cast<int64_t*>(to.mutable_data_ptr());
  for (int64_t first = 0; first < size; first += kMostWords) {
    const auto count = static_cast<int>(std::min<int64_t>(kMostWords, size - first));
    Words some = {};
    std::copy_n(words.begin() + first, count, some.word);
    words_kernel<<<1, kMostWords, 0, current_stream(like)>>>(some, at + first, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return to;
}

}  // namespace sensilora
