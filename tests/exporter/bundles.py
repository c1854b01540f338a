"""Tiny bundles: whole as far as files and manifest go, with texts for artifacts."""

from pathlib import Path

from fastvlm_export.exporter import bundle as bundles
from fastvlm_export.exporter.bundle import Manifest, Source
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.quantize import recipes


def write(folder: Path, content: str = "weights", target: str = "onnx") -> Manifest:
    """A bundle of two files and a manifest; `content` is the larger one's."""
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "graph.onnx").write_text(content)
    (folder / "config.json").write_text("{}")
    manifest = Manifest(
        schema=bundles.SCHEMA,
        source=Source(name="x", layout="apple", sha256="00"),
        target=target,
        recipe=recipes.get("fp32").to_dict(),
        quantization={},
        resolution=256,
        context=512,
        image_tokens=16,
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=256),
        prompt_template="qwen_2",
        image_token="<image>",  # noqa: S106 - not a secret
        image_token_id=7,
        eos_token_ids=(2, 3),
        model={"layers": 2},
        graphs={"vision": {"inputs": {"pixel_values": "float32[1,3,256,256]"}}},
        versions={"torch": "2.13"},
        files=bundles.files_of(folder),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def made(folder: Path, content: str = "weights", target: str = "onnx") -> Path:
    """The same in a folder that is made for it."""
    folder.mkdir(parents=True)
    write(folder, content, target)
    return folder


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())
