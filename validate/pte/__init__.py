"""ExecuTorch's programs as they are saved, computed on the CPU in float32 without any rounding."""

from .program import Program

__all__ = ["Program"]
