// The diagonal of the empirical Fisher of a weight matrix from a layer's inputs X and output gradients G:
// per sequence, sum over n of (G_n^T X_n)^2, the square taken after the sum over a sequence's tokens; per position,
// (G*G)^T (X*X).
//
// Both are products over tokens, made tile by tile in registers. The per-sequence gradient of the whole matrix never
// exists: a finished tile is squared and added to `out` at once. Every element of `out` is summed by one thread in
// the order of the tokens, so the result does not depend on the number of threads.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common.h"
#include "fisher_diag.h"

#if SENSILORA_X86
#include <immintrin.h>
#endif

namespace sensilora {
namespace {

// Tokens in one pass over a block: more would not fit the caches. A longer sequence takes several passes and keeps
// its unfinished tiles in between.
constexpr int64_t kTokensAtOnce = 128;
// The block of `out` one task owns is at most this large.
constexpr int64_t kBlockRows = 384;
constexpr int64_t kBlockColumns = 512;

// Elements between packed tiles, so that equal places of neighbouring tiles do not fall into one cache set.
constexpr int64_t kPad = 16;

// A tile is what the registers of a level hold: kRows x 2 vectors.
template <class F, int kVectorBytes>
struct Tile {
  static constexpr int kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(F));
  static constexpr int kColumns = 2 * kLanes;
  typedef F Vector __attribute__((vector_size(kVectorBytes)));
  typedef F Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(F)), may_alias));

  SENSILORA_INLINE static Vector load(const F* p) { return *reinterpret_cast<const Unaligned*>(p); }
  SENSILORA_INLINE static void store(F* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

enum class Finish { kKeep, kSquareAdd, kAdd };

// One pass of a tile: where it starts from and what becomes of it.
template <class F>
struct Pass {
  F* kept;         // the unfinished tile, kRows x kColumns
  bool resume;     // start from `kept` instead of zero
  Finish finish;   // kKeep: into `kept`; else added, squared or as it is, to `out`
  F* out;          // the tile's place in the output
  int64_t stride;  // of the output's rows
  int64_t rows, columns;  // the part of the tile that lies inside the output
};

template <class S, class Acc, class P>
SENSILORA_INLINE void start_tile(Acc& acc, const P& pass) {
  for (int r = 0; r < S::kRows; ++r)
    for (int v = 0; v < 2; ++v)
      acc[r][v] = pass.resume ? S::load(pass.kept + r * S::kColumns + v * S::kLanes) : typename S::Vector{};
}

template <class S, class Acc, class P>
SENSILORA_INLINE void finish_tile(const Acc& acc, const P& pass) {
  const bool square = pass.finish == Finish::kSquareAdd;
  const bool inside = pass.rows == S::kRows && pass.columns == S::kColumns;
  if (pass.finish != Finish::kKeep && inside) {
#pragma GCC unroll 12
    for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        auto* out = pass.out + r * pass.stride + v * S::kLanes;
        S::store(out, S::load(out) + (square ? acc[r][v] * acc[r][v] : acc[r][v]));
      }
    return;
  }
#pragma GCC unroll 12
  for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) S::store(pass.kept + r * S::kColumns + v * S::kLanes, acc[r][v]);
  if (pass.finish == Finish::kKeep) return;
  for (int64_t r = 0; r < pass.rows; ++r)
    for (int64_t c = 0; c < pass.columns; ++c) {
      const auto value = pass.kept[r * S::kColumns + c];
      pass.out[r * pass.stride + c] += square ? value * value : value;
    }
}

// tile += g^T x over `tokens` tokens; g and x hold a tile's rows and columns of each token side by side.
template <class F, int kVectorBytes>
SENSILORA_INLINE void run_tile(const F* g, const F* x, int64_t tokens, const Pass<F>& pass) {
  using S = Tile<F, kVectorBytes>;
  typename S::Vector acc[S::kRows][2];
  start_tile<S>(acc, pass);
  for (int64_t t = 0; t < tokens; ++t, g += S::kRows, x += S::kColumns) {
    const auto x0 = S::load(x), x1 = S::load(x + S::kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < S::kRows; ++r) {
      acc[r][0] += g[r] * x0;
      acc[r][1] += g[r] * x1;
    }
  }
  finish_tile<S>(acc, pass);
}

#if SENSILORA_X86
// The same for bfloat16, two tokens at a time: each 32-bit word of g and x holds one value of both.
SENSILORA_AVX512BF16 void run_tile_pairs(const uint32_t* g, const uint32_t* x, int64_t pairs,
                                         const Pass<float>& pass) {
  using S = Tile<float, 64>;
  S::Vector acc[S::kRows][2];
  start_tile<S>(acc, pass);
  for (int64_t t = 0; t < pairs; ++t, g += S::kRows, x += S::kColumns) {
    const auto x0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
    const auto x1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + S::kLanes));
#pragma GCC unroll 12
    for (int r = 0; r < S::kRows; ++r) {
      const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(g[r])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], value, x0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], value, x1);
    }
  }
  finish_tile<S>(acc, pass);
}
#endif

// Copies `columns` values of each token next to each other, `kWidth` a token, zeros behind them.
template <int kWidth, class T, class F>
SENSILORA_INLINE void pack(const T* source, int64_t stride, int64_t tokens, int64_t columns, bool square, F* packed) {
  for (int64_t t = 0; t < tokens; ++t, source += stride, packed += kWidth) {
    if (columns == kWidth) {
#pragma GCC ivdep
      for (int c = 0; c < kWidth; ++c) packed[c] = to_float(source[c]);
    } else {
      for (int c = 0; c < kWidth; ++c) packed[c] = c < columns ? static_cast<F>(to_float(source[c])) : F{0};
    }
    if (square)
      for (int c = 0; c < kWidth; ++c) packed[c] *= packed[c];
  }
}

// The same with the values of two tokens in each 32-bit word, the earlier token's in the lower half.
template <int kWidth>
SENSILORA_INLINE void pack_pairs(const BFloat16* source, int64_t stride, int64_t tokens, int64_t columns,
                                 uint32_t* packed) {
  for (int64_t t = 0; t < tokens; t += 2, source += 2 * stride, packed += kWidth) {
    const BFloat16* next = t + 1 < tokens ? source + stride : nullptr;
    if (columns == kWidth && next != nullptr) {
#pragma GCC ivdep
      for (int c = 0; c < kWidth; ++c) packed[c] = source[c].x | static_cast<uint32_t>(next[c].x) << 16;
    } else {
      for (int c = 0; c < kWidth; ++c) {
        const uint32_t later = next != nullptr && c < columns ? next[c].x : 0;
        packed[c] = (c < columns ? source[c].x : 0) | later << 16;
      }
    }
  }
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Packs a block tile by tile, a few tokens at a time so that the strided reads stay within few cache lines and pages.
template <int kWidth, bool kPairs, class T, class Packed>
SENSILORA_INLINE void pack_block(const Matrix& matrix, Range columns, Range tokens, bool square, Packed* packed,
                                 int64_t tile_stride) {
  constexpr int64_t kGroup = 8;
  for (int64_t t = tokens.begin; t < tokens.end; t += kGroup) {
    const int64_t count = std::min(kGroup, tokens.end - t);
    const int64_t done = (t - tokens.begin) / (kPairs ? 2 : 1);
    Packed* tile = packed + done * kWidth;
    for (int64_t c = columns.begin; c < columns.end; c += kWidth, tile += tile_stride) {
      const T* source = matrix.row<T>(t) + c;
      const int64_t width = std::min<int64_t>(kWidth, columns.end - c);
      if constexpr (kPairs)
        pack_pairs<kWidth>(source, matrix.stride, count, width, tile);
      else
        pack<kWidth>(source, matrix.stride, count, width, square, tile);
    }
  }
}

template <class T>
struct Problem {
  Matrix x, g;
  std::vector<Range> passes;  // of tokens
  std::vector<Finish> finish;  // of each pass
  bool square_inputs;
  accumulate_t<T>* out;
};

template <class F>
struct FreeAligned {
  void operator()(F* pointer) const { ::operator delete[](pointer, std::align_val_t{64}); }
};
template <class F>
using Buffer = std::unique_ptr<F[], FreeAligned<F>>;
template <class F>
Buffer<F> allocate(int64_t size) {
  return Buffer<F>(new (std::align_val_t{64}) F[size]);
}

// All passes over one block of `out`.
template <class T, bool kPairs>
struct RunBlock {
  template <int kVectorBytes>
  SENSILORA_INLINE static void run(const Problem<T>* problem, Range rows, Range columns) {
    using F = accumulate_t<T>;
    using S = Tile<F, kVectorBytes>;
    using Packed = std::conditional_t<kPairs, uint32_t, F>;
    constexpr int64_t kR = S::kRows, kC = S::kColumns;
    const int64_t row_tiles = ceil_div(rows.size(), kR), column_tiles = ceil_div(columns.size(), kC);
    int64_t longest = 0;
    for (const Range& tokens : problem->passes) longest = std::max(longest, tokens.size());
    const Buffer<Packed> g = allocate<Packed>(row_tiles * (longest * kR + kPad));
    const Buffer<Packed> x = allocate<Packed>(column_tiles * (longest * kC + kPad));
    const Buffer<F> kept = allocate<F>(row_tiles * kR * column_tiles * kC);
    bool resume = false;
    for (size_t p = 0; p < problem->passes.size(); ++p) {
      const Range tokens = problem->passes[p];
      const int64_t depth = kPairs ? ceil_div(tokens.size(), 2) : tokens.size();
      pack_block<S::kRows, kPairs, T>(problem->g, rows, tokens, problem->square_inputs, g.get(), depth * kR + kPad);
      pack_block<S::kColumns, kPairs, T>(problem->x, columns, tokens, problem->square_inputs, x.get(),
                                         depth * kC + kPad);
      const int64_t stride = problem->x.columns;
      for (int64_t j = 0; j < column_tiles; ++j)
        for (int64_t i = 0; i < row_tiles; ++i) {
          const int64_t row = rows.begin + i * kR, column = columns.begin + j * kC;
          const Pass<F> pass{&kept[(j * row_tiles + i) * kR * kC],
                             resume,
                             problem->finish[p],
                             problem->out + row * stride + column,
                             stride,
                             std::min<int64_t>(kR, rows.end - row),
                             std::min<int64_t>(kC, columns.end - column)};
#if SENSILORA_X86
          if constexpr (kPairs) {
            run_tile_pairs(&g[i * (depth * kR + kPad)], &x[j * (depth * kC + kPad)], depth, pass);
            continue;
          }
#endif
          if constexpr (!kPairs) run_tile<F, kVectorBytes>(&g[i * (depth * kR + kPad)], &x[j * (depth * kC + kPad)], depth, pass);
        }
      resume = problem->finish[p] == Finish::kKeep;
    }
  }
};

// Cuts [0, size) into `parts` ranges of nearly equal size, each but the last a multiple of `unit`.
Range part_of(int64_t size, int64_t parts, int64_t unit, int64_t index) {
  const int64_t step = ceil_div(ceil_div(size, parts), unit) * unit;
  return {std::min(size, index * step), std::min(size, (index + 1) * step)};
}

template <class T>
void run(const Problem<T>& problem) {
  const int64_t rows = problem.g.columns, columns = problem.x.columns;
  int64_t row_parts = ceil_div(rows, kBlockRows), column_parts = ceil_div(columns, kBlockColumns);
  const int64_t threads = torch::stable::get_num_threads();
  while (row_parts * column_parts < 2 * threads && row_parts * 24 < rows) row_parts *= 2;
  bool pairs = false;
#if SENSILORA_X86
  pairs = std::is_same_v<T, BFloat16> && !problem.square_inputs && cpu_level() == CpuLevel::kAvx512Bf16;
#endif
  torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const Range row_range = part_of(rows, row_parts, 12, task / column_parts);
      const Range column_range = part_of(columns, column_parts, 32, task % column_parts);
      if (row_range.size() == 0 || column_range.size() == 0) continue;
      if constexpr (std::is_same_v<T, BFloat16> && SENSILORA_X86) {
        if (pairs) {
          run_avx512<RunBlock<T, true>>(&problem, row_range, column_range);
          continue;
        }
      }
      dispatch<RunBlock<T, false>>(&problem, row_range, column_range);
    }
  });
}

// Passes that each lie within one sequence; the last of a sequence squares.
template <class T>
void plan_sequences(Problem<T>& problem, const int64_t* lengths, int64_t count) {
  int64_t begin = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t end = begin + lengths[n];
    for (; begin < end; begin = problem.passes.back().end) {
      problem.passes.push_back({begin, std::min(end, begin + kTokensAtOnce)});
      problem.finish.push_back(problem.passes.back().end == end ? Finish::kSquareAdd : Finish::kKeep);
    }
  }
}

template <class T>
void plan_positions(Problem<T>& problem) {
  for (int64_t begin = 0; begin < problem.x.rows; begin += kTokensAtOnce) {
    problem.passes.push_back({begin, std::min(problem.x.rows, begin + kTokensAtOnce)});
    problem.finish.push_back(Finish::kAdd);
  }
}

void fisher_diag(const Tensor& x, const Tensor& grad, const Tensor& lengths, int64_t mode, Tensor out,
                 bool accumulate) {
  const NoGrad guard;
  const FisherInput input = fisher_input(x, grad, lengths, mode, out);

  for_floating_type(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    using F = accumulate_t<T>;
    constexpr ScalarType kType = std::is_same_v<F, double> ? ScalarType::Double : ScalarType::Float;
    // Tiles are added to `out` in the type they are made in.
    Tensor target = out.scalar_type() == kType ? out : torch::stable::new_empty(out, out.sizes(), kType);
    if (target.get() != out.get() || !accumulate) torch::stable::zero_(target);
    Problem<T> problem{input.x, input.g, {}, {}, mode == kPerPosition, static_cast<F*>(target.mutable_data_ptr())};
    if (mode == kPerSequence)
      plan_sequences(problem, input.lengths, input.sequences);
    else
      plan_positions(problem);
    run(problem);
    if (target.get() == out.get()) return;
    if (!accumulate) torch::stable::zero_(out);
    const int64_t size = out.numel();
    using Other = std::conditional_t<std::is_same_v<F, double>, float, double>;
    Other* to = static_cast<Other*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < size; ++i) to[i] += static_cast<Other>(problem.out[i]);
  });
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CPU, m) {
  m.impl("fisher_diag", TORCH_BOX(&sensilora::fisher_diag));
}
