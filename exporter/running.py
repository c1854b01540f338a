"""What one does with a finished bundle: ask it a question, time it."""

from dataclasses import dataclass
from pathlib import Path

from .. import targets
from ..targets.generation import PromptInputs, Sampling, generate
from ..validate.latency import Backend, LatencyResult, Plan
from ..validate.proof import pytorch_peer, time_bundle
from . import prompt
from .bundle import open_bundle
from .clock import Clock
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
    """Answer with the bundle alone: its artifact, its tokenizer, its preprocessing."""
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
    tokens = generate(
        targets.get(manifest.target).open(bundle),
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
    """What `bench` was asked for. `against` is "pytorch" or None; `image` None is a bundled one."""

    bundle: Path
    source: SourceRequest | None = None
    image: Path | None = None
    against: str | None = None
    plan: Plan | None = None


def bench(request: BenchRequest, progress: Progress | None = None) -> LatencyResult:
    """Time a bundle, and beside it PyTorch where asked for."""
    clock = Clock(progress or Silent())
    if request.against not in (None, Backend.PYTORCH):
        raise ExportError(
            f"--against {request.against}: there is no such peer.", "Use --against pytorch."
        )
    shown = samples([request.image] if request.image else ())
    clock.stage("Check the files")
    bundle = open_bundle(request.bundle, clock.detail)
    peer = None
    if request.against:
        peer = pytorch_peer(bundle, request.source or recorded_source(bundle.manifest))
    clock.stage("Measure latency")
    sample = shown[-1] if request.image else shown[0]
    return time_bundle(bundle, sample, request.plan or Plan(), clock.detail, peer)
