"""What a proof starts from, and what it found: references, baselines, answers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..exporter.checkpoint import Checkpoint
from ..exporter.spec import ExportSpec
from ..quantize.recipes import Recipe
from ..targets.base import Session
from .accuracy import AccuracyReport
from .checks import Check
from .contract import Contract
from .delegation import Delegation
from .latency import LatencyResult
from .limits import Limits
from .loss import QuantizationLoss
from .parity import ParityResult
from .recording import Recording
from .stored_types import StoredWeights
from .tensorrt_build import EngineProof

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FLOAT32 = Recipe(name="fp32")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint as it was stored, the contract that bundles are built to, and the recipe.

    `quantized` opens the recipe's eager model, which is then what artifacts are held to; it is None
    for a recipe that leaves everything in float32. `exact` opens the same model computed without
    any rounding, where an artifact is to be compared like that, too, or where the rounding floor
    needs it.
    `programs` gives what was lowered to the artifacts, the same to the last bit; None where that
    can't be had.
    """

    checkpoint: Checkpoint
    spec: ExportSpec
    recipe: Recipe = FLOAT32
    quantized: Callable[[], Session] | None = None
    exact: Callable[[], Session] | None = None
    programs: "Callable[[], Mapping[str, ExportedProgram]] | None" = None

    def __post_init__(self) -> None:
        if self.recipe.quantized != (self.quantized is not None):
            raise ValueError(f"recipe '{self.recipe.name}' and its quantized model do not fit")


@dataclass(frozen=True, kw_only=True)
class Original:
    """What the checkpoint as it was stored does, in float32 and unreparameterized.

    Only the bundled model is asked for answers.
    """

    recordings: tuple[Recording, ...]
    answers: AccuracyReport | None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the reference does, once for all targets; its models are not kept.

    `recordings` and `answers` are the quantized model's where there is one, else the checkpoint's
    as it was stored; then there is no `loss`. `limits` are what artifacts are held to. `exact` is
    what the programs do without rounding, on fewer images and tokens, and `exact_limits` how far
    another such computation may be off; None: not asked for.
    """

    reference: Reference
    limits: Limits
    recordings: tuple[Recording, ...]
    answers: AccuracyReport | None
    loss: QuantizationLoss | None
    exact: tuple[Recording, ...] | None = None
    exact_limits: Limits | None = None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact answers on the bundled task: the bundle's, its reference's, and the original's.

    Where nothing is quantized the reference is the original, and `original` None. `limit` is the
    share of the questions that the bundle may answer otherwise than its reference.
    """

    candidate: AccuracyReport
    reference: AccuracyReport
    original: AccuracyReport | None = None
    limit: float = 0.0

    @property
    def references(self) -> dict[str, AccuracyReport]:
        """What the bundle is shown beside, by name: its reference first."""
        if self.original is None:
            return {"PyTorch": self.reference}
        return {"quantized PyTorch": self.reference, "PyTorch": self.original}

    @property
    def reference_name(self) -> str:
        """The reference's name among `references`."""
        return next(iter(self.references))

    @property
    def check(self) -> Check:
        """Questions that the bundle answers otherwise than its reference does."""
        same = self.candidate.agreement(self.reference)
        differ = same.total - same.right if same.total else math.nan
        return Check(name="answers that differ", value=differ, limit=self.limit * same.total)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found. `accuracy` is None but for the bundled model, `latency` where not asked.

    `quantization` is None where nothing is quantized, `exact` where there is no artifact to compute
    without rounding, `stored` where no files or no programs can be compared number by number,
    `placement` where a program has nothing to hand over to, `engines` where there are none.
    """

    contract: Contract
    parity: ParityResult
    exact: ParityResult | None
    accuracy: Accuracy | None
    latency: LatencyResult | None
    quantization: QuantizationLoss | None
    stored: StoredWeights | None = None
    placement: Delegation | None = None
    engines: EngineProof | None = None
