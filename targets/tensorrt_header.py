"""What a serialized engine says of itself in its first bytes, which no driver is needed to read.

TensorRT for RTX begins an engine with "vtrt", the number of all bytes, its own version, a bit for
each compute capability that it serves and the number of bytes of its weights; so a truncated file,
one without its weights, another version's, another GPU's and any other file can be told before CUDA
is asked for anything. The places of these were found in the engines of version 1.7.1; of TensorRT's
own format nothing is known, and nothing is checked.
"""

from pathlib import Path

from .tensorrt_package import NAMES, Backend

MAGIC = b"vtrt"
HEADER = 64
SIZE = slice(16, 24)
VERSION = slice(24, 28)
SERVED = slice(32, 36)
WEIGHTS = slice(56, 64)
CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""What the bits stand for, the lowest first."""


def problems(
    path: Path, backend: Backend, version: str, capabilities: tuple[str, ...], weight_bytes: int = 0
) -> list[str]:
    """Why the file can't be that version's engine for these GPUs; none: it may be.

    `weight_bytes`: of the graph's stored tensors. The engine may hold them more than once.
    """
    if backend is not Backend.RTX:
        return []
    with path.open("rb") as file:
        head = file.read(HEADER)
    if len(head) < HEADER or not head.startswith(MAGIC):
        return [f"{path.name} is no engine of {NAMES[backend]}"]
    found = []
    stated, size = int.from_bytes(head[SIZE], "little"), path.stat().st_size
    if stated != size:
        found.append(f"{path.name} has {size:,} of its {stated:,} bytes")
    made_by = ".".join(map(str, head[VERSION]))
    if made_by != version:
        found.append(f"{path.name} was built by version {made_by}, not by {version}")
        return found
    bits = int.from_bytes(head[SERVED], "little")
    served = tuple(name for place, name in enumerate(CAPABILITIES) if bits >> place & 1)
    if set(served) != set(capabilities):
        found.append(f"{path.name} is for compute capability {', '.join(served) or 'none'}")
    held = int.from_bytes(head[WEIGHTS], "little")
    if held < weight_bytes:
        found.append(f"{path.name} holds {held:,} bytes of weights, the graph {weight_bytes:,}")
    return found
