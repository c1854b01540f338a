"""Every stored number of the graphs that TensorRT's engines are built from: see `stored`.

Engines are held to the graphs they were built from by the build's own record.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..targets.tensorrt_plan import GRAPHS, onnx_file
from .parity_types import Stage
from .stored_types import StoredFunction

if TYPE_CHECKING:
    from torch.export import ExportedProgram

STAGES = dict(zip(GRAPHS, (Stage.IMAGE_FEATURES, Stage.EMBEDDINGS, Stage.FIRST_TOKEN), strict=True))


def compare(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> Iterator[StoredFunction]:
    """Each graph, in the order in which answering a question runs them.

    Raises ExportError for files that are missing or damaged.
    """
    from ..targets.tensorrt_stored import Contents, expected  # noqa: PLC0415 - imports torch

    for name in GRAPHS:
        wanted, contents = expected(programs[name]), Contents(bundle.path / onnx_file(name))
        known, missing = set(), []
        for tensor in wanted.tensors:
            forms = set(tensor.forms())
            known |= forms
            if tensor.needed and not any(form in contents.names for form in forms):
                missing.append(tensor.name)
        needed = [tensor for tensor in wanted.tensors if tensor.needed]
        yield StoredFunction(
            package=onnx_file(name),
            function=name,
            stage=STAGES[name],
            tensors=len(needed),
            numbers=sum(tensor.size for tensor in needed),
            missing=tuple(missing),
            foreign=tuple(contents.foreign(known, wanted.scalars)),
        )
