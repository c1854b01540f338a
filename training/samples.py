"""Draw the bundled sample images from held-out digits: `python training/samples.py`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from fastvlm_export.validate import digits
from fastvlm_export.validate.digits import Kind

FOLDER = Path(__file__).resolve().parent.parent / "exporter" / "assets" / "images"
SEED = 7
ASKED = (Kind.NUMBER, Kind.NUMBER, Kind.COUNT, Kind.COLOUR)


def main() -> None:
    """Write one canvas per question of `ASKED`, and samples.json with what is expected."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)  # noqa: S311 - reproducible, not secret
    listed = []
    for length, kind in zip((3, 4, 2, 1), ASKED, strict=True):
        scene = digits.compose(rng, rng.sample(digits.held_out_scans(), length))
        name = f"{scene.colour}-{scene.digits}.png"
        Image.fromarray(scene.pixels).save(FOLDER / name, optimize=True)
        listed.append(
            {"image": name, "question": digits.QUESTIONS[kind], "answer": scene.answer(kind)}
        )
    (FOLDER / "samples.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
