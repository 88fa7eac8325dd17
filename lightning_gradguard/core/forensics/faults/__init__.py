"""The table of operations that make nonfinite values of finite ones, with causes and cures."""

from .of_operations import FAULTS
