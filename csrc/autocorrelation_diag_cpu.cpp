// diag(X^T X): for each column the sum of squares over the counted rows.
#include <algorithm>
#include <optional>
#include <vector>

#include "autocorrelation_diag.h"

namespace sensilora {
namespace {

constexpr int kRowsAtOnce = 8;
constexpr int64_t kMinChunkRows = 64;
constexpr int64_t kMaxChunks = 64;

// sums[j] += rows[0][j]^2 + rows[1][j]^2 + ... in float64, where the square of a float32 is exact.
template <class T, int kRows>
struct AddSquares {
  template <int kVectorBytes>
  SENSILORA_INLINE static void run(const T* const* rows, double* sums, int64_t columns) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows[r];
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      double sum = sums[j];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const double value = to_float(row[r][j]);
        sum += value * value;
      }
      sums[j] = sum;
    }
  }
};

template <class T>
void add_chunk(const Matrix& x, const bool* mask, int64_t begin, int64_t end, double* sums) {
  const T* rows[kRowsAtOnce];
  int gathered = 0;
  for (int64_t index = begin; index < end; ++index) {
    if (mask != nullptr && !mask[index]) continue;
    rows[gathered++] = x.row<T>(index);
    if (gathered == kRowsAtOnce) {
      dispatch<AddSquares<T, kRowsAtOnce>>(&rows[0], sums, x.columns);
      gathered = 0;
    }
  }
  for (int r = 0; r < gathered; ++r) dispatch<AddSquares<T, 1>>(&rows[r], sums, x.columns);
}

template <class Out>
void write_sums(const std::vector<double>& partial, int64_t chunks, const Tensor& out, bool accumulate) {
  const int64_t columns = out.size(0), stride = out.stride(0);
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  for (int64_t j = 0; j < columns; ++j) {
    double sum = accumulate ? static_cast<double>(to[j * stride]) : 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * columns + j];
    to[j * stride] = static_cast<Out>(sum);
  }
}

// The rows are cut into chunks that depend on the shape alone, and the chunks are added in order, so the result
// does not depend on the number of threads.
void autocorrelation_diag(const Tensor& x_tensor, std::optional<Tensor> mask, Tensor out, bool accumulate) {
  const NoGrad guard;
  const DiagArguments arguments(x_tensor, mask, out);
  const Matrix& x = arguments.x;
  const bool* counted = arguments.counted();
  const int64_t chunk_rows = std::max(kMinChunkRows, ceil_div(x.rows, kMaxChunks));
  const int64_t chunks = ceil_div(x.rows, chunk_rows);
  std::vector<double> partial(chunks * x.columns, 0.0);
  for_floating_type(x_tensor.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        add_chunk<T>(x, counted, c * chunk_rows, std::min(x.rows, (c + 1) * chunk_rows), &partial[c * x.columns]);
    });
  });
  if (out.scalar_type() == ScalarType::Double)
    write_sums<double>(partial, chunks, out, accumulate);
  else
    write_sums<float>(partial, chunks, out, accumulate);
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("autocorrelation_diag", TORCH_BOX(&sensilora::autocorrelation_diag));
}
