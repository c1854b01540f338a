"""The whole flow: checkpoint -> graphs -> artifact -> proof -> published bundle."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from .. import __version__, targets
from ..quantize import recipe_file
from ..quantize.apply import Quantized, Record, needs_calibration, quantize
from ..quantize.calibration import Calibration
from ..quantize.calibration import load as load_calibration
from ..quantize.recipes import Recipe, recorded, unused_rules
from ..quantize.weights import layer_names, layer_widths
from ..targets.base import Target
from ..targets.eager import ProgramSession
from ..validate.latency import Plan
from ..validate.machine import peak_memory
from ..validate.proof import Proof, Reference, examine, prove, pytorch_peer
from ..validate.report import Example, Export, Folding, Report
from ..validate.report import files_of as report_files
from . import bundle as bundles
from . import doctor, prompt
from .bundle import Bundle, Manifest, Source
from .checkpoint import Checkpoint
from .clock import Clock
from .config import FastVLMConfig
from .errors import ExportError, raise_together
from .model.fastvlm import FastVLM, build
from .progress import Progress, Silent
from .reparameterize import reparameterize
from .samples import Sample, samples
from .source import SourceRequest, contract, load_source, recorded_source
from .spec import ExportSpec
from .tensor_names import Layout

RECORDED_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "pillow")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What `fastvlm-export` was asked for. None means the checkpoint's own.

    `recipe` is a built-in's name or a path of a TOML file, `calibration` a folder of images.
    """

    source: SourceRequest
    out: Path
    targets: tuple[str, ...] = (targets.TargetName.ONNX,)
    recipe: str = "fp32"
    calibration: Path | None = None
    resolution: int | None = None
    context: int | None = None
    images: tuple[Path, ...] = ()
    force: bool = False
    plan: Plan | None = None


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


def export(request: ExportRequest, progress: Progress | None = None) -> list[Outcome]:
    """Export to every target, prove each artifact, and publish all of them at `request.out`.

    With one target `out` is its bundle, with several a folder of bundles named by target. Nothing
    is published unless every gate of every target held; what failed is kept at `out` + ".failed".
    Raises ExportError before any long work when the request itself is wrong.
    """
    clock = Clock(progress or Silent())
    chosen, recipe, calibration = _check(request)
    out = Path(os.path.normpath(request.out.absolute()))
    clock.stage("Load the checkpoint")
    checkpoint = load_source(request.source)
    _refuse(recipe, chosen, build(_folded(checkpoint.config)))
    spec = contract(checkpoint, request.resolution, request.context)
    images = samples(request.images)
    clock.stage("Reparameterize the tower")
    folded = reparameterize(checkpoint.model(), clock.detail)
    folding = Folding.of(folded)
    clock.stage("Apply the recipe and trace the graphs" if recipe.quantized else "Trace the graphs")
    quantized = quantize(folded.model, recipe, spec, calibration, clock.detail)
    del folded  # the float weights: what comes next needs the memory
    with bundles.staging(out) as folder:
        built = []
        for name, target in chosen.items():
            place = folder / name if len(chosen) > 1 else folder
            place.mkdir(exist_ok=True)
            clock.stage(f"Lower to {name}")
            seed = request.source.seed
            built.append(_lower(name, target, quantized, spec, checkpoint, seed, place))
        baseline = examine(_reference(checkpoint, spec, quantized), images, clock)
        outcomes = []
        for bundle in built:
            peer = pytorch_peer(bundle, request.source)
            proof = prove(
                baseline, bundle, images=images, plan=request.plan, peer=peer, clock=clock
            )
            report = _report(checkpoint, bundle, proof, images, folding, quantized.record, clock)
            report.write(bundle.path / bundles.REPORT_FOLDER)
            outcomes.append((bundle.path.relative_to(folder), report))
        clock.stage("Publish")
        final = out if all(report.passed for _, report in outcomes) else _failed(out)
        bundles.publish(folder, final)
    return [Outcome(path=final / place, report=report) for place, report in outcomes]


def validate(
    path: Path,
    source: SourceRequest | None = None,
    calibration: Path | None = None,
    images: tuple[Path, ...] = (),
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prove an existing bundle against the checkpoint it was made from; write its report anew.

    Without `source` the manifest must name the bundled model or random weights.
    """
    clock = Clock(progress or Silent())
    clock.stage("Check the files")
    bundle = bundles.open_bundle(path, clock.detail)
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
    baseline = examine(_reference(checkpoint, spec, quantized), shown, clock)
    proof = prove(baseline, bundle, images=shown, plan=plan, peer=None, clock=clock)
    record = quantized.record if quantized else None
    report = _report(checkpoint, bundle, proof, shown, None, record, clock)
    report.write(path / bundles.REPORT_FOLDER)
    return Outcome(path=path, report=report)


def _check(request: ExportRequest) -> tuple[dict[str, Target], Recipe, Calibration | None]:
    """All that is wrong with a request and can be known before work starts, at once."""
    problems: list[ExportError] = []
    chosen: dict[str, Target] = {}
    recipe, calibration = Recipe(name=""), None

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except ExportError as error:
            problems.append(error)

    def choose(name: str) -> None:
        target = targets.get(name)
        availability = target.availability()
        if not (availability.lower and availability.run):
            raise ExportError(f"Target '{name}' can't be used here.", availability.remedy)
        chosen[name] = target

    def read_recipe() -> None:
        nonlocal recipe
        recipe = recipe_file.find(request.recipe)

    def read_calibration() -> None:
        nonlocal calibration
        if request.calibration or needs_calibration(recipe):
            calibration = load_calibration(request.calibration)

    attempt(read_recipe)
    for name in request.targets:
        attempt(lambda name=name: choose(name))  # type: ignore[misc]
    attempt(lambda: _refuse(recipe, chosen))
    attempt(read_calibration)
    attempt(lambda: bundles.check_out(request.out, force=request.force))
    attempt(lambda: samples(request.images))
    raise_together(problems)
    return chosen, recipe, calibration


def _folded(config: FastVLMConfig) -> FastVLMConfig:
    """The sizes after reparameterization, whose layers a recipe speaks about."""
    return replace(config, tower=replace(config.tower, train_form=False))


def _refuse(recipe: Recipe, chosen: Mapping[str, Target], model: FastVLM | None = None) -> None:
    """Raise ExportError with all that the targets can't express of a recipe.

    With a model, also groups that don't divide a layer and rules that match none.
    """
    widths, tied, found = None, False, []
    if model is not None:
        widths, tied = layer_widths(model.decoder), model.config.decoder.tied
        found = unused_rules(recipe, layer_names(model))
    for target in chosen.values():
        found += target.problems(recipe, widths, tied=tied)
    if found:
        raise ExportError(
            "\n".join(found),
            "Change the recipe, or the target: `fastvlm-export targets` shows who takes which.",
        )


def _lower(
    name: str,
    target: Target,
    quantized: Quantized,
    spec: ExportSpec,
    checkpoint: Checkpoint,
    seed: int,
    place: Path,
) -> Bundle:
    recipe = quantized.record.recipe
    artifact = target.lower(quantized.programs, spec, recipe, place)
    packages = {package: version(package) for package in RECORDED_PACKAGES}
    is_random = checkpoint.layout is Layout.RANDOM
    manifest = Manifest(
        schema=bundles.SCHEMA,
        source=Source(
            name=checkpoint.name,
            layout=checkpoint.layout,
            sha256=checkpoint.sha256,
            seed=seed if is_random else None,
        ),
        target=name,
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
        versions={
            "fastvlm-export": __version__,
            **packages,
            **target.availability().versions,
        },
        files=bundles.files_of(place),
    )
    (place / bundles.MANIFEST).write_text(manifest.to_json(), "utf-8")
    return bundles.open_bundle(place)


def _reference(checkpoint: Checkpoint, spec: ExportSpec, quantized: Quantized | None) -> Reference:
    if quantized is None or not quantized.record.recipe.quantized:
        return Reference(checkpoint=checkpoint, spec=spec)
    programs = quantized.programs
    return Reference(
        checkpoint=checkpoint,
        spec=spec,
        recipe=quantized.record.recipe,
        quantized=lambda: ProgramSession(programs, spec.decoder, spec.context),
    )


def _again(
    checkpoint: Checkpoint,
    manifest: Manifest,
    spec: ExportSpec,
    calibration: Path | None,
    clock: Clock,
) -> Quantized | None:
    """Apply a bundle's recipe to its checkpoint once more, on the same images; None for fp32."""
    recipe = recorded(manifest.recipe)
    if not recipe.quantized:
        return None
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
    clock.stage("Reparameterize the tower")
    folded = reparameterize(checkpoint.model(), clock.detail)
    clock.stage("Apply the recipe and trace the graphs")
    return quantize(folded.model, recipe, spec, images, clock.detail)


def _failed(out: Path) -> Path:
    """Where a folder goes whose proof failed: in the place of an earlier failed one, if any."""
    names = (f"{out.name}.failed{f'-{n}' if n else ''}" for n in itertools.count())
    places = map(out.with_name, names)
    return next(place for place in places if not place.exists() or bundles.is_ours(place))


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
        parity=proof.parity,
        accuracy=proof.accuracy,
        latency=proof.latency,
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
