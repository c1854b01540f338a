"""The process that runs a program for the first time, because it may be the process's last.

ExecuTorch's runtime trusts a program: a damaged one can end the process that loads it. Reads one
JSON line {"program": PATH, "weights": PATH or null, "runs": [[method, [[dtype, sizes], ...]]]},
runs those on zeros and ends with 0; what the runtime says is on stderr. Run by `executorch_proof`.
"""

import contextlib
import json
import sys
from typing import Any

import torch
from executorch.extension.pybindings import _C as runtime  # noqa: N811 - a module


def main() -> None:
    """Load the program and run each method once."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - where there are core dumps

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    program = runtime._load_program(job["program"], data_path=job["weights"])
    methods = {name: program.load_method(name) for name, _ in job["runs"]}
    for name, inputs in job["runs"]:
        methods[name].call(
            [torch.zeros(sizes, dtype=getattr(torch, dtype)) for dtype, sizes in inputs]
        )


if __name__ == "__main__":
    main()
