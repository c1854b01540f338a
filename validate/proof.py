"""Everything that is measured of one bundle: parity, accuracy on the bundled task, latency."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..exporter import checkpoint as checkpoints
from ..exporter.bundle import Bundle, Manifest
from ..exporter.checkpoint import Checkpoint
from ..exporter.clock import Clock
from ..exporter.errors import ExportError
from ..exporter.preprocess import preprocess
from ..exporter.prompt import prompt_ids
from ..exporter.samples import Sample
from ..exporter.source import SourceRequest
from ..exporter.spec import ExportSpec
from ..exporter.tensor_names import Layout
from ..exporter.tokenizer import Tokenizer, read_tokenizer
from ..targets.base import Session
from ..targets.eager import EagerSession
from . import accuracy, digits, exact_floor, latency, parity
from .accuracy import AccuracyReport
from .contract import compare_contract
from .delegation import Delegation, delegation, has_delegation
from .digits import Question
from .latency import Backend, LatencyResult, Plan, Subject
from .limits import exact_limits, limits_for
from .loss import Answers, measure_loss
from .parity import ParityResult
from .proof_types import Accuracy, Baseline, Original, Proof, Reference
from .recording import Case, record
from .rounding_floor import difference, has_float_floor, rounding_floor, widened
from .sessions import has_exact, open_session, runtime
from .stored import compare_stored, has_stored
from .stored_types import StoredWeights
from .tensorrt_build import EngineProof, engines, has_engines

if TYPE_CHECKING:
    pass

QUESTIONS = 300
STEPS = 64
STEPS_OF_RANDOM = 24  # greedy tokens of random weights say the same over and over
EXACT_IMAGES = 1  # without rounding nothing is left to chance: more images would say the same
EXACT_STEPS = 8


def run_original(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    images: Sequence[Sample],
    clock: Clock,
    steps: int | None = None,
) -> Original:
    """Run the raw checkpoint in float32, unreparameterized. Its model is not kept.

    Loading, folding, quantization and export all lie between it and an artifact. `steps` greedy
    tokens are recorded on each image, or fewer where the context has no room for them.
    """
    cases = [_case(sample, spec, spec.tokenizer) for sample in images]
    usual = STEPS_OF_RANDOM if checkpoint.layout is Layout.RANDOM else STEPS
    wanted = usual if steps is None else steps
    room = min((spec.context - len(case.prompt_ids) for case in cases), default=wanted)
    clock.stage("Run the checkpoint in PyTorch")
    session = EagerSession(checkpoint.model(), spec.context)
    return Original(
        recordings=record(session, cases, min(wanted, room), clock.detail),
        answers=_answers(session, checkpoint, spec, "PyTorch", clock),
    )


def examine(reference: Reference, original: Original, clock: Clock) -> Baseline:
    """Run the quantized model, if there is one: then artifacts are held to that.

    One model is in memory at a time.
    """
    limits = limits_for(reference.recipe)
    baseline = Baseline(
        reference=reference,
        limits=limits,
        recordings=original.recordings,
        answers=original.answers,
        loss=None,
    )
    if reference.quantized:
        gc.collect()  # graph modules refer to themselves
        clock.stage("Run the quantized model in PyTorch")
        baseline = _quantized_baseline(baseline, original, reference.quantized(), clock)
    if reference.exact:
        gc.collect()
        clock.stage("Run the exported programs in PyTorch without rounding")
        baseline = _exact_baseline(baseline, reference.exact(), clock)
    return baseline


def _quantized_baseline(
    baseline: Baseline, original: Original, session: Session, clock: Clock
) -> Baseline:
    """The quantized model's loss against the original, its recordings, answers and limits."""
    reference, limits = baseline.reference, baseline.limits
    cases = [recording.case for recording in original.recordings]
    # Random weights know nothing that could be lost: their loss is shown, not judged.
    is_random = reference.checkpoint.layout is Layout.RANDOM
    allowed = None if is_random else reference.recipe.limits
    loss = measure_loss(original.recordings, session, allowed, clock.detail)
    steps = min((recording.steps for recording in original.recordings), default=0)
    recordings = record(session, cases, steps, clock.detail)
    answers = None
    if original.answers and not any(case.flaw for case in loss.cases):  # NaN writes no answer
        answers = _answers(
            session, reference.checkpoint, reference.spec, "PyTorch, quantized", clock
        )
    if original.answers and answers:
        loss = replace(loss, answers=Answers(original=original.answers, quantized=answers))
    if limits.rounded:
        clock.stage("Measure the rounding floor of the quantized model")
        floor = rounding_floor(recordings, session, reference.recipe, clock.detail)
        limits = widened(limits, floor)
    return replace(baseline, limits=limits, recordings=recordings, answers=answers, loss=loss)


def _exact_baseline(baseline: Baseline, session: Session, clock: Clock) -> Baseline:
    """What the programs do without rounding, how far that may be off, and 16-bit floats from it."""
    recordings, limits = baseline.recordings[:EXACT_IMAGES], baseline.limits
    cases = [recording.case for recording in recordings]
    if has_float_floor(baseline.reference.recipe):
        limits = widened(limits, difference(recordings, session))
    exact = record(session, cases, EXACT_STEPS, clock.detail)
    clock.stage("Measure what float32's last bits make of it")
    fixed = exact_limits(baseline.reference.recipe)
    measured = exact_floor.measured(fixed, exact, session, clock.detail)
    if baseline.reference.programs is None:  # the recipe was applied where last bits were others
        measured = fixed.looser(measured)
    return replace(baseline, limits=limits, exact=exact, exact_limits=measured)


def _answers(
    session: Session, checkpoint: Checkpoint, spec: ExportSpec, side: str, clock: Clock
) -> AccuracyReport | None:
    """Answers to the bundled task, of the bundled model only: no other has learned it."""
    if not is_bundled_model(checkpoint):
        return None
    questions = digits.evaluation_set(QUESTIONS)
    return _ask(session, questions, spec, spec.tokenizer, side, clock.detail)


def prove(
    baseline: Baseline,
    bundle: Bundle,
    *,
    images: Sequence[Sample],
    plan: Plan | None,
    peer: Subject | None,
    clock: Clock,
) -> Proof:
    """Hold a bundle against its reference, stage by stage.

    Each side uses its own contract: the checkpoint's, and what the bundle's manifest and tokenizer
    say. `images` are those of the baseline. With a `plan` the bundle is timed, beside `peer` where
    there is one.
    """
    clock.stage("Check what clients read")
    contract = compare_contract(bundle, baseline.reference)
    stored = _stored(baseline.reference, bundle, clock)
    gc.collect()  # graph modules refer to themselves: the reference's memory is wanted back
    placement = _placement(bundle, clock) if has_delegation(bundle) else None
    built = _engines(bundle, clock) if has_engines(bundle) else None
    clock.stage("Open the bundle")
    candidate = open_session(bundle)
    _try_out(candidate)
    tokenizer = read_tokenizer(bundle.path)
    clock.stage("Check parity with PyTorch")
    cases = [_case(sample, bundle.manifest, tokenizer) for sample in images]
    limits = baseline.limits
    compared = parity.compare(baseline.recordings, cases, candidate, limits, clock.detail)
    answers = None
    # Without logits there is no answer: then parity has failed already, and the report says where.
    if baseline.answers and all(run.candidate for run in compared.free_runs):
        clock.stage("Answer the bundled task")
        questions = digits.evaluation_set(QUESTIONS)
        manifest = bundle.manifest
        before = baseline.loss.answers if baseline.loss else None
        answers = Accuracy(
            candidate=_ask(
                candidate, questions, manifest, tokenizer, manifest.target, clock.detail
            ),
            reference=baseline.answers,
            original=before.original if before else None,
            limit=limits.answers,
        )
    del candidate  # what comes next needs the memory
    exact = without_rounding(baseline, bundle, images, clock)
    timed = None
    if plan and runtime(bundle).device:
        clock.stage("Measure latency")
        timed = time_bundle(bundle, images[0], plan, clock.detail, peer)
    return Proof(
        contract=contract,
        parity=compared,
        exact=exact,
        accuracy=answers,
        latency=timed,
        quantization=baseline.loss,
        stored=stored,
        placement=placement,
        engines=built,
    )


def _try_out(candidate: Session) -> None:
    """Run one token: an artifact that cannot run is one error, not a comparison that failed.

    Raises the session's own ExportError. Anything else is left to the comparison, which says what
    stage it breaks.
    """
    try:
        candidate.decode(candidate.embed(np.zeros((1, 1), dtype=np.int64)))
        candidate.reset()
    except ExportError:
        raise
    except Exception:  # noqa: S110 - see above
        pass


def _engines(bundle: Bundle, clock: Clock) -> EngineProof:
    clock.stage("Check the engines")
    return engines(bundle, clock.detail)


def _placement(bundle: Bundle, clock: Clock) -> Delegation:
    clock.stage("Read where it computes")
    return delegation(bundle)


def _stored(reference: Reference, bundle: Bundle, clock: Clock) -> StoredWeights | None:
    """What the files hold, against the programs; those are let go if nobody else has them."""
    if reference.programs is None or not has_stored(bundle):
        return None
    clock.stage("Compare the stored weights")
    return compare_stored(bundle, reference.programs())


def without_rounding(
    baseline: Baseline, bundle: Bundle, images: Sequence[Sample], clock: Clock
) -> ParityResult | None:
    """Both sides computed without rounding: they are the same real numbers, or one is wrong.

    None where the bundle can't be computed like that. `images` are the baseline's.
    """
    if not has_exact(bundle):
        return None
    if baseline.exact is None or baseline.exact_limits is None:
        raise ValueError(f"{bundle.path} has an exact form, and its reference was not asked for it")
    gc.collect()
    clock.stage("Check parity without rounding")
    session = open_session(bundle, exact=True)
    tokenizer = read_tokenizer(bundle.path)
    shown = images[: len(baseline.exact)]
    cases = [_case(sample, bundle.manifest, tokenizer) for sample in shown]
    return parity.compare(baseline.exact, cases, session, baseline.exact_limits, clock.detail)


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
    compute_units: Sequence[str] = (),
) -> LatencyResult:
    """Time the bundle, and beside it whatever else it is to be held against.

    On each of the compute units in turn; none: on those that its runtime chooses.
    """
    manifest = bundle.manifest
    subjects = [
        Subject(
            name=f"{manifest.target}, {units}" if units else manifest.target,
            backend=Backend.BUNDLE,
            bundle=bundle.path,
            compute_units=units,
        )
        for units in compute_units or ("",)
    ]
    ids = prompt_ids(
        read_tokenizer(bundle.path), sample.question, manifest.image_token_id, manifest.image_tokens
    )
    subjects += [peer] if peer else []
    return latency.measure(subjects, sample.path or sample.image, ids, plan, say)


def _case(sample: Sample, contract: ExportSpec | Manifest, tokenizer: Tokenizer) -> Case:
    """The sample as one side's contract makes it."""
    return Case(
        name=sample.name,
        pixels=preprocess(sample.image, contract.preprocessing),
        prompt_ids=prompt_ids(
            tokenizer, sample.question, contract.image_token_id, contract.image_tokens
        ),
        image_token_id=contract.image_token_id,
    )


def _ask(
    session: Session,
    questions: Sequence[Question],
    contract: ExportSpec | Manifest,
    tokenizer: Tokenizer,
    side: str,
    say: Callable[[str], None],
) -> AccuracyReport:
    return accuracy.evaluate(
        session,
        questions,
        tokenizer=tokenizer,
        preprocessing=contract.preprocessing,
        image_token_id=contract.image_token_id,
        image_tokens=contract.image_tokens,
        eos_token_ids=contract.eos_token_ids,
        progress=lambda done, total: say(f"{side}, {done} of {total}"),
    )
