"""Every stored number of a bundle, held against the quantized programs.

What a model answers cannot show every weight: no prompt may use an embedding's row, and one integer
of a hundred million moves nothing by more than roundings do. So each constant tensor that a program
reads has to be in its package, number by number: weights, integers, scales, zero points, lookup
indices and tables, biases, rotary tables, the static ranges of activations. A package is here what
a manifest names: one of Core ML's, an ExecuTorch file with its functions, the methods, or an ONNX
graph, be it target onnx's own or one that a TensorRT engine is built from.

It is looked up by its numbers, as packages keep no names and hold equal tensors once; of tensors
that are equal, as many are to be there as there are readers. The other way round a package has no
float, no small integer that its program has not, so that nothing is scaled or shifted in between;
what lowering adds to average or to select by a product (1/n, -1, 0 and 1) is known.

So this does not show a tensor that one layer reads in the place of another's, another operator on
the same numbers, or other shapes, axes and positions: those change what is computed, and are
parity's to show.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..targets import TargetName
from . import coreml_stored, executorch_stored, onnx_stored, tensorrt_stored
from .stored_types import StoredFunction, StoredWeights

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NOT_COMPARED = (
    "The stored weights were not compared number by number: the bundle was made by other versions "
    "or on a processor with other instructions, where last bits differ. Its files are those that "
    "were exported: they have the hashes of its manifest."
)

_COMPARISONS: dict[
    TargetName, Callable[[Bundle, "Mapping[str, ExportedProgram]"], Iterator[StoredFunction]]
] = {
    TargetName.COREML: coreml_stored.compare,
    TargetName.EXECUTORCH: executorch_stored.compare,
    TargetName.ONNX: onnx_stored.compare,
    TargetName.TENSORRT: tensorrt_stored.compare,
}


def has_stored(bundle: Bundle) -> bool:
    """Whether a bundle's weights can be compared: those that its runtime keeps as numbers."""
    if bundle.manifest.target == TargetName.EXECUTORCH:
        return executorch_stored.can_compare(bundle)
    return bundle.manifest.target in _COMPARISONS


def compare_stored(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> StoredWeights:
    """Look every constant of the programs up in the bundle's packages.

    One tensor is in memory at a time, beside the programs. Raises ExportError for packages that
    are missing, foreign or damaged.
    """
    compare = _COMPARISONS[TargetName(bundle.manifest.target)]
    return StoredWeights(functions=tuple(compare(bundle, programs)))
