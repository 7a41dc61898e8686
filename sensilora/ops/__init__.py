"""The package's numerical operations: a plain torch reference each, and faster backends behind one choice."""

from sensilora.ops._backend import use_backend
from sensilora.ops.autocorrelation_blocks import autocorrelation_blocks
from sensilora.ops.autocorrelation_diag import autocorrelation_diag
from sensilora.ops.diagonal_metrics import DiagonalMetrics, diagonal_metrics, diagonal_metrics_batch
from sensilora.ops.fisher_diag import fisher_diag
from sensilora.ops.hutchinson import hutchinson_accumulate, rademacher
from sensilora.ops.lora_group import lora_group
from sensilora.ops.lora_linear import lora_linear
from sensilora.ops.lora_segments import lora_segments
from sensilora.ops.lora_update import lora_update

__all__ = [
    "DiagonalMetrics",
    "autocorrelation_blocks",
    "autocorrelation_diag",
    "diagonal_metrics",
    "diagonal_metrics_batch",
    "fisher_diag",
    "hutchinson_accumulate",
    "lora_group",
    "lora_linear",
    "lora_segments",
    "lora_update",
    "rademacher",
    "use_backend",
]
