"""Export FastVLM from PyTorch to artifacts whose numbers have been proven."""

__version__ = "0.1.0"
