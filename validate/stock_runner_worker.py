"""The process that ExecuTorch's `MultimodalRunner` runs in: one JSON line in, one per prompt out.

What the runner prints itself (each piece, then its report) goes to a file, from which every answer
takes its own. Run by `stock_runner`.
"""

import json
import os
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from executorch.extension.llm.runner import _llm_runner as llm
from numpy.typing import NDArray


def main() -> None:
    """Answer every prompt of the job."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    arrays = np.load(job["pixels"])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        files = [job["program"], job["tokenizer"], *([job["weights"]] if job["weights"] else [])]
        runner = llm.MultimodalRunner(*files)
        config = llm.GenerationConfig(
            echo=False, temperature=0.0, max_new_tokens=job["max_new_tokens"]
        )
        for parts in job["prompts"]:
            prompt = [_input(part, arrays) for part in parts]
            begin = printed.seek(0, os.SEEK_END)
            for _ in range(job["repeats"]):
                pieces: list[str] = []
                runner.reset()
                runner.generate(prompt, config, pieces.append)
            printed.seek(begin)
            said = printed.read().decode("utf-8", errors="replace")
            out.write(json.dumps({"pieces": pieces, "printed": said}) + "\n")
            out.flush()


def _input(part: dict[str, Any], arrays: Any) -> Any:
    if "text" in part:
        return llm.make_text_input(part["text"])
    if "tokens" in part:
        return llm.make_token_input(part["tokens"])
    pixels: NDArray[np.float32] = arrays[part["image"]]
    return llm.make_image_input(torch.from_numpy(pixels))


if __name__ == "__main__":
    main()
