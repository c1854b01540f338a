"""Which numbers a package holds, and how often one of its functions reads them."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constexpr import OPERATIONS
from .errors import damaged, foreign
from .package import Package, open_package
from .values import is_text, parse_value

Fingerprint = tuple[str, bytes]
"""A tensor's type and the SHA-256 of its numbers, in order; its shape is no part of it."""


def fingerprint(numbers: NDArray[Any]) -> Fingerprint:
    """Of the numbers' bytes, little-endian; small integers lie one to a byte."""
    little = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).reshape(-1)
    return little.dtype.str, hashlib.sha256(little.view(np.uint8).data).digest()


def is_weight(print_: Fingerprint) -> bool:
    """Whether these are floats or small integers: no positions, shapes or truth values."""
    return np.dtype(print_[0]).kind == "f" or print_[0] in ("|i1", "|u1")


class Contents:
    """The numbers of a saved package, each read from the file once and not kept.

    `names` says where a function has them that was asked for: a constant's name, or an operation's
    with the parameter.
    Raises ExportError for what is no package, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._package: Package = open_package(path)
        self._known: dict[Any, Fingerprint] = {}
        self.names: dict[Fingerprint, str] = {}

    def reads(self, function: str) -> "Counter[Fingerprint]":
        """How often the function's operations read each constant, in weight files and beside them.

        What a `constexpr` operation expands is read as often as what comes of it: coremltools
        keeps equal weights once, however many layers have them.
        """
        functions = self._package.spec.mlProgram.functions
        if function not in functions:
            have = ", ".join(self._package.functions) or "none"
            raise foreign(self._package.path, f"has no function {function!r}; it has {have}")
        message = functions[function]
        if message.opset not in message.block_specializations:
            raise damaged(self._package.model_path, f"has no operations for {message.opset!r}")
        found: Counter[Fingerprint] = Counter()
        named: Counter[str] = Counter()
        # From the last to the first: readers come before what they read.
        for operation in reversed(message.block_specializations[message.opset].operations):
            made = sum(named[output.name] for output in operation.outputs)
            if operation.type == "const":
                if made and "val" in operation.attributes:
                    name = operation.outputs[0].name
                    self._count(found, operation.attributes["val"], made, name)
                continue
            times = made if operation.type in OPERATIONS else 1
            where = f"{operation.outputs[0].name} ({operation.type})" if operation.outputs else ""
            for name, value in operation.attributes.items():
                if name != "name":
                    self._count(found, value, times, f"{where}, {name}")
            for name, argument in operation.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "value":
                        self._count(found, binding.value, times, f"{where}, {name}")
                    else:
                        named[binding.name] += times
        return found

    def _count(self, found: "Counter[Fingerprint]", value: Any, times: int, name: str) -> None:
        if times and not is_text(value):
            constant = parse_value(self._package, value)
            if constant.key not in self._known:
                self._known[constant.key] = fingerprint(constant.array())
            found[self._known[constant.key]] += times
            self.names[self._known[constant.key]] = name
