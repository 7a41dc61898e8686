// lora_linear with an adapter of its own rank, scaling and dropout for every segment of rows. Each adapter's products
// run over its own rows and rank only; the adapters' matrices lie stacked, one behind the other.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "dropout.h"
#include "lora_segments.h"
#include "products_cpu.h"

namespace sensilora {
namespace {

struct Run {
  int64_t first, count;
};

struct Adapter {
  int64_t first, rank;  // its rows of lora_A and columns of lora_B
  double scaling, dropout_p;
  std::vector<Run> runs;  // its rows of x
  int64_t rows;           // in all runs
};

Tensor rows_of(const Tensor& matrix, const Run& run) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, run.first, run.count);
}

Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, count);
}

Tensor A_of(const Tensor& lora_A, const Adapter& adapter) { return rows_of(lora_A, {adapter.first, adapter.rank}); }
Tensor B_of(const Tensor& lora_B, const Adapter& adapter) { return columns_of(lora_B, adapter.first, adapter.rank); }

// 0 where no adapter drops anything.
int64_t seed_value(const std::optional<Tensor>& seed, const std::vector<double>& dropout_ps, const Tensor& x) {
  const int64_t* value = segments_seed(seed, dropout_ps, x);
  return value == nullptr ? 0 : *value;
}

// The adapters of any rank that have rows.
std::vector<Adapter> adapters_in_use(const SegmentsShape& shape, const std::vector<int64_t>& ranks,
                                     const std::vector<double>& scalings, const std::vector<double>& dropout_ps,
                                     const Tensor& offsets, const Tensor& adapters) {
  std::vector<Adapter> all;
  int64_t first_rank = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    all.push_back({first_rank, ranks[i], scalings[i], dropout_ps[i], {}, 0});
    first_rank += ranks[i];
  }
  const int64_t* offset = int64_data(offsets);
  const int64_t* adapter = int64_data(adapters);
  for (int64_t i = 0; i < shape.segments; ++i) {
    const int64_t first = std::clamp<int64_t>(offset[i], 0, shape.tokens);
    const int64_t count = std::clamp<int64_t>(offset[i + 1], 0, shape.tokens) - first;
    if (count <= 0 || adapter[i] < 0 || adapter[i] >= static_cast<int64_t>(all.size())) continue;
    Adapter& own = all[adapter[i]];
    own.rows += count;
    if (!own.runs.empty() && own.runs.back().first + own.runs.back().count == first)
      own.runs.back().count += count;
    else
      own.runs.push_back({first, count});
  }
  all.erase(std::remove_if(all.begin(), all.end(), [](const Adapter& a) { return a.rank == 0 || a.rows == 0; }),
            all.end());
  return all;
}

// What segments_shape says, and bias (out,) in x's dtype. Gives y (T, out) and h (T, SegmentsShape::h_columns), of
// which a row holds drop(x) A^T in as many columns as its adapter's rank, and zeros behind: on CPUs with AMX oneDNN's
// bf16 product reads its left operand up to a multiple of 32 columns, and a NaN there would come out in spite of the
// zeros it is multiplied by.
std::tuple<Tensor, Tensor> lora_segments(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                         const Tensor& lora_A, const Tensor& lora_B, std::vector<int64_t> ranks,
                                         std::vector<double> scalings, std::vector<double> dropout_ps,
                                         const Tensor& offsets, const Tensor& adapters, std::optional<Tensor> seed) {
  const NoGrad guard;
  const SegmentsShape shape =
      segments_shape(x, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters);
  const std::vector<Adapter> in_use = adapters_in_use(shape, ranks, scalings, dropout_ps, offsets, adapters);
  const int64_t key = seed_value(seed, dropout_ps, x);
  Tensor y = torch::stable::new_empty(x, {shape.tokens, shape.out});
  Tensor h = torch::stable::new_zeros(x, {shape.tokens, shape.h_columns()});
  if (bias.has_value()) {
    check_segments_bias(*bias, shape);
    addmm_into(y, *bias, x, transposed(weight), 1.0, 1.0);
  } else {
    mm_into(y, x, transposed(weight));
  }
  for (const Adapter& adapter : in_use) {
    const Tensor A = A_of(lora_A, adapter), B = B_of(lora_B, adapter);
    for (const Run& run : adapter.runs) {
      Tensor x_run = rows_of(x, run);
      if (drops_any(adapter.dropout_p)) {
        x_run = torch::stable::new_empty(x, {run.count, x.size(1)});
        drop_into(x_run, rows_of(x, run), adapter.dropout_p, key, run.first);
      }
      const Tensor h_run = columns_of(rows_of(h, run), 0, adapter.rank), y_run = rows_of(y, run);
      mm_into(h_run, x_run, transposed(A));
      addmm_into(y_run, y_run, h_run, transposed(B), 1.0, adapter.scaling);
    }
  }
  return {y, h};
}

// The adapter's rows of a matrix, one behind the other, so that a gradient is one product and rounded once: a view
// where they are neighbours, else a copy.
Tensor gathered(const Tensor& matrix, const Adapter& adapter) {
  if (adapter.runs.size() == 1) return rows_of(matrix, adapter.runs[0]);
  Tensor out = torch::stable::new_empty(matrix, {adapter.rows, matrix.size(1)});
  int64_t at = 0;
  for (const Run& run : adapter.runs) {
    Tensor place = rows_of(out, {at, run.count});
    torch::stable::copy_(place, rows_of(matrix, run));
    at += run.count;
  }
  return out;
}

Tensor gathered_dropped(const Tensor& x, const Adapter& adapter, int64_t seed) {
  if (!drops_any(adapter.dropout_p)) return gathered(x, adapter);
  Tensor out = torch::stable::new_empty(x, {adapter.rows, x.size(1)});
  int64_t at = 0;
  for (const Run& run : adapter.runs) {
    drop_into(rows_of(out, {at, run.count}), rows_of(x, run), adapter.dropout_p, seed, run.first);
    at += run.count;
  }
  return out;
}

// grad (T, out) and what the forward pass took and gave -> the gradients of x (T, in), lora_A and lora_B; zero for
// adapters without rows. Where need_grad_x is false the first is empty, of shape (0,).
std::tuple<Tensor, Tensor, Tensor> lora_segments_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, std::vector<int64_t> ranks, std::vector<double> scalings, std::vector<double> dropout_ps,
    const Tensor& offsets, const Tensor& adapters, std::optional<Tensor> seed, bool need_grad_x) {
  const NoGrad guard;
  const SegmentsShape shape =
      segments_shape(x, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters);
  const std::vector<Adapter> in_use = adapters_in_use(shape, ranks, scalings, dropout_ps, offsets, adapters);
  const int64_t key = seed_value(seed, dropout_ps, x);
  check_segments_grad_and_h(grad, h, x, shape);
  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_A = torch::stable::new_zeros(x, {lora_A.size(0), lora_A.size(1)});
  Tensor grad_B = torch::stable::new_zeros(x, {lora_B.size(0), lora_B.size(1)});
  if (need_grad_x) {
    grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    mm_into(grad_x, grad, weight);
  }
  for (const Adapter& adapter : in_use) {
    const Tensor A = A_of(lora_A, adapter), B = B_of(lora_B, adapter);
    const Tensor own_grad = gathered(grad, adapter);
    Tensor q = torch::stable::new_empty(x, {adapter.rows, adapter.rank});  // s dY B
    addmm_into(q, q, own_grad, B, 0.0, adapter.scaling);
    mm_into(A_of(grad_A, adapter), transposed(q), gathered_dropped(x, adapter, key));
    const Tensor grad_B_own = B_of(grad_B, adapter);
    addmm_into(grad_B_own, grad_B_own, transposed(own_grad), gathered(columns_of(h, 0, adapter.rank), adapter), 0.0,
               adapter.scaling);
    if (!need_grad_x) continue;
    int64_t at = 0;
    for (const Run& run : adapter.runs) {
      const Tensor q_run = rows_of(q, {at, run.count}), grad_x_run = rows_of(grad_x, run);
      if (drops_any(adapter.dropout_p)) {
        Tensor grad_dropped = torch::stable::new_empty(x, {run.count, x.size(1)});
        mm_into(grad_dropped, q_run, A);
        add_dropped(grad_x_run, grad_dropped, adapter.dropout_p, key, run.first);
      } else {
        addmm_into(grad_x_run, grad_x_run, q_run, A, 1.0, 1.0);
      }
      at += run.count;
    }
  }
  return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("lora_segments", TORCH_BOX(&sensilora::lora_segments));
  m.impl("lora_segments_backward", TORCH_BOX(&sensilora::lora_segments_backward));
}
