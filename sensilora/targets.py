"""Which modules of a model are weight matrices to be measured and adapted, and what a model is called.

A weight matrix here is the weight of an ``nn.Linear`` or of transformers' ``Conv1D`` (GPT-2), whose
weight is stored transposed. The ``nn.Linear`` may be quantised by bitsandbytes or torchao: its weight is then never
read here, and its product is left to the library. Shapes are always given as (out_features, in_features).
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sensilora.errors import RankError, TargetError

_DENSE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

#: Last name components of task heads, which are trained in full and never adapted by "all-linear" (as in PEFT).
#: "pre_classifier" is the new layer below DistilBERT's classifier.
HEAD_NAMES = frozenset({"classifier", "pre_classifier", "score", "lm_head", "qa_outputs", "out_proj_head", "cls"})

Targets = str | Iterable[str]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' ``Conv1D``, told by name so that transformers need not be imported."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__
    )


def is_matrix(module: nn.Module) -> bool:
    """Whether `module` holds one weight matrix this package can measure and adapt."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of bitsandbytes (4-bit, 8-bit), or its weight is a tensor of torchao.

    Told by names, so that neither need be imported. Such a weight may be packed, so that its shape and dtype say
    nothing about the matrix.
    """
    if any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__):
        return True
    weight = module._parameters.get("weight")
    return type(weight) is not nn.Parameter and type(weight).__module__.startswith("torchao.")


def is_packed_for_inference(module: nn.Module) -> bool:
    """Whether bitsandbytes packed a 4-bit layer anew for a CPU with bf16 instructions, as it does when the layer is
    first used for inference: its product has no gradient then, and torch says so in a warning at most."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def is_packed_otherwise(module: nn.Module) -> bool:
    """Whether the weight of a linear layer is packed in a way that is not known here: by another library's storage,
    or by its tensors, which may well claim a dense dtype and the matrix's shape."""
    weight: Any = module._parameters.get("weight")
    if weight is None:  # a parametrisation computes it, which may change its buffers
        return False
    foreign = is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")
    return not is_quantised(module) and (foreign or weight.dtype not in _DENSE or weight.dim() != 2)


def is_wrapped(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or has_own_forward(module)
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward was put on the module itself, other than accelerate's where it only moves inputs."""
    only_aligns_devices = getattr(module.__dict__.get("_hf_hook"), "offload", True) is False
    return "forward" in module.__dict__ and not only_aligns_devices


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an ``nn.Linear`` or ``Conv1D``."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and (weight is None or is_quantised(module)):
        return module.out_features, module.in_features
    if weight is None:
        weight = module.weight
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def head_names(model: nn.Module) -> set[str]:
    """Names of the modules that are the model's task head (output embedding, classifier) and what is inside them."""
    heads = set()
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output_embeddings = get_output_embeddings() if get_output_embeddings is not None else None
    for name, module in model.named_modules():
        parts = name.split(".")
        if module is output_embeddings or not HEAD_NAMES.isdisjoint(parts):
            heads.add(name)
    return heads


def outermost_heads(model: nn.Module) -> list[str]:
    """Names of the outermost modules of the task head, in module order."""
    heads = head_names(model)
    return [name for name, _ in model.named_modules() if name in heads and name.rpartition(".")[0] not in heads]


def stacked_experts(model: nn.Module) -> list[str]:
    """Names of the parameters (experts, ., .) that hold one matrix for each expert of a mixture (Mixtral, Qwen-MoE).

    No module stands for one of these matrices, so they get no adapter, and `sensilora.calibrate` measures them only
    if asked.
    """
    return [name for name, parameter in model.named_parameters() if is_expert_stack(name, parameter)]


def is_expert_stack(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of this full name holds one matrix for each expert."""
    return parameter.dim() == 3 and "experts" in name.split(".")[:-1]


def other_experts(model: nn.Module) -> list[str]:
    """Names of the weights in modules that are called experts and hold them in a form that is not known here (JetMoE,
    DBRX)."""
    found = []
    for module_name, module in model.named_modules():
        if "expert" in type(module).__name__.lower() and not is_matrix(module):
            own = {f"{module_name}.{name}": weight for name, weight in module.named_parameters(recurse=False)}
            # Beside a stack there may be biases, a row for each expert.
            if not any(is_expert_stack(name, weight) for name, weight in own.items()):
                found += [name for name, weight in own.items() if weight.dim() > 1]
    return found


def find_targets(model: nn.Module, targets: Targets = "all-linear") -> dict[str, nn.Module]:
    """The modules `targets` selects, by full name, in module order.

    Args:
        targets: ``"all-linear"`` (every ``nn.Linear`` and ``Conv1D`` outside the task head), a regular
            expression that must match the whole name (as PEFT treats a string), or an iterable of names, each a
            full name or a suffix that begins at a dot (as PEFT treats a list).

    Raises:
        TargetError: nothing matches, an entry of an iterable matches nothing, or a weight is packed by a library
            other than bitsandbytes and torchao.
    """
    # Of an nn.MultiheadAttention's output projection only the weight is read; an adapter would never run.
    matrices = {
        name: module
        for name, module in model.named_modules()
        if is_matrix(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    if not matrices:
        raise TargetError(f"{type(model).__name__} holds no nn.Linear or Conv1D module; there is nothing to adapt")
    if targets == "all-linear":
        heads = head_names(model)
        found = {name: module for name, module in matrices.items() if name not in heads}
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"targets {targets!r} is not a valid regular expression: {error}") from error
        found = {name: module for name, module in matrices.items() if pattern.fullmatch(name)}
    else:
        wanted = list(targets)
        selected = set()
        for suffix in wanted:
            matching = {name for name in matrices if name == suffix or name.endswith("." + suffix)}
            if not matching:
                raise TargetError(f"target {suffix!r} matches no linear module; {_examples(matrices)}")
            selected |= matching
        found = {name: module for name, module in matrices.items() if name in selected}
    for name, module in found.items():
        if is_packed_otherwise(module):
            weight: Any = module.weight
            raise TargetError(
                f"the weight of {name} is packed ({type(weight).__name__} of {weight.dtype}) in a way that is not "
                "known here; of quantised layers those of bitsandbytes and torchao are"
            )
    if not found:
        raise TargetError(f"targets {targets!r} match no linear module; {_examples(matrices)}")
    return found


def _examples(matrices: dict[str, nn.Module]) -> str:
    return "the model has, for example, " + ", ".join(list(matrices)[:3])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper, whose names it has."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def model_id(model: nn.Module) -> str:
    """The model's hub name or folder as transformers recorded it, else its class name."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of the model's weights, task head left out.

    The same for a model before and after `sensilora.inject`, quantised or not, and for any number of labels;
    different for another architecture, width, depth or vocabulary. It does not read the weights' values. A quantised
    weight counts with the shape of its matrix, so that plans serve before and after quantisation.
    """
    heads = head_names(model)
    packed = {
        f"{name}.weight": matrix_shape(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and is_quantised(module)
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        # An adapter layer's lora_A or lora_B, or an entry of a multi-adapter layer's.
        if not {"lora_A", "lora_B"}.isdisjoint(name.split(".")[-2:]):
            continue
        plain = name.replace(".base_layer.", ".")
        if plain.rpartition(".")[0] in heads:
            continue
        shape = packed.get(name, tuple(parameter.shape))
        digest.update(f"{plain}:{shape}\n".encode())
    return digest.hexdigest()


def whole_rank(rank: object) -> int:
    """A rank as an int, from an int or an integer of numpy's.

    Raises:
        RankError: it is anything else, such as 2.5 or "8".
    """
    try:
        return operator.index(rank)  # type: ignore[arg-type]
    except TypeError as error:
        raise RankError(f"a rank must be a whole number, not {rank!r}") from error


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter or floating-point buffer that holds a NaN or Inf, or None."""
    return first_non_finite((*model.named_parameters(), *model.named_buffers()))


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds a NaN or Inf, or None. Of a tensor of torchao the scales are looked at."""
    for name, tensor in tensors:
        if not all(bool(torch.isfinite(part).all()) for part in plain_tensors(tensor) if part.dtype in _DENSE):
            return name
    return None


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors inside one of a subclass that wraps several, such as a quantised weight's numbers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
