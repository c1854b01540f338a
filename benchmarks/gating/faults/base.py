"""A fault, and how it gets into a copy of a bundle."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_export import targets
from fastvlm_export.exporter.bundle import MANIFEST, REPORT_FOLDER, Bundle, files_of, open_bundle
from fastvlm_export.quantize.recipes import recorded
from fastvlm_export.targets.base import Options

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fastvlm_export.validate.proof import Reference

Alteration = Callable[["Mapping[str, ExportedProgram]"], AbstractContextManager[None]]
"""Programs are others as long as the context lasts."""


class NoPlaceError(Exception):
    """The artifact has nothing that this fault could change."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, and what makes it so in a bundle's folder, or in what is lowered to it.

    `core` faults are planted under every recipe, others under one of `recipes` at least; none: any
    recipe.
    """

    name: str
    plant: Callable[[Path], None] | None = None
    alter: Alteration | None = None
    core: bool = False
    recipes: tuple[str, ...] = ()


def planted(source: Bundle, reference: "Reference", folder: Path, fault: Fault) -> Bundle:
    """A copy of the bundle in the new `folder`, with the fault and with hashes that hide it.

    Raises NoPlaceError where the fault finds nothing to change.
    """
    if fault.alter:
        _lower(source, reference, folder, fault.alter)
    else:
        shutil.copytree(source.path, folder)
    if fault.plant:
        fault.plant(folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    hashes = files_of(folder)
    manifest["files"] = {name: hashes[name] for name in manifest["files"]}
    content = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    if content == source.manifest.to_json():
        raise NoPlaceError(f"{fault.name} changed nothing")
    (folder / MANIFEST).write_text(content, "utf-8")
    return open_bundle(folder)


def _lower(source: Bundle, reference: "Reference", folder: Path, alter: Alteration) -> None:
    """The reference's programs as altered, written as the bundle was."""
    if reference.programs is None:
        raise NoPlaceError("the programs are not known")
    manifest, programs = source.manifest, reference.programs()
    target = targets.get(manifest.target)
    backend = manifest.artifact.get("backend")
    folder.mkdir()
    with alter(programs):
        target.lower(
            programs,
            reference.spec,
            recorded(manifest.recipe),
            folder,
            Options(backend=None if backend is None else str(backend)),
        )
    shutil.rmtree(folder / REPORT_FOLDER, ignore_errors=True)
    shutil.copy2(source.path / MANIFEST, folder / MANIFEST)
