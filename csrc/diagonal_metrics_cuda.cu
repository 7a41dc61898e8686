// Trace, mean of the largest values and effective rank of many diagonals on CUDA. All passes over all of them are
// queued without waiting for the device.
#include <algorithm>
#include <type_traits>

#include "cuda_common.cuh"
#include "diagonal_metrics.h"
#include "diagonal_metrics_kernels.cuh"

namespace sensilora {
namespace {

using namespace metrics;

static_assert(kNonFinite == kNonFiniteDiagonal && kNegative == kNegativeDiagonal);
static_assert(sizeof(Values) == 4 * sizeof(int64_t) && std::is_trivially_copyable_v<Values>);

// Blocks a multiprocessor has: their tables of exponents are a large part of its shared memory.
constexpr int64_t kResident = 2;

template <class T, class Pass>
void run_pass(const Batch& batch, unsigned blocks, cudaStream_t stream) {
  if (batch.chunks == 0) return;
  constexpr int kBytes = Pass::kWords * sizeof(uint32_t);
  const auto kernel = pass_kernel<T, Pass>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  // Values are read once and need no first-level cache.
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  kernel<<<blocks, kThreads, kBytes, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void run(const Batch& batch, double alpha, const DiagonalMetrics& out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(batch.chunks, kResident * multiprocessors()));
  const auto matrices = static_cast<unsigned>(batch.matrices);
  run_pass<T, ExponentPass>(batch, blocks, stream);
  exponent_cuts_kernel<<<matrices, kExponents, 0, stream>>>(batch, alpha);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  run_pass<T, DigitPass>(batch, blocks, stream);
  digit_cuts_kernel<<<matrices, kThreads, 0, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  run_pass<T, TailPass>(batch, blocks, stream);
  finish_kernel<<<matrices, kThreads, 0, stream>>>(batch, static_cast<double*>(std::get<0>(out).mutable_data_ptr()),
                                                   static_cast<double*>(std::get<1>(out).mutable_data_ptr()),
                                                   static_cast<int64_t*>(std::get<2>(out).mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

DiagonalMetrics diagonal_metrics(std::vector<Tensor> diags, std::vector<int64_t> counts, double alpha) {
  const NoGrad no_grad;
  check_diagonals(diags, counts, alpha);
  const DeviceGuard device(diags[0].get_device_index());
  std::vector<int64_t> words;
  int64_t chunks = 0;
  for (size_t i = 0; i < diags.size(); ++i) {
    STD_TORCH_CHECK(diags[i].get_device_index() == diags[0].get_device_index(), "diags must share a device");
    diags[i] = torch::stable::contiguous(diags[i]);
    const int64_t size = diags[i].numel();
    for (const int64_t word : {reinterpret_cast<int64_t>(diags[i].const_data_ptr()), size, chunks, counts[i]})
      words.push_back(word);
    chunks += ceil_div(size, kChunk);
  }
  for (const int64_t word : {int64_t{0}, int64_t{0}, chunks, int64_t{0}}) words.push_back(word);

  const Tensor& like = diags[0];
  const auto matrices = static_cast<int64_t>(diags.size());
  const cudaStream_t stream = current_stream(like);
  const Tensor values = words_on_device(words, like);
  const Tensor work = torch::stable::new_empty(like, {matrices * static_cast<int64_t>(sizeof(Work))}, ScalarType::Byte);
  STD_CUDA_CHECK(cudaMemsetAsync(work.mutable_data_ptr(), 0, work.numel(), stream));
  const DiagonalMetrics out{torch::stable::new_empty(like, {matrices}, ScalarType::Double),
                            torch::stable::new_empty(like, {matrices}, ScalarType::Double),
                            torch::stable::new_empty(like, {matrices}, ScalarType::Long)};
  const Batch batch{static_cast<const Values*>(values.const_data_ptr()), static_cast<Work*>(work.mutable_data_ptr()),
                    matrices, chunks};
  switch (like.scalar_type()) {
    case ScalarType::BFloat16: run<Bfloat16Values>(batch, alpha, out, stream); break;
    case ScalarType::Half: run<HalfValues>(batch, alpha, out, stream); break;
    default: run<FloatValues>(batch, alpha, out, stream);
  }
  return out;
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) {
  m.impl("diagonal_metrics", TORCH_BOX(&sensilora::diagonal_metrics));
}
