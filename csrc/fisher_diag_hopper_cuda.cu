// fisher_diag per sequence on Hopper: how the work is divided, and the launch. fisher_diag_hopper.cuh has the kernel.
#include <algorithm>
#include <vector>

#include "cuda_common.cuh"
#include "fisher_diag_hopper.cuh"
#include "fisher_diag_hopper.h"

namespace sensilora {
namespace {

#if SENSILORA_WITH_HOPPER

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: torch does not link the driver's library.
EncodeTiled encode_tiled() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#else
    STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(function != nullptr, "the CUDA driver has no cuTensorMapEncodeTiled; a newer one is needed");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

// How the copy engine finds boxes of 64 columns and `box_rows` rows in a matrix of 16-bit numbers.
CUtensorMap map_of(const Matrix& matrix, int box_rows) {
  const bool half = matrix.tensor.scalar_type() == ScalarType::Half;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  // One row may have any stride.
  const int64_t stride = matrix.rows > 1 ? matrix.stride : matrix.columns;
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode_tiled()(
      &map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(matrix.tensor.const_data_ptr()), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

template <class Tile>
void run(const FisherInput& input, const std::vector<int64_t>& starts, const Tensor& out, bool accumulate) {
  const cudaStream_t stream = current_stream(out);
  const auto out_features = static_cast<int>(input.g.columns), in_features = static_cast<int>(input.x.columns);
  const int64_t row_tiles = ceil_div(out_features, Tile::kRows * kHopperCluster);
  const int64_t column_tiles = ceil_div(in_features, Tile::kColumns), tiles = row_tiles * column_tiles;
  const int64_t clusters = multiprocessors() / kHopperCluster, sequences = static_cast<int64_t>(starts.size()) - 1;
  STD_TORCH_CHECK(tiles <= 0x7FFFFFFF / 16, "x and grad have too many columns");
  const int splits = hopper_splits(tiles, clusters, sequences);
  const int64_t divided = splits > 1 ? tiles % clusters : 0;
  std::vector<int64_t> words = starts;
  const std::vector<int64_t> bounds = hopper_bounds(starts, splits);
  words.insert(words.end(), bounds.begin(), bounds.end());
  const Tensor on_device = words_on_device(words, out);
  const auto* at = static_cast<const int64_t*>(on_device.const_data_ptr());
  const HopperWork work{at,
                        at + starts.size(),
                        static_cast<int>(sequences),
                        static_cast<int>(row_tiles),
                        static_cast<int>(column_tiles),
                        static_cast<int>(tiles - divided),
                        splits,
                        static_cast<int>(tiles - divided + divided * splits)};
  const HopperOut to{static_cast<float*>(out.mutable_data_ptr()), out_features, in_features, accumulate};
  Tensor partial = out;
  if (divided > 0)
    partial = torch::stable::new_empty(out, {divided * splits, kHopperCluster, Tile::kRows, Tile::kColumns});
  auto* parts = static_cast<float*>(partial.mutable_data_ptr());

  const auto kernel = fisher_diag_hopper_kernel<Tile>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(clusters, work.units) * kHopperCluster));
  launch.blockDim = dim3(kHopperThreads);
  launch.dynamicSmemBytes = Tile::kSharedBytes;
  launch.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kHopperCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, map_of(input.g, kHopperTokens),
                                    map_of(input.x, kHopperTokens / kHopperCluster), work, to, parts));
  if (divided == 0) return;
  const unsigned blocks = grid_size(divided * kHopperCluster * 2 * (Tile::kSums / 2));
  fisher_diag_hopper_sum_kernel<Tile><<<blocks, 128, 0, stream>>>(parts, work, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

bool on_hopper() {
  int device = 0, major = 0, minor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

bool readable(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.tensor.const_data_ptr()) % 16 == 0 && matrix.stride % 8 == 0 &&
         matrix.columns % 8 == 0 && matrix.columns < 0x7FFF0000 && matrix.rows < 0x7FFF0000;
}

#endif

}  // namespace

bool fisher_diag_hopper(const FisherInput& input, const Tensor& out, bool accumulate) {
#if SENSILORA_WITH_HOPPER
  const ScalarType dtype = input.x.tensor.scalar_type();
  if ((dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) || out.scalar_type() != ScalarType::Float ||
      reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 8 != 0 || !readable(input.x) || !readable(input.g) ||
      !on_hopper())
    return false;
  std::vector<int64_t> starts{0};
  int64_t longest = 0;
  for (int64_t n = 0; n < input.sequences; ++n) {
    const int64_t length = input.lengths[n];
    if (length > 0) starts.push_back(starts.back() + length);
    longest = std::max(longest, length);
  }
  if (longest == 0) return false;
  const bool is_long = longest > kLongSteps * kHopperTokens;
  if (dtype == ScalarType::Half)
    is_long ? run<HopperTile<HalfProducts, 2, true>>(input, starts, out, accumulate)
            : run<HopperTile<HalfProducts, 3, false>>(input, starts, out, accumulate);
  else
    is_long ? run<HopperTile<Bfloat16Products, 2, true>>(input, starts, out, accumulate)
            : run<HopperTile<Bfloat16Products, 3, false>>(input, starts, out, accumulate);
  return true;
#else
  return false;
#endif
}

}  // namespace sensilora
