"""Everything that is measured of one bundle: parity, accuracy on the bundled task, latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import targets
from ..exporter import checkpoint as checkpoints
from ..exporter.bundle import Bundle
from ..exporter.checkpoint import Checkpoint
from ..exporter.clock import Clock
from ..exporter.preprocess import preprocess
from ..exporter.prompt import prompt_ids
from ..exporter.samples import Sample
from ..exporter.source import SourceRequest
from ..exporter.spec import ExportSpec
from ..exporter.tokenizer import Tokenizer, read_tokenizer
from ..targets.base import Session
from ..targets.eager import EagerSession
from . import accuracy, digits, latency, parity
from .accuracy import AccuracyReport
from .checks import Check
from .latency import Backend, LatencyResult, Plan, Subject
from .parity import Case, ParityResult

QUESTIONS = 300
STEPS = 24


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint as it was stored, and the contract that the bundle was to be built to."""

    checkpoint: Checkpoint
    spec: ExportSpec


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact answers on the bundled task: the reference's, and the bundle's."""

    reference: AccuracyReport
    candidate: AccuracyReport

    @property
    def check(self) -> Check:
        """Questions that the bundle answers otherwise than PyTorch does."""
        same = self.candidate.agreement(self.reference)
        return Check(name="answers that differ", value=same.total - same.right, limit=0)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found. `accuracy` is None but for the bundled model, `latency` where not asked."""

    parity: ParityResult
    accuracy: Accuracy | None
    latency: LatencyResult | None

    @property
    def passed(self) -> bool:
        """Whether every gate held."""
        return self.parity.passed and (self.accuracy is None or self.accuracy.check.passed)


def prove(
    reference: Reference,
    bundle: Bundle,
    *,
    images: Sequence[Sample],
    plan: Plan | None,
    peer: Subject | None,
    clock: Clock,
) -> Proof:
    """Hold a bundle against the raw checkpoint in float32, unreparameterized, stage by stage.

    Loading, folding and export all lie between the two. Each side uses its own contract: the
    checkpoint's, and what the bundle's manifest and tokenizer say. With a `plan` the bundle is
    timed, beside `peer` where there is one.
    """
    clock.stage("Open the bundle")
    candidate = targets.get(bundle.manifest.target).open(bundle)
    session = EagerSession(reference.checkpoint.model(), reference.spec.context)
    tokenizer = read_tokenizer(bundle.path)
    clock.stage("Check parity with PyTorch")
    cases = [_case(sample, reference.spec, bundle, tokenizer) for sample in images]
    limits = parity.LIMITS[bundle.manifest.recipe]
    compared = parity.compare(session, candidate, cases, limits, STEPS, clock.detail)
    answers = None
    if is_bundled_model(reference.checkpoint):
        clock.stage("Answer the bundled task")
        answers = _accuracy(session, candidate, reference.spec, bundle, tokenizer, clock.detail)
    del session, candidate  # what is timed next needs the memory
    timed = None
    if plan:
        clock.stage("Measure latency")
        timed = time_bundle(bundle, images[0], plan, clock.detail, peer)
    return Proof(parity=compared, accuracy=answers, latency=timed)


def is_bundled_model(checkpoint: Checkpoint) -> bool:
    """Whether these are the bundled model's files, wherever they lie."""
    return checkpoint.sha256 == checkpoints.bundled().sha256


def pytorch_peer(bundle: Bundle, source: SourceRequest) -> Subject:
    """PyTorch on the weights that a bundle was made from, by the bundle's own contract."""
    name = "bundled"
    if source.checkpoint:
        name = str(source.checkpoint)
    elif source.random:
        name = f"random:{source.random}:{source.seed}"
    return Subject(
        name=Backend.PYTORCH, backend=Backend.PYTORCH, bundle=bundle.path, checkpoint=name
    )


def time_bundle(
    bundle: Bundle,
    sample: Sample,
    plan: Plan,
    say: Callable[[str], None],
    peer: Subject | None = None,
) -> LatencyResult:
    """Time the bundle, and beside it whatever else it is to be held against."""
    manifest = bundle.manifest
    subject = Subject(name=manifest.target, backend=Backend.BUNDLE, bundle=bundle.path)
    ids = prompt_ids(
        read_tokenizer(bundle.path), sample.question, manifest.image_token_id, manifest.image_tokens
    )
    subjects = [subject, peer] if peer else [subject]
    return latency.measure(subjects, sample.path or sample.image, ids, plan, say)


def _case(sample: Sample, spec: ExportSpec, bundle: Bundle, tokenizer: Tokenizer) -> Case:
    manifest = bundle.manifest
    return Case(
        name=sample.name,
        reference_pixels=preprocess(sample.image, spec.preprocessing),
        candidate_pixels=preprocess(sample.image, manifest.preprocessing),
        prompt_ids=prompt_ids(
            spec.tokenizer, sample.question, spec.image_token_id, spec.image_tokens
        ),
        candidate_prompt_ids=prompt_ids(
            tokenizer, sample.question, manifest.image_token_id, manifest.image_tokens
        ),
        image_token_id=spec.image_token_id,
    )


def _accuracy(
    reference: Session,
    candidate: Session,
    spec: ExportSpec,
    bundle: Bundle,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> Accuracy:
    questions = digits.evaluation_set(QUESTIONS)
    manifest = bundle.manifest

    def progress(side: str) -> Callable[[int, int], None]:
        return lambda done, total: say(f"{side}, {done} of {total}")

    return Accuracy(
        reference=accuracy.evaluate(
            reference,
            questions,
            tokenizer=spec.tokenizer,
            preprocessing=spec.preprocessing,
            image_token_id=spec.image_token_id,
            image_tokens=spec.image_tokens,
            eos_token_ids=spec.eos_token_ids,
            progress=progress("PyTorch"),
        ),
        candidate=accuracy.evaluate(
            candidate,
            questions,
            tokenizer=tokenizer,
            preprocessing=manifest.preprocessing,
            image_token_id=manifest.image_token_id,
            image_tokens=manifest.image_tokens,
            eos_token_ids=manifest.eos_token_ids,
            progress=progress(manifest.target),
        ),
    )
