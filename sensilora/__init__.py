"""Sensitivity-based LoRA rank allocation and variable-rank LoRA kernels.

The path through the package: `calibrate` a model on a little data, `allocate` ranks under one budget, `inject` the
adapters, train as usual, `save_adapter` in PEFT's format. The layer itself is `sensilora.nn.VarRankLoRALinear`, the
operations are in `sensilora.ops`; `sensilora.mixed` is for several adapters in one batch.
"""

import sys
from pathlib import Path

try:
    from sensilora import mixed
    from sensilora.adapters import inject, load_adapter, merge, save_adapter, unload
    from sensilora.allocation import allocate
    from sensilora.ops import use_backend
    from sensilora.plan import RankPlan
    from sensilora.sensitivity import SensitivityReport, calibrate
except KeyboardInterrupt:
    # Importing torch takes seconds, in which Ctrl-C is as likely as later, and the command line's own modules come
    # after this one. Everywhere else the interrupt is the caller's.
    if Path(sys.argv[0]).stem != "sensilora" and not (sys.argv[0] == "-m" and "sensilora" in sys.orig_argv):
        raise
    print("interrupted", file=sys.stderr)
    sys.exit(130)

__version__ = "0.1.0"

__all__ = [
    "RankPlan",
    "SensitivityReport",
    "allocate",
    "calibrate",
    "inject",
    "load_adapter",
    "merge",
    "mixed",
    "save_adapter",
    "unload",
    "use_backend",
]
