"""Exceptions of the package. Each message is one sentence that names the thing and says what to do.

All derive from `SensiloraError`, so ``except SensiloraError`` catches every error that is about the
caller's input; each also derives from the built-in that fits it, so existing ``except ValueError`` code works.
"""


class SensiloraError(Exception):
    """Base of every error this package raises on purpose."""


class TargetError(SensiloraError, ValueError):
    """No module of the model matches the requested targets, or a named module cannot be adapted."""


class CalibrationError(SensiloraError, ValueError):
    """The calibration data cannot be used: empty, without labels, or with every label ignored."""


class NonFiniteError(SensiloraError, ArithmeticError):
    """A NaN or Inf was met; the message names the module or tensor."""


class BudgetError(SensiloraError, ValueError):
    """The rank budget cannot be met within the bounds and shapes."""


class RankError(SensiloraError, ValueError):
    """A rank is no whole number, negative, or above min(in_features, out_features)."""


class ReportError(SensiloraError, ValueError):
    """A sensitivity report is truncated, invalid, of another version, or cannot be compared with another report."""


class PlanError(SensiloraError, ValueError):
    """A rank plan is truncated, invalid, or made for another model."""


class AdapterError(SensiloraError, ValueError):
    """An adapter folder is incomplete, damaged, or does not fit the model."""


class ModelError(SensiloraError, OSError):
    """A model or tokenizer cannot be found or loaded."""


class DataError(SensiloraError, ValueError):
    """A data file cannot be read as JSONL, CSV, TSV or text, or lacks a field."""


class OutputExistsError(SensiloraError, FileExistsError):
    """The output exists already and overwriting was not asked for."""


class BackendError(SensiloraError, RuntimeError):
    """A backend that was asked for cannot serve the call; the message says why."""
