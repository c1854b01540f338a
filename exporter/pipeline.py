"""The whole flow: checkpoint -> graphs -> artifact -> proof -> published bundle."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..quantize.apply import Quantized, Record, needs_calibration, quantize
from ..quantize.calibration import Calibration
from ..quantize.calibration import load as load_calibration
from ..quantize.recipes import Recipe, recorded
from ..targets.eager import ProgramSession
from ..validate.latency import Plan
from ..validate.machine import instructions, peak_memory
from ..validate.proof import examine, prove, pytorch_peer, run_original
from ..validate.proof_types import Original, Proof, Reference
from ..validate.report import Example, Export, Folding, Report, check_report
from ..validate.report import files_of as report_files
from ..validate.rounding_floor import has_float_floor
from ..validate.sessions import has_exact, not_timed, runtime
from ..validate.stored import NOT_COMPARED, has_stored
from . import bundle as bundles
from . import doctor, ownership, prompt, publish
from .bundle import Bundle, Manifest, Source
from .checkpoint import Checkpoint
from .clock import Clock
from .errors import ExportError
from .progress import Progress, Silent
from .reparameterize import reparameterize
from .requests import (
    Chosen,
    ExportRequest,
    check,
    check_contract,
    check_layers,
    check_prompts,
    inputs,
    real_out,
)
from .samples import Sample, samples
from .source import SourceRequest, contract, load_source, recorded_source
from .spec import ExportSpec
from .tensor_names import Layout

__all__ = ["ExportRequest", "Outcome", "contract", "export", "validate"]

RECORDED_PACKAGES = ("torch", "torchao", "numpy", "tokenizers", "safetensors", "pillow")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One target's result: where its folder is now, and what was found.

    A folder whose proof failed is kept apart from `out`, which stays as it was.
    """

    path: Path
    report: Report

    @property
    def passed(self) -> bool:
        """Whether every gate held."""
        return self.report.passed


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all targets of one export share. `original` runs the checkpoint, once."""

    request: ExportRequest
    checkpoint: Checkpoint
    spec: ExportSpec
    images: Sequence[Sample]
    folding: Folding
    clock: Clock
    original: Callable[[], Original]


def export(request: ExportRequest, progress: Progress | None = None) -> list[Outcome]:
    """Export to every target, prove each artifact, and publish all of them at `request.out`.

    With one target `out` is its bundle, with several a folder of bundles named by target. Nothing
    is published unless every gate of every target held; what failed is kept at `out` + ".failed".
    Targets that compute a recipe alike share one quantized model; one such model is in memory at a
    time. Raises ExportError before any long work when the request itself is wrong.
    """
    clock = Clock(progress or Silent())
    checked = check(request)
    out = real_out(request.out).absolute()
    clock.stage("Load the checkpoint")
    checkpoint = load_source(request.source)
    check_layers(checked, checkpoint.config)
    spec = contract(checkpoint, request.resolution, request.context)
    check_contract(checked, spec)
    images = samples(request.images)
    check_prompts(spec, images)
    clock.stage("Reparameterize the tower")
    folded = reparameterize(checkpoint.model(), clock.detail)
    work = _Work(
        request=request,
        checkpoint=checkpoint,
        spec=spec,
        images=images,
        folding=Folding.of(folded),
        clock=clock,
        original=functools.cache(
            lambda: run_original(checkpoint, spec, images, clock, request.steps)
        ),
    )
    with publish.staging(out) as folder:
        several = len(checked.chosen) > 1
        places = {one.name: folder / one.name if several else folder for one in checked.chosen}
        reports: dict[str, Report] = {}
        groups = list(checked.groups.items())
        while groups:
            recipe, group = groups.pop(0)
            clock.stage(
                "Apply the recipe and trace the graphs" if recipe.quantized else "Trace the graphs"
            )
            quantized = quantize(folded.model, recipe, spec, checked.calibration, clock.detail)
            if not groups:
                del folded  # the float weights: what comes next needs the memory
            reports |= _export_group(work, group, quantized, places)
            del quantized
            gc.collect()  # graph modules refer to themselves: the next group needs the memory
        clock.stage("Publish")
        passed = all(report.passed for report in reports.values())
        final = out if passed else ownership.place_of_failed(out, inputs(request))
        publish.publish(folder, final, force=request.force or not passed)
    return [
        Outcome(path=final / places[one.name].relative_to(folder), report=reports[one.name])
        for one in checked.chosen
    ]


def _export_group(
    work: _Work, group: Sequence[Chosen], quantized: Quantized, places: Mapping[str, Path]
) -> dict[str, Report]:
    """Lower one quantized model to the targets that compute it, and prove each; by target."""
    clock, checkpoint = work.clock, work.checkpoint
    built = []
    for one in group:
        places[one.name].mkdir(exist_ok=True)
        clock.stage(f"Lower to {one.name}")
        built.append(_lower(one, quantized, work, places[one.name]))
    exact = any(map(has_exact, built))
    reference = _reference(checkpoint, work.spec, quantized, exact=exact)
    baseline = examine(reference, work.original(), clock)
    reports = {}
    for bundle in built:
        proof = prove(
            baseline,
            bundle,
            images=work.images,
            plan=work.request.plan,
            peer=pytorch_peer(bundle, work.request.source),
            clock=clock,
        )
        report = _report(
            checkpoint, bundle, proof, work.images, work.folding, quantized.record, clock
        )
        report.write(bundle.path / bundles.REPORT_FOLDER)
        reports[bundle.manifest.target] = report
    return reports


def validate(
    path: Path,
    source: SourceRequest | None = None,
    calibration: Path | None = None,
    images: tuple[Path, ...] = (),
    plan: Plan | None = None,
    progress: Progress | None = None,
    steps: int | None = None,
) -> Outcome:
    """Prove an existing bundle against the checkpoint it was made from; write its report anew.

    Without `source` the manifest must name the bundled model or random weights. The recipe in the
    manifest is the one that its target computes. `steps`: see `ExportRequest`.
    """
    clock = Clock(progress or Silent())
    clock.stage("Check the files")
    bundle = bundles.open_bundle(path, clock.detail)
    check_report(path / bundles.REPORT_FOLDER)
    manifest = bundle.manifest
    clock.stage("Load the checkpoint")
    checkpoint = load_source(source or recorded_source(manifest))
    if checkpoint.sha256 != manifest.source.sha256:
        raise ExportError(
            f"{path} was made from '{manifest.source.name}' ({manifest.source.sha256[:12]}), "
            f"not from this checkpoint ({checkpoint.sha256[:12]}).",
            "Give the checkpoint that it was exported from with --checkpoint.",
        )
    spec = contract(checkpoint, manifest.resolution, manifest.context)
    shown = samples(images)
    quantized = _again(checkpoint, manifest, spec, calibration, clock)
    reference = _reference(checkpoint, spec, quantized, exact=has_exact(bundle))
    if not _made_alike(manifest):
        reference = dataclasses.replace(reference, programs=None)
    original = run_original(checkpoint, spec, shown, clock, steps)
    baseline = examine(reference, original, clock)
    with bundles.reading(bundle):
        proof = prove(baseline, bundle, images=shown, plan=plan, peer=None, clock=clock)
        report = _report(checkpoint, bundle, proof, shown, None, quantized.record, clock)
    report.write(path / bundles.REPORT_FOLDER)
    return Outcome(path=path, report=report)


def _lower(one: Chosen, quantized: Quantized, work: _Work, place: Path) -> Bundle:
    """Write one target's artifact and the manifest beside it."""
    checkpoint, spec, recipe = work.checkpoint, work.spec, quantized.record.recipe
    artifact = one.target.lower(quantized.programs, spec, recipe, place, one.options)
    is_random = checkpoint.layout is Layout.RANDOM
    manifest = Manifest(
        schema=bundles.SCHEMA,
        source=Source(
            name=checkpoint.name,
            layout=checkpoint.layout,
            sha256=checkpoint.sha256,
            seed=work.request.source.seed if is_random else None,
        ),
        target=one.name,
        recipe=recipe.to_dict(),
        quantization=quantized.record.to_dict(),
        resolution=spec.preprocessing.resolution,
        context=spec.context,
        image_tokens=spec.image_tokens,
        preprocessing=spec.preprocessing,
        prompt_template=prompt.TEMPLATE,
        image_token=prompt.IMAGE_TOKEN,
        image_token_id=spec.image_token_id,
        eos_token_ids=spec.eos_token_ids,
        model=dataclasses.asdict(checkpoint.config),
        graphs=artifact.graphs,
        artifact=artifact.details,
        versions={**_versions(), **one.target.availability().versions},
        files=bundles.files_of(place),
    )
    (place / bundles.MANIFEST).write_text(manifest.to_json(), "utf-8")
    return bundles.open_bundle(place)


def _reference(
    checkpoint: Checkpoint, spec: ExportSpec, quantized: Quantized, *, exact: bool
) -> Reference:
    """What artifacts are held to; `exact`: some are compared without rounding, too."""
    programs, recipe = quantized.programs, quantized.record.recipe
    session = functools.partial(ProgramSession, programs, spec.decoder, spec.context)
    return Reference(
        checkpoint=checkpoint,
        spec=spec,
        recipe=recipe,
        quantized=session if recipe.quantized else None,
        exact=functools.partial(session, exact=True) if exact or has_float_floor(recipe) else None,
        programs=lambda: programs,
    )


def _again(
    checkpoint: Checkpoint,
    manifest: Manifest,
    spec: ExportSpec,
    calibration: Path | None,
    clock: Clock,
) -> Quantized:
    """Apply a bundle's recipe to its checkpoint once more, on the same images."""
    recipe = recorded(manifest.recipe)
    images = None
    if needs_calibration(recipe):
        images = load_calibration(calibration)
        then = manifest.quantization["calibration"]["images"]
        if then != {image.name: image.sha256 for image in images.images}:
            raise ExportError(
                f"The bundle was calibrated on {len(then)} other images ("
                f"{', '.join(sorted(then)[:3])}, ...), not on those of {images.source}.",
                "Give the folder that it was calibrated on with --calibration DIR.",
            )
    return _traced(checkpoint, recipe, spec, clock, images)


def _traced(
    checkpoint: Checkpoint,
    recipe: Recipe,
    spec: ExportSpec,
    clock: Clock,
    images: Calibration | None = None,
) -> Quantized:
    clock.stage("Reparameterize the tower")
    folded = reparameterize(checkpoint.model(), clock.detail)
    clock.stage("Apply the recipe and trace the graphs")
    return quantize(folded.model, recipe, spec, images, clock.detail)


def _versions() -> dict[str, str]:
    """What makes the numbers of a recipe, to the last bit, and what they are written with."""
    return {
        "fastvlm-export": __version__,
        **{package: version(package) for package in RECORDED_PACKAGES},
        "instructions": instructions(),
    }


def _made_alike(manifest: Manifest) -> bool:
    """Whether the recipe gives the same numbers here as it did there, to the last bit."""
    return all(manifest.versions.get(name) == found for name, found in _versions().items())


def _report(
    checkpoint: Checkpoint,
    bundle: Bundle,
    proof: Proof,
    images: Sequence[Sample],
    folding: Folding | None,
    record: Record | None,
    clock: Clock,
) -> Report:
    facts = doctor.describe(checkpoint).to_dict()
    del facts["path"]  # a report is handed on; where the files lay is nobody's business
    where = runtime(bundle)
    return Report(
        source=checkpoint.name,
        target=bundle.manifest.target,
        recipe=bundle.manifest.recipe["name"],
        checkpoint=facts,
        reparameterization=folding,
        export=Export(
            seconds=clock.seconds(),
            peak_memory_bytes=peak_memory(),
            files=report_files(bundle.path, bundle.manifest),
        ),
        quantized=record if record and record.recipe.quantized else None,
        quantization=proof.quantization,
        contract=proof.contract,
        parity=proof.parity,
        exact=proof.exact,
        stored=proof.stored,
        stored_note=NOT_COMPARED if has_stored(bundle) and proof.stored is None else "",
        placement=proof.placement,
        engines=proof.engines,
        accuracy=proof.accuracy,
        latency=proof.latency,
        latency_note=not_timed(bundle),
        runtime=where,
        examples=_examples(checkpoint, proof, images),
    )


def _examples(
    checkpoint: Checkpoint, proof: Proof, images: Sequence[Sample]
) -> tuple[Example, ...]:
    """What each side wrote, up to the first end token."""

    def text(tokens: Sequence[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in checkpoint.eos_token_ids]
        return checkpoint.tokenizer.decode(tokens[: ends[0]] if ends else tokens)

    return tuple(
        Example(
            image=sample.image,
            name=sample.name,
            question=sample.question,
            reference=text(run.reference),
            candidate=text(run.candidate),
        )
        for sample, run in zip(images, proof.parity.free_runs, strict=True)
    )
