"""Compiles Triton kernels for a GPU that is not there and prints the registers and memory they take.

A process of its own, because the other tests run the same kernels under Triton's interpreter, which neither types
them nor allots registers. Arguments are given as types: "1" is an integer of 1 (which Triton compiles in), "i32" an
integer divisible by 16, "i32 any" one that need not be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sensilora.kernels import diagonal_metrics, fisher_diag, hutchinson, lora_linear, lora_segments

HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)


def compiled(kernel, types: dict, constants: dict, target: GPUTarget = HOPPER, **options) -> dict[str, int]:
    """Registers a thread, bytes of them spilled, and bytes of shared memory a program."""
    signature, values, attributes = {}, {}, {}

    def add(path, kind):
        if kind is None or kind == "1":
            values[path] = None if kind is None else 1
            return "constexpr"
        if kind == "i32" or kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind.removesuffix(" any")

    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif isinstance(types[name], tuple):
            signature[name] = tuple(add((index, i), kind) for i, kind in enumerate(types[name]))
        else:
            signature[name] = add((index,), types[name])
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    binary = triton.compile(source, target=target, options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": binary.metadata.shared}


def product(
    members: int,
    rank_block: int,
    update: str,
    transposed: bool,
    dropout: bool = False,
    add: bool = False,
    first_threshold: str = "i32 any",
) -> dict[str, int]:
    block_t, block_c, block_k, warps, stages = lora_linear.PRODUCT_CONFIG
    group = lora_linear.PRODUCT_GROUPS[0]
    parts = lora_linear.PRODUCT_PARTS[dropout]
    left, products = f"tensordesc<bf16[{block_t}, {block_k}]>", range(lora_linear.PRODUCTS)
    shape = (block_c, block_k) if transposed else (block_k, block_c)
    there = [i < members for i in products]
    types = {
        **{f"left{i}": left if there[i] else None for i in products},
        **{f"matrix{i}": f"tensordesc<bf16[{shape[0]}, {shape[1]}]>" if there[i] else None for i in products},
        **{f"reduced{i}": "i32" if there[i] else None for i in products},
        "out": f"tensordesc<bf16[{block_t}, {block_c // parts}]>",
        "bias": "*bf16" if transposed else None,
        "skinny": "*bf16",
        "updates": ("*fp32",) * members,
        "skinny_tiles": left if update == "product" else None,
        "update_tiles": f"tensordesc<bf16[{shape[0]}, {shape[1]}]>" if update == "product" else None,
        "seeds": "*i64" if dropout else None,
        **dict.fromkeys(("rows", "columns", "skinny_stride", "stack"), "i32"),
        "ranks": ("i32 any",) * members,
        # B is read along its ranks, A along its columns.
        "update_strides_r": ("1" if transposed else "i32",) * members,
        "update_stride_c": "i32" if transposed else "1",
        "scale": "fp32",
        "thresholds": (first_threshold, *("i32 any",) * (members - 1)),
        "keep_scales": ("fp32",) * members,
    }
    constants = {
        "PRODUCTS": members, "HAS_BIAS": transposed, "DROPOUT": dropout, "STACKS": members if dropout else 1,
        "UPDATE": update, "ALIGNED": not transposed, "TRANSPOSED": transposed, "OVERLAP": True, "ADD": add,
        "BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_K": block_k, "BLOCK_R": rank_block, "GROUP": group,
        "PARTS": parts,
    }  # fmt: skip
    kernel, registers = lora_linear._lora_product_kernel, lora_linear.PRODUCT_REGISTERS
    return compiled(kernel, types, constants, num_warps=warps, num_stages=stages, maxnreg=registers)


def down(name: str, bucket: int, members: int, dropout: bool = False) -> dict[str, int]:
    block_t, block_k, warps, stages = lora_linear.CONFIGS[name][bucket]
    types = {
        "x": "*bf16", "matrices": ("*fp32",) * members, "h": "*bf16", "seed": "*i64" if dropout else None,
        **dict.fromkeys(("rows", "in_features", "columns", "h_stride", "split_size"), "i32"),
        "ranks": ("i32 any",) * members, "strides_r": ("i32",) * members, "stride_k": "1", "scale": "fp32",
        "threshold": "i32 any",
    }  # fmt: skip
    constants = {
        "DROPOUT": dropout, "EVEN_K": True, "ALIGNED": True, "PRECISION": "ieee", "OVERLAP": True,
        "BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_R": bucket,
    }  # fmt: skip
    return compiled(lora_linear._lora_down_kernel, types, constants, num_warps=warps, num_stages=stages)


def outer(name: str, bucket: int, dropout: bool, target: GPUTarget, dtype: str, update: bool) -> dict[str, int]:
    block_t, block_c, warps, stages, _ = lora_linear.fitted_config(
        name, bucket, fp32=dtype == "fp32", small=False, wgmma=target is HOPPER, update=update
    )
    element = f"*{dtype}"
    types = {
        "left": element, "skinny": element, "outs": ("*fp32",), "partial": "*fp32", "matrices": ("*fp32",),
        "grad_x": element if update else None, "seed": "*i64" if dropout else None, "ranks": ("i32 any",),
        **dict.fromkeys(("rows", "columns", "skinny_stride", "stack"), "i32"),
        **dict.fromkeys(("out_strides_r", "matrix_strides_r"), ("i32",)),
        **dict.fromkeys(("out_stride_c", "matrix_stride_c"), "1"),
        "scale": "fp32", "threshold": "i32 any", "row_tiles": "i32 any",
    }  # fmt: skip
    constants = {
        "SPLIT": True, "UPDATE": update, "DROPOUT": dropout, "EVEN_C": True, "ALIGNED": True, "PRECISION": "ieee",
        "OVERLAP": name.endswith("_beside"), "BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_R": bucket,
    }  # fmt: skip
    return compiled(lora_linear._lora_outer_kernel, types, constants, target, num_warps=warps, num_stages=stages)


def outer_beside(bucket: int, dropout: bool) -> dict[str, int]:
    return outer("outer_dropout_beside" if dropout else "outer_beside", bucket, dropout, HOPPER, "bf16", False)


def outer_alone(target: GPUTarget, dtype: str, bucket: int, dropout: bool, update: bool) -> dict[str, int]:
    return outer("outer_dropout" if dropout else "outer", bucket, dropout, target, dtype, update)


def up(target: GPUTarget, dtype: str, bucket: int, dropout: bool) -> dict[str, int]:
    block_t, block_c, warps, stages = lora_linear.fitted_config(
        "up", bucket, fp32=dtype == "fp32", small=False, wgmma=target is HOPPER, update=False
    )
    types = {
        "out": f"*{dtype}", "skinny": f"*{dtype}", "updates": ("*fp32",), "seed": "*i64" if dropout else None,
        **dict.fromkeys(("rows", "columns", "skinny_stride", "stack"), "i32"), "ranks": ("i32 any",),
        "update_strides_r": ("i32",), "update_stride_c": "1", "scale": "fp32", "threshold": "i32 any",
    }  # fmt: skip
    constants = {
        "DROPOUT": dropout, "ALIGNED": True, "PRECISION": "ieee", "BLOCK_T": block_t, "BLOCK_C": block_c,
        "BLOCK_R": bucket,
    }  # fmt: skip
    return compiled(lora_linear._lora_up_kernel, types, constants, target, num_warps=warps, num_stages=stages)


def reduce(size: str) -> dict[str, int]:
    """Sums of partials whose sizes are all of one kind."""
    sizes = dict.fromkeys(("first_rows", "stacks", "splits", "columns", "ranks", "strides_r", "strides_c"), (size,))
    types = {"partials": ("*fp32",), "outs": ("*bf16",), **sizes}
    return compiled(lora_linear._reduce_kernel, types, {"SPLITS": 16, "BLOCK": 256}, num_warps=4)


def segments_product() -> dict[str, int]:
    block_t, block_c, block_k, warps, stages = lora_linear.PRODUCT_CONFIG
    group = lora_segments.GROUP
    types = {
        "left": f"tensordesc<bf16[{block_t}, {block_k}]>", "matrix": f"tensordesc<bf16[{block_c}, {block_k}]>",
        "out": f"tensordesc<bf16[{block_t}, {block_c // 2}]>", "bias": None, "skinny": "*bf16", "updates": "*bf16",
        "offsets": "*i64", "adapters": "*i64", "ints": "*i32", "scales": "*fp32",
        **dict.fromkeys(("rows", "columns", "reduced", "skinny_stride", "update_stride_r"), "i32"),
        "segments": "i32 any", "count": "i32 any", "update_stride_c": "1",
    }  # fmt: skip
    constants = {
        "SCALED": True, "HAS_BIAS": False, "TRANSPOSED": True, "OVERLAP": True, "BLOCK_T": block_t,
        "BLOCK_C": block_c, "BLOCK_K": block_k, "BLOCK_R": 64, "BLOCK_S": 16, "GROUP": group, "PARTS": 2,
    }  # fmt: skip
    kernel, registers = lora_segments._segments_product_kernel, lora_linear.PRODUCT_REGISTERS
    return compiled(kernel, types, constants, num_warps=warps, num_stages=stages, maxnreg=registers)


def segments_pack() -> dict[str, int]:
    block_r, block_c = lora_segments.PACK_BLOCKS
    types = {
        "matrices": ("*fp32", "*fp32"), "outs": ("*bf16", "*bf16"), "stack": "i32 any", "columns": ("i32", "i32"),
        "strides_r": ("i32", "1"), "strides_c": ("1", "i32 any"),
    }  # fmt: skip
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    return compiled(lora_segments._segments_pack_kernel, types, constants, num_warps=4)


def segments_down(block_r: int, dropout: bool = False) -> dict[str, int]:
    block_t, block_k, warps, stages = lora_linear.CONFIGS["down_beside"][block_r]
    types = {
        "x": "*bf16", "matrix": "*bf16", "h": "*bf16", "seed": "*i64" if dropout else None, "offsets": "*i64",
        "adapters": "*i64", "ints": "*i32", "scales": "*fp32",
        **dict.fromkeys(("rows", "in_features", "stride_r", "h_stride"), "i32"), "stride_k": "1",
        "segments": "i32 any", "count": "i32 any",
    }  # fmt: skip
    constants = {
        "DROPOUT": dropout, "EVEN_K": True, "PRECISION": "ieee", "OVERLAP": True, "BLOCK_T": block_t,
        "BLOCK_K": block_k, "BLOCK_R": block_r, "BLOCK_S": 16,
    }  # fmt: skip
    return compiled(lora_segments._segments_down_kernel, types, constants, num_warps=warps, num_stages=stages)


def hutchinson_accumulate(dtype: str) -> dict[str, int]:
    types = {
        "hz": f"*{dtype}", "out": "*fp32", "size": "i32",
        **dict.fromkeys(("key0", "key1", "offset0", "offset1"), "i32 any"),
    }  # fmt: skip
    kernel, constants = hutchinson._hutchinson_accumulate_kernel, {"BLOCK": hutchinson.BLOCK}
    return compiled(kernel, types, constants, num_warps=hutchinson.WARPS)


def fisher_sequence() -> dict[str, int]:
    block_m, block_n, block_k, group, warps, stages = fisher_diag.TMA_CONFIG
    types = {
        "grad": f"tensordesc<bf16[{block_k}, {block_m}]>", "x": f"tensordesc<bf16[{block_k}, {block_n}]>",
        "out": f"tensordesc<fp32[{block_m}, {block_n // 2}]>", "counts": "*i32", "splits": "*i32",
        **dict.fromkeys(("out_features", "in_features"), "i32"),
    }  # fmt: skip
    constants = {
        "ACCUMULATE": True, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": group,
        "STAGES": stages,
    }  # fmt: skip
    return compiled(fisher_diag._fisher_tma_kernel, types, constants, num_warps=warps)


def fisher_position() -> dict[str, int]:
    block_m, block_n, block_k, group, warps, stages = fisher_diag.POSITION_CONFIG
    types = {
        "grad": f"tensordesc<fp16[{block_k}, {block_m}]>", "x": f"tensordesc<fp16[{block_k}, {block_n}]>",
        "out": f"tensordesc<fp32[{block_m}, {block_n // 2}]>", "chosen": "*i32", "steps": "i32 any",
        **dict.fromkeys(("sums_grad", "sums_x"), "*fp32"),
        **dict.fromkeys(("out_features", "in_features", "split_features"), "i32"),
    }  # fmt: skip
    constants = {
        "ACCUMULATE": True, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": group,
        "CHUNK": fisher_diag.POSITION_CHUNK, "STAGES": stages,
    }  # fmt: skip
    return compiled(fisher_diag._fisher_position_kernel, types, constants, num_warps=warps)


def fisher_squares(chosen: bool) -> dict[str, int]:
    types = {
        "source": "*bf16", "out": "*fp16", "chosen": "*i32",
        **dict.fromkeys(("sums", "norms", "lost_sums"), "*fp32"),
        **dict.fromkeys(("rows", "stride", "columns"), "i32"),
    }  # fmt: skip
    constants = dict(fisher_diag.SQUARES_CONFIG)
    warps = constants.pop("num_warps")
    constants |= {"GRADIENT": True, "LOW_SCALE": fisher_diag.LOW_SCALE, "BLOCK_K": fisher_diag.POSITION_CONFIG[2]}
    kernel = fisher_diag._fisher_chosen_kernel if chosen else fisher_diag._fisher_squares_kernel
    return compiled(kernel, types, constants, num_warps=warps)


def fisher_choose() -> dict[str, int]:
    types = {
        **dict.fromkeys(("norms_x", "norms_grad", "sums_x", "sums_grad"), "*fp32"), "chosen": "*i32",
        **dict.fromkeys(("rows", "stride", "in_features", "out_features"), "i32"),
    }  # fmt: skip
    constants = {"TOLERANCE": fisher_diag.TOLERANCE, "BLOCK": fisher_diag.SQUARED_ROWS}
    return compiled(fisher_diag._fisher_choose_kernel, types, constants, num_warps=fisher_diag.CHOOSE_WARPS)


def metrics_pass(kernel, **constants) -> dict[str, int]:
    types = {"table": "*i64", "work": "*i64", "matrices": "i32 any"}
    constants = {"ALIGNED": True, "DTYPE": tl.float32, "MATRICES": 256, **constants}
    return compiled(kernel, types, constants, num_warps=diagonal_metrics.PASS_WARPS)


def metrics_cuts(kernel, warps: int) -> dict[str, int]:
    types = dict.fromkeys(("table", "work", "effective_rank"), "*i64")
    types |= {"trace": "*fp64", "topk_mean": "*fp64", "alpha_bits": "i64"}
    return compiled(kernel, types, {}, num_warps=warps)


CASES = {
    "reduce of sizes of one": lambda: reduce("1"),
    "reduce of other sizes": lambda: reduce("i32 any"),
    "product early 16": lambda: product(1, 16, "early", transposed=True),
    "product early 32": lambda: product(1, 32, "early", transposed=False),
    "product late 64": lambda: product(3, 64, "late", transposed=False),
    "product dense": lambda: product(1, 64, "product", transposed=True),
    "product dropout 16": lambda: product(1, 16, "early", transposed=False, dropout=True),
    "product dropout 32": lambda: product(1, 32, "early", transposed=False, dropout=True),
    "product dropout of 1": lambda: product(1, 16, "early", transposed=False, dropout=True, first_threshold="1"),
    "product dropouts of 1": lambda: product(3, 16, "parts", transposed=False, dropout=True, first_threshold="1"),
    "product dropout 64": lambda: product(1, 64, "parts", transposed=False, dropout=True),
    "product dropouts 16": lambda: product(3, 16, "parts", transposed=False, dropout=True),
    "product add 16": lambda: product(1, 16, "early", transposed=False, add=True),
    "product add dropout 16": lambda: product(1, 16, "early", transposed=False, dropout=True, add=True),
    "metrics exponents": lambda: metrics_pass(diagonal_metrics._metrics_exponents_kernel),
    "metrics digits": lambda: metrics_pass(diagonal_metrics._metrics_refine_kernel, DIGIT=True),
    "metrics tails": lambda: metrics_pass(diagonal_metrics._metrics_refine_kernel, DIGIT=False),
    "metrics exponent cuts": lambda: metrics_cuts(diagonal_metrics._metrics_exponent_cuts_kernel, 4),
    "metrics digit cuts": lambda: metrics_cuts(diagonal_metrics._metrics_digit_cuts_kernel, 8),
    "metrics finish": lambda: metrics_cuts(diagonal_metrics._metrics_finish_kernel, 16),
    "segments product": segments_product,
    "segments pack": segments_pack,
    "segments down 64": lambda: segments_down(64),
    "fisher per_sequence": fisher_sequence,
    "fisher per_position": fisher_position,
    "fisher squares": lambda: fisher_squares(chosen=False),
    "fisher chosen squares": lambda: fisher_squares(chosen=True),
    "fisher choose": fisher_choose,
    "down_beside 16": lambda: down("down_beside", 16, 1),
    "down_dropout 16": lambda: down("down_dropout", 16, 1, dropout=True),
    "down_beside 64": lambda: down("down_beside", 64, 3),
    "outer_beside 16": lambda: outer_beside(16, dropout=False),
    "outer_dropout_beside 16": lambda: outer_beside(16, dropout=True),
    "outer_dropout_beside 32": lambda: outer_beside(32, dropout=True),
    **{
        f"{name} {target.arch} {dtype} {bucket} {dropout}": partial(pass_, target, dtype, bucket, dropout)
        for name, pass_ in {
            "up": up,
            "outer": partial(outer_alone, update=False),
            "outer with update": partial(outer_alone, update=True),
        }.items()
        for target in (HOPPER, AMPERE)
        for dtype in ("bf16", "fp32")
        for bucket in (32, 128)
        for dropout in (False, True)
    },
    "hutchinson fp32": lambda: hutchinson_accumulate("fp32"),
    "hutchinson bf16": lambda: hutchinson_accumulate("bf16"),
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    json.dump({name: case() for name, case in CASES.items()}, sys.stdout)
