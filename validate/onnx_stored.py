"""Every stored number of an ONNX bundle, held against the quantized programs: see `stored`.

Besides what other targets' comparisons show, each number is read exactly as often as the program
reads it, and so are the numbers that are attributes: the epsilon of each norm, and whether packed
weights meet rounded activations.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..targets import onnx
from .parity_types import Stage
from .stored_types import StoredFunction

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..targets.onnx_numbers import Fingerprint
    from ..targets.onnx_stored import Stored

STAGES = {
    "vision": Stage.IMAGE_FEATURES,
    "embedding": Stage.EMBEDDINGS,
    "decoder": Stage.FIRST_TOKEN,
}


def compare(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> Iterator[StoredFunction]:
    """Each graph, in the order in which answering a question runs them.

    Raises ExportError for files that are missing or damaged.
    """
    paths = onnx.paths(bundle)
    for name, stage in STAGES.items():
        yield _compare_graph(name, stage, paths[name], programs[name])


def _compare_graph(
    name: str, stage: Stage, path: Path, program: "ExportedProgram"
) -> StoredFunction:
    from ..targets.onnx_contents import Contents  # noqa: PLC0415 - imports onnx_ir
    from ..targets.onnx_stored import expected  # noqa: PLC0415 - imports torch

    wanted, contents = expected(program), Contents(path)
    fewest: Counter[Fingerprint] = Counter()
    most: Counter[Fingerprint] = Counter()
    chosen = []
    for tensor in wanted:
        form = _form(tensor, contents.reads)
        fewest[form] += tensor.reads
        most[form] += tensor.most
        chosen.append((tensor, form))
    missing = [
        tensor.name
        for tensor, form in chosen
        if tensor.reads and contents.reads[form] < fewest[form]
    ]
    foreign = [contents.names[form] for form, reads in contents.reads.items() if reads > most[form]]
    sizes = {tensor.name: tensor.size for tensor in wanted if tensor.reads}
    return StoredFunction(
        package=path.name,
        function=name,
        stage=stage,
        tensors=len(sizes),
        numbers=sum(sizes.values()),
        missing=tuple(dict.fromkeys(missing)),
        foreign=tuple(sorted(foreign)),
    )


def _form(tensor: "Stored", there: "Collection[Fingerprint]") -> "Fingerprint":
    """The form that the file has a tensor in; the first where it has none."""
    first = None
    for form in tensor.forms():
        if form in there:
            return form
        first = first or form
    if first is None:
        raise ValueError(f"{tensor.name} has no form")
    return first
