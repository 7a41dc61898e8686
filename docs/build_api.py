"""Write docs/api.md from the docstrings of the public names: ``python docs/build_api.py``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import sensilora
import sensilora.compare
import sensilora.integrations.export
import sensilora.integrations.peft
import sensilora.integrations.transformers
import sensilora.nn
import sensilora.ops
import sensilora.plots
import sensilora.sensitivity
import sensilora.targets
from sensilora import errors

PAGE = Path(__file__).with_name("api.md")

#: Section title, what it is for, and the names in it.
SECTIONS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("Measuring", "", [("sensilora.calibrate", sensilora.calibrate),
                       ("sensilora.SensitivityReport", sensilora.SensitivityReport),
                       *((f"sensilora.sensitivity.{name}", getattr(sensilora.sensitivity, name))
                         for name in ("MatrixSensitivity", "ProbeStatistics", "Diagonals", "ReportComparison",
                                      "Agreement", "Mover")),
                       ("sensilora.targets.find_targets", sensilora.targets.find_targets)]),
    ("Allotting ranks", "", [("sensilora.allocate", sensilora.allocate), ("sensilora.RankPlan", sensilora.RankPlan)]),
    ("Adapters", "", [(f"sensilora.{name}", getattr(sensilora, name))
                      for name in ("inject", "merge", "unload", "save_adapter", "load_adapter")]
     + [(f"sensilora.nn.{name}", getattr(sensilora.nn, name)) for name in ("VarRankLoRALinear", "VarRankLoRAGroup")]),
    ("Several adapters in one batch", "", [(f"sensilora.mixed.{name}", getattr(sensilora.mixed, name))
      for name in ("add_adapter", "load_adapter", "save_adapter", "delete_adapter", "merge", "set_adapter_ids",
                   "adapter_ids", "adapter_names", "adapter_parameters", "set_requires_grad")]
     + [(f"sensilora.nn.{name}", getattr(sensilora.nn, name))
        for name in ("MultiLoRALinear", "LoRAAdapter", "AdapterRouting")]),
    ("PEFT", "Needs peft: `pip install 'sensilora[peft]'`. How it is used: [With PEFT](peft.md).",
     [(f"sensilora.integrations.peft.{name}", getattr(sensilora.integrations.peft, name))
      for name in ("lora_config_from_plan", "use_fused", "fuse", "unfuse")]),
    ("Exports", "What `sensilora export` runs; which tool takes which form: [Other tools](peft.md#other-tools).",
     [(f"sensilora.integrations.export.{name}", getattr(sensilora.integrations.export, name))
      for name in ("export_peft", "export_uniform", "export_merged", "export_axolotl", "export_blank_adapter")]),
    ("transformers' Trainer", "",
     [(f"sensilora.integrations.transformers.{name}", getattr(sensilora.integrations.transformers, name))
      for name in ("SensitivityCallback", "Drift")]),
    ("Comparing", "What `sensilora compare` runs; see [Is it worth it on your data?](compare.md).",
     [(f"sensilora.compare.{name}", getattr(sensilora.compare, name)) for name in ("run_compare", "Comparison")]),
    ("Operations", "Each has a plain torch reference and faster backends; see the table in the README.",
     [(f"sensilora.ops.{name}", getattr(sensilora.ops, name))
      for name in ("autocorrelation_diag", "autocorrelation_blocks", "fisher_diag", "hutchinson_accumulate",
                   "rademacher", "diagonal_metrics", "diagonal_metrics_batch", "DiagonalMetrics", "lora_linear",
                   "lora_group", "lora_segments", "lora_update")]
     + [("sensilora.use_backend", sensilora.use_backend)]),
    ("Pictures", "", [("sensilora.plots.plot_ranks", sensilora.plots.plot_ranks),
                      ("sensilora.plots.plot_training", sensilora.plots.plot_training),
                      ("sensilora.plots.plot_comparison", sensilora.plots.plot_comparison)]),
    ("Errors", "All derive from `sensilora.errors.SensiloraError`.",
     [(f"sensilora.errors.{name}", value) for name, value in vars(errors).items()
      if inspect.isclass(value) and value is not errors.SensiloraError]),
]  # fmt: skip


def render() -> str:
    """The page as text."""
    parts = ["# API\n\nMade from the docstrings by `python docs/build_api.py`; edit those."]
    for title, purpose, names in SECTIONS:
        parts.append(f"## {title}" + (f"\n\n{purpose}" if purpose else ""))
        for name, value in names:
            parts.append(_entry(name, value, "###"))
            if inspect.isclass(value) and not issubclass(value, Exception):
                parts += [_entry(f"{name}.{method}", member, "####") for method, member in _methods(value)]
    return "\n\n".join(parts) + "\n"


def _methods(owner: type) -> list[tuple[str, Any]]:
    """Public methods that the class itself defines and documents."""
    return [
        (name, inspect.unwrap(getattr(member, "__func__", member)))
        for name, member in vars(owner).items()
        if not name.startswith("_") and inspect.isroutine(getattr(owner, name, None)) and inspect.getdoc(member)
    ]


def _entry(name: str, value: Any, heading: str) -> str:
    text = f"{heading} {name}\n\n"
    if inspect.isfunction(value) or (inspect.isclass(value) and "__init__" in vars(value)):
        text += f"```python\n{name.rpartition('.')[2]}{_signature(value)}\n```\n\n"
    return text + f"```text\n{inspect.getdoc(value)}\n```"


def _signature(value: Any) -> str:
    """One parameter a line, annotations as written in the source."""
    lines, keyword_only = [], False
    signature = inspect.signature(value)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        text = f"{stars}{parameter.name}" + (
            f": {parameter.annotation}" if parameter.annotation != parameter.empty else ""
        )
        lines.append(text + (f" = {parameter.default!r}" if parameter.default is not parameter.empty else ""))
    arguments = "".join(f"\n    {line}," for line in lines) + "\n" if lines else ""
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    return f"({arguments}){returned}"


if __name__ == "__main__":
    PAGE.write_text(render())
