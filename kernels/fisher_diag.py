"""The Fisher diagonal of a linear layer as one product that squares its own sums in registers.

    per_sequence   out += Σ_n (G_nᵀ X_n)²              2 T in out FLOP, as the weight gradient
    per_position   out += (G∘G)ᵀ (X∘X)                 three products of bf16, see below

A program owns a tile of out and walks all rows; where a sequence ends, the sum is squared into another accumulator
and starts again, so no gradient of a sequence is ever stored. The walk is one loop over steps of BLOCK_K rows, those
of all sequences one after the other, so that the loads of the next sequence are under way while one ends.

On Hopper tiles come by TMA, and sequences begin at multiples of BLOCK_K rows: a copy padded with zeros is made where
they do not. (Reading each step's first row from a table instead cost 15 to 25% of the product, subtracting what a
tile read of the next sequence 70%.) Elsewhere a table says where each step begins and how many rows it has.

A tensor core cuts off what it adds to a sum, so long sums of one sign fall short; a few steps at a time are summed
there, and those sums in fp32 proper.

The square of a bf16 number has 16 significant bits: it is the sum of two bf16 numbers. per_position multiplies these
in three of the four combinations; the fourth is below 2^-18 of the result. Squares of fp16 and fp32 numbers go to
three TF32 products, which drop as little.

Nothing is atomic, so results repeat bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sensilora.kernels._common import multiprocessors, sum_partials

# BLOCK of out_features, BLOCK of in_features, BLOCK_K, GROUP, num_warps, num_stages. Three fp32 accumulators of
# 128x128 are what 8 warps can hold.
TMA_CONFIG = (128, 128, 64, 8, 8, 5)
CONFIG = (128, 64, 32, 8, 8, 3)
SMALL_CONFIG = (64, 64, 32, 8, 4, 3)
TMA_MIN_FEATURES = 128
# Steps whose sum is left to the tensor cores; fp32 takes six of their instructions where bf16 takes one.
TMA_CHUNK = tl.constexpr(8)
CHUNK = 4
# Rows of squares that are stored at a time.
SQUARED_ROWS = 16384
REDUCE_BLOCK = 1024


@triton.jit
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the program's tile: GROUP rows of tiles share their columns while these are in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    return first + program % (GROUP * tiles_n) % group, program % (GROUP * tiles_n) // group


@triton.jit
def _fisher_tma_kernel(
    grad,
    x,
    out,
    counts,
    splits,
    rows,
    out_features,
    in_features,
    POSITION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (number of splits * out_features, in_features) = or += Σ_n (G_nᵀ X_n)² over a split's steps.

    grad (rows, out_features), x (rows, in_features) and out are tensor descriptors. counts holds the steps of each
    sequence; splits the first step and sequence of every split. With POSITION grad and x are squares, their high
    halves above their low ones, and no sums are squared.
    """
    tile_m, tile_n = _tile(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N), GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    split = tl.program_id(1)
    first, last = tl.load(splits + 2 * split), tl.load(splits + 2 * split + 2)
    steps = last - first
    sequence = counts + tl.load(splits + 2 * split + 1)
    # Steps left of the sequence, and those of the next one, fetched while this one runs.
    left, upcoming = steps, steps
    if not POSITION:
        left, upcoming = tl.load(sequence), tl.load(sequence + 1)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for turn in tl.range(0, 3 * steps if POSITION else steps, num_stages=STAGES):
        grad_row = (first + turn) * BLOCK_K
        x_row = grad_row
        if POSITION:
            # low * high, high * low, high * high, one after the other.
            product = turn // steps
            x_row -= product * steps * BLOCK_K
            grad_row = x_row + tl.where(product == 0, rows, 0)
            x_row += tl.where(product == 1, rows, 0)
        part = tl.dot(grad.load([grad_row, first_m]).T, x.load([x_row, first_n]), part)
        left -= 1
        if left % TMA_CHUNK == 0:
            if POSITION:
                total += part
            else:
                gradient += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if left == 0:
                if not POSITION:
                    total += gradient * gradient
                    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    sequence += 1
                left = upcoming
                if not POSITION:
                    upcoming = tl.load(sequence + 1)
    first_m += split * out_features
    low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    if ACCUMULATE:
        low += out.load([first_m, first_n])
        high += out.load([first_m, first_n + BLOCK_N // 2])
    out.store([first_m, first_n], low)
    out.store([first_m, first_n + BLOCK_N // 2], high)


@triton.jit
def _fisher_kernel(
    grad,
    x,
    out,
    table,
    splits,
    out_features,
    in_features,
    ACCUMULATE: tl.constexpr,
    EVEN: tl.constexpr,
    POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same from pointers, of any alignment and size; with POSITION what is summed are the products of squares.

    table holds the first row and the number of rows of each step, and 1 where a chunk ends, 2 where a sequence does.
    """
    tile_m, tile_n = _tile(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N), GROUP)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = tl.load(splits + split), tl.load(splits + split + 1)
    row, here = tl.load(table + 3 * first), tl.load(table + 3 * first + 1)
    for step in tl.range(first, last, num_stages=STAGES):
        # A step's rows are fetched one step ahead, since the tiles wait for them.
        next_row, next_here = tl.load(table + 3 * step + 3), tl.load(table + 3 * step + 4)
        inside = (k < here)[:, None]
        inside_m, inside_n = inside, inside
        if not EVEN:
            inside_m, inside_n = inside & (m < out_features)[None, :], inside & (n < in_features)[None, :]
        rows = (row + k).to(tl.int64)[:, None]
        grad_tile = tl.load(grad + rows * out_features + m[None, :], mask=inside_m, other=0.0)
        x_tile = tl.load(x + rows * in_features + n[None, :], mask=inside_n, other=0.0)
        if POSITION:
            left, right = grad_tile.to(tl.float32), x_tile.to(tl.float32)
            left, right = left * left, right * right
            if grad_tile.dtype == tl.bfloat16:
                left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
                left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
                right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
                part = tl.dot(tl.trans(left_low), right_high, part)
                part = tl.dot(tl.trans(left_high), right_low, part)
                part = tl.dot(tl.trans(left_high), right_high, part)
            else:
                part = tl.dot(tl.trans(left), right, part, input_precision=PRECISION)
        else:
            part = tl.dot(tl.trans(grad_tile), x_tile, part, input_precision=PRECISION)
        ends = tl.load(table + 3 * step + 2)
        if ends != 0:
            if POSITION:
                total += part
            else:
                gradient += part
                if ends == 2:
                    total += gradient * gradient
                    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        row, here = next_row, next_here
    pointers = out + (split.to(tl.int64) * out_features + m[:, None]) * in_features + n[None, :]
    inside = (m < out_features)[:, None] & (n < in_features)[None, :]
    total = total.to(out.dtype.element_ty)
    if ACCUMULATE:
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, total, mask=inside)


@triton.jit
def _fisher_align_kernel(
    source, out, table, columns, low_offset, SQUARE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Rows of source (rows, columns) to the steps of out, zero behind a sequence's end; a program has one step.

    With SQUARE their squares, as the bf16 numbers nearest to them and, low_offset elements behind, what is left.
    """
    step = tl.program_id(0)
    first, here = tl.load(table + 3 * step), tl.load(table + 3 * step + 1)
    t = tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < columns)[None, :]
    tile = tl.load(
        source + (first + t).to(tl.int64)[:, None] * columns + c[None, :],
        mask=(t < here)[:, None] & inside,
        other=0.0,
    )
    pointers = out + (step * BLOCK_T + t).to(tl.int64)[:, None] * columns + c[None, :]
    if SQUARE:
        square = tile.to(tl.float32) * tile.to(tl.float32)
        tile = square.to(tile.dtype)
        tl.store(pointers + low_offset, (square - tile.to(tl.float32)).to(tile.dtype), mask=inside)
    tl.store(pointers, tile, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _fisher_reduce_kernel(partial, out, stride, size, splits, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """out (size,) = or += the sum of the first size elements of partial (splits, stride) over splits, in order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = sum_partials(partial, index, stride, splits, 4).to(out.dtype.element_ty)
    if ACCUMULATE:
        total += tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, total, mask=inside)


@functools.lru_cache(maxsize=64)
def _steps(lengths: tuple[int, ...], block_k: int, splits: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What the kernels read of the sequences' lengths (above 0): table, counts, and the splits of either kernel.

    Splits take about the same number of steps each and end where sequences do. Kept for later calls: all layers of a
    model see a batch's lengths.
    """
    rows = torch.tensor(lengths)
    counts = (rows + block_k - 1) // block_k
    sequence = torch.arange(len(lengths)).repeat_interleave(counts)
    ends = counts.cumsum(0)
    within = torch.arange(len(sequence)) - (ends - counts)[sequence]
    here = (rows[sequence] - within * block_k).clamp(max=block_k)
    first_row = (rows.cumsum(0) - rows)[sequence] + within * block_k
    kind = torch.where(within == counts[sequence] - 1, 2, ((within + 1) % CHUNK == 0).long())
    table = torch.stack([first_row, here, kind], dim=1)
    wanted = torch.arange(1, splits) * len(sequence) // splits
    first_sequence = torch.cat([torch.searchsorted(ends, wanted) + 1, torch.tensor([len(lengths)])])
    first_sequence = torch.nn.functional.pad(first_sequence, (1, 0))
    starts = torch.nn.functional.pad(ends, (1, 0))[first_sequence]
    # Two entries more, which are fetched and not used.
    table, counts = torch.nn.functional.pad(table, (0, 0, 0, 1)), torch.nn.functional.pad(counts, (0, 2))
    both = torch.stack([starts, first_sequence], dim=1)
    found = [t.to(torch.int32).contiguous() for t in (table, counts, both, starts)]
    if device.type == "cuda":
        # From pinned memory, so that nothing waits for what the device has still to do.
        found = [t.pin_memory().to(device, non_blocking=True) for t in found]
    return tuple(found)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _by_tma(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, position: bool) -> bool:
    """Whether tensor descriptors can read all three, and the tiles are not mostly outside."""
    return (
        x.dtype in ((torch.bfloat16,) if position else (torch.bfloat16, torch.float16))
        and out.dtype == torch.float32
        and _is_hopper(x.device)
        and all(t.shape[1] >= TMA_MIN_FEATURES and t.shape[1] % 8 == 0 for t in (x, grad))
        and all(t.data_ptr() % 16 == 0 for t in (x, grad, out))
    )


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _aligned(source: torch.Tensor, table: torch.Tensor, block_k: int, *, square: bool) -> torch.Tensor:
    """source (rows, columns) with every step's rows apart; with `square` their squares in two halves."""
    steps, columns = table.shape[0] - 1, source.shape[1]
    rows, block_c = steps * block_k, 128
    out = torch.empty(rows * (2 if square else 1), columns, dtype=source.dtype, device=source.device)
    _fisher_align_kernel[(steps, _cdiv(columns, block_c))](
        source, out, table, columns, rows * columns, SQUARE=square, BLOCK_T=block_k, BLOCK_C=block_c, num_warps=4
    )
    return out


def launch_fisher_diag(
    x: torch.Tensor, grad: torch.Tensor, lengths: torch.Tensor, convention: str, out: torch.Tensor, accumulate: bool
) -> None:
    """Write the Fisher diagonal of packed rows to `out`, or add it.

    Args:
        x: (rows, in_features), contiguous.
        grad: (rows, out_features), contiguous, x's dtype.
        lengths: (sequences,) int64 on the CPU, summing to rows.
        convention: "per_sequence" or "per_position".
        out: (out_features, in_features), fp32 or fp64, contiguous.
        accumulate: add to `out` where true; overwrite it where false.
    """
    lengths = lengths[lengths > 0]
    position, rows = convention == "per_position", x.shape[0]
    if out.numel() == 0 or rows == 0:
        if not accumulate:
            out.zero_()
        return
    if not position:
        _launch(x, grad, tuple(lengths.tolist()), False, out, accumulate)
        return
    # Sums over positions know no sequences; pieces let programs share the work.
    for first in range(0, rows, SQUARED_ROWS):
        some_x, some_grad = x[first : first + SQUARED_ROWS], grad[first : first + SQUARED_ROWS]
        _launch(some_x, some_grad, _pieces(some_x.shape[0]), True, out, accumulate or first > 0)


def _launch(
    x: torch.Tensor, grad: torch.Tensor, lengths: tuple[int, ...], position: bool, out: torch.Tensor, accumulate: bool
) -> None:
    out_features, in_features = out.shape
    tma = _by_tma(x, grad, out, position)
    config = TMA_CONFIG if tma else CONFIG if min(out.shape) > 64 else SMALL_CONFIG
    block_m, block_n, block_k, group, warps, stages = config
    tiles = _cdiv(out_features, block_m) * _cdiv(in_features, block_n)
    splits = max(1, min(len(lengths), multiprocessors(x.device) // tiles))
    table, counts, split_starts, starts = _steps(lengths, block_k, splits, x.device)
    # A tile that a split writes by TMA must not reach into the next split's.
    apart = _cdiv(out_features, block_m) * block_m if tma and splits > 1 else out_features
    partial = out
    if splits > 1:
        partial = torch.empty(splits, apart, in_features, dtype=torch.float32, device=x.device)
    options = {
        "POSITION": position, "ACCUMULATE": accumulate and splits == 1, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "GROUP": group, "STAGES": stages, "num_warps": warps,
    }  # fmt: skip
    if tma:
        if position or any(length % block_k for length in lengths[:-1]):
            x = _aligned(x, table, block_k, square=position)
            grad = _aligned(grad, table, block_k, square=position)
        _fisher_tma_kernel[(tiles, splits)](
            TensorDescriptor.from_tensor(grad, [block_k, block_m]),
            TensorDescriptor.from_tensor(x, [block_k, block_n]),
            TensorDescriptor.from_tensor(partial.view(-1, in_features), [block_m, block_n // 2]),
            counts, split_starts, (table.shape[0] - 1) * block_k, apart, in_features, **options,
        )  # fmt: skip
    else:
        _fisher_kernel[(tiles, splits)](
            grad, x, partial, table, starts, out_features, in_features,
            EVEN=out_features % block_m == 0 and in_features % block_n == 0,
            PRECISION="tf32x3" if x.is_cuda else "ieee", **options,
        )  # fmt: skip
    if splits > 1:
        _fisher_reduce_kernel[(_cdiv(out.numel(), REDUCE_BLOCK),)](
            partial, out, apart * in_features, out.numel(), splits, ACCUMULATE=accumulate, BLOCK=REDUCE_BLOCK
        )


def _pieces(rows: int, piece: int = 512) -> tuple[int, ...]:
    return (piece,) * (rows // piece) + ((rows % piece,) if rows % piece else ())
