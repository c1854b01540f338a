"""What a program must have to be this bundle's: methods, types, sizes, constants, weights."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from .executorch_file import PteFile, Tensor
from .executorch_model import DECODER, EMBEDDING, EXPORT_HINT, PROGRAM, VISION

MAX_SEQ_LEN = "get_max_seq_len"
MAX_CONTEXT_LEN = "get_max_context_len"

Sizes = Sequence[int | None]
"""What a tensor must have: a size that it has or, where it may vary, bounds; None: any."""


def contract_problems(file: PteFile, bundle: Bundle, vocabulary: int) -> list[ExportError]:
    """Everything in which a program is not what the bundle says, each with its next command.

    `vocabulary` is the tokenizer's: the runner reads as many logits.
    """
    found = list(_interface_problems(file, bundle))
    if not found:
        found = list(_size_problems(file, bundle, vocabulary))
    return found


def _interface_problems(file: PteFile, bundle: Bundle) -> Iterator[ExportError]:
    """Methods that are missing, or take or give something else."""
    manifest = bundle.manifest
    side, rows, context = manifest.resolution, manifest.image_tokens, manifest.context
    wanted: dict[str, tuple[list[tuple[str, Sizes]], tuple[str, Sizes]]] = {
        VISION: ([("float32", (1, 3, side, side))], ("float32", (1, rows, None))),
        EMBEDDING: ([("int64", (1, context))], ("float32", (1, context, None))),
        DECODER: (
            [("float32", (1, context, None)), ("int64", (context,))],
            ("float32", (1, 1, None)),
        ),
    }
    for name, (inputs, output) in wanted.items():
        method = file.methods.get(name)
        if method is None:
            there = ", ".join(file.methods) or "none"
            yield _error(f"{PROGRAM} has no method '{name}'; it has: {there}.")
            continue
        yield from _tensors(name, "input", method.inputs, inputs)
        yield from _tensors(name, "output", method.outputs, [output])
    for name in (MAX_SEQ_LEN, MAX_CONTEXT_LEN):
        value = file.constant_methods.get(name)
        if value is None and name == MAX_SEQ_LEN:
            yield _error(f"{PROGRAM} has no method '{name}', which clients ask for the context.")
        elif value is not None and value != (context,):
            said = ", ".join(map(str, value))
            yield _error(f"{PROGRAM}: '{name}' gives {said}, the manifest's context is {context}.")


def _tensors(
    method: str, kind: str, found: Sequence[Any], wanted: Sequence[tuple[str, Sizes]]
) -> Iterator[ExportError]:
    if len(found) != len(wanted):
        yield _error(f"{PROGRAM}: method '{method}' has {len(found)} {kind}s, not {len(wanted)}.")
        return
    for number, (tensor, (dtype, sizes)) in enumerate(zip(found, wanted, strict=True), 1):
        fits = (
            isinstance(tensor, Tensor)
            and tensor.dtype == dtype
            and len(tensor.sizes) == len(sizes)
            and all(size in (None, own) for size, own in zip(sizes, tensor.sizes, strict=True))
        )
        if not fits:
            own = tensor.shape if isinstance(tensor, Tensor) else repr(tensor)
            shape = ",".join("any" if size is None else str(size) for size in sizes)
            yield _error(
                f"{PROGRAM}: {kind} {number} of method '{method}' is {own}, "
                f"not {dtype}[{shape}] as the manifest has it."
            )


def _size_problems(file: PteFile, bundle: Bundle, vocabulary: int) -> Iterator[ExportError]:
    """Widths that differ from method to method, and logits that are too few."""
    methods = file.methods
    widths = {
        f"the output of '{VISION}'": methods[VISION].outputs[0].sizes[-1],
        f"the output of '{EMBEDDING}'": methods[EMBEDDING].outputs[0].sizes[-1],
        f"the input of '{DECODER}'": methods[DECODER].inputs[0].sizes[-1],
    }
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} is {width} wide" for name, width in widths.items())
        yield _error(f"{PROGRAM}: {said}.")
    logits = methods[DECODER].outputs[0].sizes[-1]
    if vocabulary > logits:
        yield ExportError(
            f"{bundle.path}: the tokenizer has ids up to {vocabulary - 1}, the logits of "
            f"'{DECODER}' are {logits} wide: a runner would read beyond them.",
            "Put the tokenizer back that it was exported with, or export it again: "
            "fastvlm-export --target executorch --out DIR --force",
        )


def runtime_problems(
    file: PteFile, backends: Sequence[str], operators: Sequence[str], memory: int
) -> list[ExportError]:
    """What a program needs that this runtime does not have."""
    found = []
    missing = [name for name in file.backends if name not in backends]
    if missing:
        found.append(
            ExportError(
                f"{PROGRAM} needs the backend {', '.join(missing)}, which ExecuTorch's runtime "
                f"does not have here; it has {', '.join(backends)}.",
                "Run it on such a device, or export for this machine: "
                "fastvlm-export --target executorch --backend xnnpack --out DIR",
            )
        )
    known = set(operators)
    names = {name for method in file.methods.values() for name in method.kernels}
    unknown = sorted(names - known)
    if unknown:
        found.append(
            _error(f"{PROGRAM} needs operators that the runtime lacks: {', '.join(unknown)}.")
        )
    planned = sum(sum(method.planned_bytes) for method in file.methods.values())
    if planned > memory:
        found.append(
            ExportError(
                f"{PROGRAM} sets {planned / 2**30:.1f} GiB aside for its tensors; this machine "
                f"has {memory / 2**30:.1f} GiB.",
                "Export it with a shorter --context, or run it where there is more memory.",
            )
        )
    return found


def _error(message: str) -> ExportError:
    return ExportError(message, EXPORT_HINT)
