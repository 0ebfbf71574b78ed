"""The public functions, one module a family."""

from peft_suite.kernels.api import points

__all__ = ["points"]
