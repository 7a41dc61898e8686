"""Measuring how sensitive a model's loss is to each of its weight matrices."""

from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.report import MatrixSensitivity, SensitivityReport

__all__ = ["MatrixSensitivity", "SensitivityReport", "calibrate"]
