"""ExecuTorch's Core ML backend: each method is one delegate, a package of our own Core ML lowering.

ExecuTorch's partitioner hands Edge programs to coremltools' PyTorch frontend, which would lose the
recipe's types and integers (see `coreml_lowering`). Its runtime does not care who made a package:
a delegate's payload is a folder with a `.mlpackage` and the order of its inputs and outputs. So
every method here is a single opaque operator, and what becomes of that is written by the code that
writes target 'coreml': same operators, same integers, same types.

The cache is in Core ML states, which the delegate keeps from call to call, as iOS 18 and macOS 15
have them. Nothing is left for ExecuTorch's own kernels. A prompt comes in one piece of any length,
so the decoder has range shapes: it will not run on the Neural Engine; the static tower can.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..exporter.graphs import traced_inputs
from ..exporter.scratch import ScratchFolder
from ..exporter.spec import ExportSpec
from ..quantize.quiet import quiet_import
from . import coreml_graphs
from .coreml_decoder import rows_at
from .coreml_lowering import Var
from .coreml_model import EMBEDS, LOGITS, MAIN, PIXELS
from .coreml_package import FunctionSpec, Input, save
from .executorch_coreml_payload import BACKEND, METADATA, PACKAGE, pack
from .executorch_lowering import Lowered, quiet_copies
from .executorch_model import DECODER, EMBEDDING, VISION
from .executorch_retrace import retrace

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
    from executorch.exir.lowered_backend_module import LoweredBackendModule

SYSTEM = "iOS18"
"""The first with states; macOS 15 has the same operators."""

COMPILE_SPECS = {"compute_units": "all", "min_deployment_target": "9", "model_type": "model"}
"""What the delegate is told: units to choose from, specification 9 (iOS 18), not compiled yet."""

POSITIONS = "cache_position"
"""int32 [S], which follow one another."""

_FOLDER = "folder"


def lower(
    programs: Mapping[str, ExportedProgram], spec: ExportSpec, constants: Mapping[str, Any]
) -> Lowered:
    """The three methods of a recipe as Core ML takes it; `constants` answer without computing."""
    methods = _methods(spec, _image_shape(programs["vision"]))
    with ScratchFolder() as scratch, torch.no_grad():
        folders = {method: scratch / method for method in methods}
        for method, function in _functions(programs, spec).items():
            _write(function, folders[method])
        with quiet_import(), quiet_copies():
            edge = to_edge_transform_and_lower(
                methods,
                partitioner={method: [_Whole(folder)] for method, folder in folders.items()},
                constant_methods=dict(constants),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            for method in methods:
                _name_backend(edge.exported_program(method).graph_module)
            program = edge.to_executorch(ExecutorchBackendConfig())
    return Lowered(pte=bytes(program.buffer))


def _image_shape(program: ExportedProgram) -> tuple[int, ...]:
    """Of one image: [1,3,R,R]."""
    [pixels] = traced_inputs(program)
    return (1, *(int(size) for size in pixels.shape[1:]))


def _functions(
    programs: Mapping[str, ExportedProgram], spec: ExportSpec
) -> dict[str, FunctionSpec]:
    """Method -> its function in Core ML."""
    return {
        VISION: coreml_graphs.vision(programs["vision"], PIXELS),
        EMBEDDING: coreml_graphs.embedding(programs["embedding"], spec),
        DECODER: _decoder(programs["decoder"], spec),
    }


def _decoder(program: ExportedProgram, spec: ExportSpec) -> FunctionSpec:
    """Any number of rows at once, written to the states where `cache_position` says."""
    config, context = spec.decoder, spec.context
    inputs = {
        EMBEDS: Input(shape=(1, 1, config.hidden_size), longest=context, axis=1),
        POSITIONS: Input(shape=(1,), integer=True, longest=context),
    }

    def body(given: Mapping[str, Var]) -> Var:
        rows = rows_at(given[POSITIONS], config.heads // config.kv_heads)
        count = mb.shape(x=given[POSITIONS])
        return coreml_graphs.decoder_logits(program, config, given, rows, count, context)

    states = coreml_graphs.decoder_states(program, config, context)
    return FunctionSpec(inputs=inputs, output=LOGITS, body=body, states=states)


def _write(function: FunctionSpec, folder: Path) -> None:
    """A delegate's folder: the package, and what the runtime reads beside it.

    The runtime keeps compiled packages by their identifier, so that is made of the contents.
    """
    folder.mkdir()
    save({MAIN: function}, SYSTEM, folder / PACKAGE)
    contents = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        contents.update(path.relative_to(folder).as_posix().encode() + b"\0")
        contents.update(path.read_bytes())
    metadata = {
        "inputNames": list(function.inputs),
        "outputNames": [function.output],
        "identifier": f"executorch_{contents.hexdigest()}",
    }
    (folder / METADATA).write_text(json.dumps(metadata), "utf-8")


@torch.library.custom_op("fastvlm::delegated", mutates_args=())
def delegated(x: Tensor, positions: Tensor | None, rows: int, width: int) -> Tensor:
    """A whole method in Core ML: float32 [1,rows,width], where 0 rows are as many as `x` has."""
    raise NotImplementedError("this method is computed by Core ML alone")


@delegated.register_fake
def _(x: Tensor, positions: Tensor | None, rows: int, width: int) -> Tensor:
    return x.new_empty((1, rows or x.shape[1], width), dtype=torch.float32)


class _Method(nn.Module):
    """A method without any content but its delegate's call."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width = rows, width

    def forward(self, x: Tensor, cache_position: Tensor | None = None) -> Tensor:
        out: Tensor = delegated(x, cache_position, self.rows, self.width)
        return out


def _methods(spec: ExportSpec, image: tuple[int, ...]) -> dict[str, ExportedProgram]:
    """Method -> its inputs, its output and one operator between them."""
    width, example = spec.decoder.hidden_size, min(3, spec.context)
    size = Dim("sequence_length", min=1, max=spec.context)
    ids = torch.zeros(1, example, dtype=torch.int64)
    embeds, positions = torch.zeros(1, example, width), torch.arange(example)
    return {
        VISION: retrace(_Method(spec.image_tokens, width), (torch.zeros(image),), (None,)),
        EMBEDDING: retrace(_Method(0, width), (ids,), ({1: size},)),
        DECODER: retrace(
            _Method(1, spec.decoder.vocab_size), (embeds, positions), ({1: size}, {0: size})
        ),
    }


@final
class FastVLMCoreML(BackendDetails):  # type: ignore[misc]
    """Packs the folder that a method's compile specification names."""

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[Any]) -> Any:
        """The payload; the program has but one operator and says nothing more."""
        [folder] = (Path(one.value.decode()) for one in compile_specs if one.key == _FOLDER)
        return PreprocessResult(processed_bytes=pack(folder))


class _Whole(Partitioner):  # type: ignore[misc]
    """Hands a method's one operator over."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        specs = [CompileSpec(_FOLDER, str(folder).encode())]
        self._delegation = DelegationSpec(FastVLMCoreML.__name__, specs)

    def partition(self, exported_program: ExportedProgram) -> Any:
        """One part."""
        for node in exported_program.graph.nodes:
            if node.op == "call_function" and "fastvlm.delegated" in str(node.target):
                node.meta["delegation_tag"] = _FOLDER
        return PartitionResult(
            tagged_exported_program=exported_program, partition_tags={_FOLDER: self._delegation}
        )


def _name_backend(module: nn.Module) -> None:
    """Say what runs the payloads: the lowering finds a backend by its class's name, which Apple's
    own, with another way to make them, may have here.
    """
    for one in module.children():
        if isinstance(one, LoweredBackendModule):
            one._backend_id = BACKEND
            one._compile_specs = [CompileSpec(k, v.encode()) for k, v in COMPILE_SPECS.items()]


__all__ = ["COMPILE_SPECS", "POSITIONS", "SYSTEM", "lower"]
