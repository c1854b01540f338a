"""What one does with a finished bundle: ask it a question, time it."""

from dataclasses import dataclass
from pathlib import Path

from ..targets import TargetName, tensorrt
from ..targets.coreml_session import COMPUTE_UNITS, DEFAULT_UNITS
from ..targets.generation import PromptInputs, Sampling, generate
from ..validate import placement
from ..validate.latency import Backend, LatencyResult, Plan
from ..validate.placement import Placement
from ..validate.proof import pytorch_peer, time_bundle
from ..validate.sessions import not_timed, open_session, runtime
from . import prompt
from .bundle import Bundle, open_bundle, reading
from .clock import Clock
from .console import messages
from .errors import ExportError
from .preprocess import preprocess, read_image
from .progress import Progress, Silent
from .samples import samples
from .source import SourceRequest, recorded_source
from .tokenizer import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, about an image or about none; temperature 0 is greedy."""

    bundle: Path
    prompt: str
    image: Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The text and its token ids, the end token left out."""

    text: str
    token_ids: list[int]


def ask(question: Question) -> Answer:
    """Answer with the bundle alone: its artifact, its tokenizer, its preprocessing.

    Says on stderr where a reference interpreter stands in for the bundle's own runtime.
    """
    sampling = None
    if question.temperature:
        sampling = Sampling(
            temperature=question.temperature, top_p=question.top_p, seed=question.seed
        )
    image = read_image(question.image) if question.image else None
    bundle = open_bundle(question.bundle)
    manifest = bundle.manifest
    tokenizer = read_tokenizer(bundle.path)
    ids = prompt.prompt_ids(
        tokenizer, question.prompt, manifest.image_token_id, manifest.image_tokens if image else 0
    )
    room = manifest.context - len(ids)
    if room < 1:
        raise ExportError(
            f"The prompt takes {len(ids)} of the context's {manifest.context} positions.",
            "Shorten --prompt, or export again with a larger --context.",
        )
    where = runtime(bundle)
    if not where.device:
        the = "" if where.name.startswith("ONNX") else "the "
        messages.print(
            f"Answered by {the}{where.name}: as the bundle says, not as fast as a device."
        )
    with reading(bundle):
        tokens = generate(
            open_session(bundle),
            PromptInputs(
                input_ids=ids,
                image_token_id=manifest.image_token_id,
                pixels=preprocess(image, manifest.preprocessing) if image else None,
            ),
            max_new_tokens=min(question.max_new_tokens, room),
            eos_token_ids=manifest.eos_token_ids,
            sampling=sampling,
        )
    return Answer(text=tokenizer.decode(tokens), token_ids=tokens)


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What `bench` was asked for. `against` is "pytorch" or None; `image` None is a bundled one.

    `compute_units` are for Core ML only, `coreml_session.COMPUTE_UNITS`; none: all of the device.
    """

    bundle: Path
    source: SourceRequest | None = None
    image: Path | None = None
    against: str | None = None
    plan: Plan | None = None
    compute_units: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Times, and for Core ML where each operation runs: one placement per choice of units."""

    latency: LatencyResult
    placements: tuple[Placement, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data: the latency's own, and `placement`."""
        return {
            **self.latency.to_dict(),
            "placement": [one.to_dict() for one in self.placements],
        }


def bench(request: BenchRequest, progress: Progress | None = None) -> BenchResult:
    """Time a bundle, and beside it PyTorch where asked for."""
    clock = Clock(progress or Silent())
    if request.against not in (None, Backend.PYTORCH):
        raise ExportError(
            f"--against {request.against}: there is no such peer.", "Use --against pytorch."
        )
    shown = samples([request.image] if request.image else ())
    clock.stage("Check the files")
    bundle = open_bundle(request.bundle, clock.detail)
    units = _compute_units(bundle, request.compute_units)
    peer = None
    if request.against:
        peer = pytorch_peer(bundle, request.source or recorded_source(bundle.manifest))
    clock.stage("Measure latency")
    sample = shown[-1] if request.image else shown[0]
    plan = request.plan or Plan()
    with reading(bundle):
        timed = time_bundle(bundle, sample, plan, clock.detail, peer, units)
        if units:
            clock.stage("Ask Core ML where each operation runs")
        placements = tuple(_placement(bundle, one) for one in units)
    return BenchResult(latency=timed, placements=placements)


def _compute_units(bundle: Bundle, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Each choice once, Core ML's default where none was made; none for any other target.

    Raises ExportError for what there is not, and for a bundle that nothing here runs as a device
    would.
    """
    target = bundle.manifest.target
    problems = [units for units in asked if units not in COMPUTE_UNITS]
    if problems:
        raise ExportError(
            f"--compute-units {', '.join(problems)}: there are no such units.",
            f"Use: {', '.join(COMPUTE_UNITS)}.",
        )
    if asked and target != TargetName.COREML:
        raise ExportError(
            f"--compute-units are Core ML's; this is a bundle of target '{target}'.",
            "Leave them out, or export with --target coreml.",
        )
    where = runtime(bundle)
    if not where.device and target == TargetName.EXECUTORCH:
        raise ExportError(
            f"What this bundle hands over to Core ML is timed on Apple's devices. Here there is "
            f"only the {where.name}, whose speed says nothing about one.",
            "See examples/ios; a bundle of --backend xnnpack is timed here, too.",
        )
    if not where.device and target == TargetName.TENSORRT:
        remedy = tensorrt.availability().remedy
        raise ExportError(
            f"Engines are timed on an NVIDIA GPU. Here there is only {where.name}, whose speed "
            "says nothing about one.",
            f"{remedy} There: fastvlm-export bench {bundle.path}" if remedy else not_timed(bundle),
        )
    if not where.device:
        command = " ".join(["bench", str(bundle.path), *(f"--compute-units {u}" for u in asked)])
        raise ExportError(
            f"Target '{target}' is timed on its own runtime, which needs macOS. Here there is only "
            f"the {where.name}, whose speed says nothing about a device.",
            f"Copy the bundle to a Mac and run there: fastvlm-export {command}",
        )
    if target != TargetName.COREML:
        return ()
    return tuple(dict.fromkeys(asked)) or (DEFAULT_UNITS,)


def _placement(bundle: Bundle, units: str) -> Placement:
    """Where operations run; a plan that can't be had must not cost what was timed."""
    try:
        return placement.measure(bundle, units)
    except ExportError as error:
        return Placement(compute_units=units, functions=(), problem=error.message)
