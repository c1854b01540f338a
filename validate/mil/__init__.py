"""A reference interpreter for Core ML's ML programs: runs a saved `.mlpackage` on any platform."""

from .interpreter import Interpreter, open_model

__all__ = ["Interpreter", "open_model"]
