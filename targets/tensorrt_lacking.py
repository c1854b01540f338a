"""What older parsers lack, without the imports that it takes to write something in its place."""

from collections.abc import Mapping
from dataclasses import dataclass

REPLACEABLE = ("TensorScatter", "RotaryEmbedding", "RMSNormalization", "Attention")
"""Operators that `tensorrt_older` can write in older ones."""


@dataclass(frozen=True, kw_only=True)
class Older:
    """A graph without some operators. `model` is what a parser reads; empty: the file will do.

    `origins`: new node -> the file's node that it is of. `counts`: operator -> how many nodes of it
    were written out. `float32`: the file's node -> why it computes in float32 now.
    """

    model: bytes
    origins: Mapping[str, str]
    counts: Mapping[str, int]
    float32: Mapping[str, str]


UNCHANGED = Older(model=b"", origins={}, counts={}, float32={})
