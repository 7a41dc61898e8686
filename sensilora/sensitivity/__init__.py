"""Measuring how sensitive a model's loss is to each of its weight matrices."""

from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.diagonals import Diagonals
from sensilora.sensitivity.report import (
    Agreement,
    MatrixSensitivity,
    Mover,
    ProbeStatistics,
    ReportComparison,
    SensitivityReport,
)

__all__ = [
    "Agreement",
    "Diagonals",
    "MatrixSensitivity",
    "Mover",
    "ProbeStatistics",
    "ReportComparison",
    "SensitivityReport",
    "calibrate",
]
