"""Numbers of a program and of an ONNX file, so that they can be held against each other."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Fingerprint = tuple[str, bytes]
"""A tensor's type and the SHA-256 of its numbers in order; its shape is no part of it."""


def fingerprint_of(values: Tensor) -> Fingerprint:
    """Of a program's tensor."""
    kind = str(values.dtype).removeprefix("torch.")
    data = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return kind, hashlib.sha256(data.data).digest()


def fingerprint(array: NDArray[Any]) -> Fingerprint:
    """Of a file's tensor; 4-bit integers count as int8, which they are in a program."""
    flat = array.astype(np.int8) if str(array.dtype) == "int4" else array
    data = np.ascontiguousarray(flat).reshape(-1).view(np.uint8)
    return str(flat.dtype), hashlib.sha256(data.data).digest()
