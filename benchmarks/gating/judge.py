"""A bundle before the gates, in the order in which they are cheap: which one says no, and why."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from fastvlm_export.exporter.bundle import Bundle
from fastvlm_export.exporter.clock import Clock
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.progress import Silent
from fastvlm_export.exporter.samples import Sample
from fastvlm_export.validate import proof
from fastvlm_export.validate.checks import Check
from fastvlm_export.validate.contract import compare_contract
from fastvlm_export.validate.parity import ParityResult
from fastvlm_export.validate.proof import Baseline, Proof
from fastvlm_export.validate.stored import compare_stored, has_stored

ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One run of the gates. `gates` names those that failed, the first to say no first.

    `verdict` is what that one says. `severity` is the largest value of any check in parts of its
    limit, `nearest` that check in words. `seconds` is what it took.
    """

    name: str
    gates: tuple[str, ...]
    verdict: str
    severity: float
    nearest: str
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the gates say: `failed` is gate -> verdict, in the order that they were asked in."""

    failed: Mapping[str, str]
    severity: float = 0.0
    nearest: str = ""


def timed(name: str, judge: Callable[[], Judged]) -> Finding:
    """The finding of a judge, with its time.

    An ExportError is a refusal by `open`. Any other exception is kept as `ERROR`: a gate should
    have spoken.
    """
    started = time.perf_counter()
    try:
        found = judge()
    except ExportError as error:
        found = Judged(failed={"open": error.message})
    except Exception as error:  # that the experiment goes on; the table names it
        found = Judged(failed={ERROR: "".join(traceback.format_exception(error))[-1000:]})
    return Finding(
        name=name,
        gates=tuple(found.failed),
        verdict=next(iter(found.failed.values()), ""),
        severity=found.severity,
        nearest=found.nearest,
        seconds=round(time.perf_counter() - started, 2),
    )


def all_gates(baseline: Baseline, bundle: Bundle, images: Sequence[Sample]) -> Judged:
    """What `prove` finds: every gate that fails, and what came nearest to a limit."""
    found = proof.prove(
        baseline, bundle, images=images, plan=None, peer=None, clock=Clock(Silent())
    )
    severity, nearest = _nearest(found)
    failed = {name: verdict for name, passed, verdict in _gates(found) if not passed}
    return Judged(failed=failed, severity=severity, nearest=nearest)


def _gates(found: Proof) -> Iterator[tuple[str, bool, str]]:
    """Every gate that was measured: its name, whether it held, and what it says."""
    gates = {
        "contract": found.contract,
        "stored": found.stored,
        "exact": found.exact,
        "typed": found.parity,
        "placement": found.placement,
        "engines": found.engines,
    }
    for name, gate in gates.items():
        if gate is not None:
            yield name, gate.passed, gate.verdict
    if found.accuracy:
        yield "answers", found.accuracy.check.passed, str(found.accuracy.check)
    if found.quantization:
        yield "loss", found.quantization.passed, "the recipe loses more than it may"


def _nearest(found: Proof) -> tuple[float, str]:
    checks: list[tuple[str, Check]] = []
    results: list[tuple[str, ParityResult | None]] = [
        ("typed", found.parity),
        ("exact", found.exact),
    ]
    for name, result in results:
        if result and result.worst:
            measurement, check = result.worst
            checks.append((f"{name}, {measurement.stage}", check))
    if found.accuracy:
        checks.append(("answers", found.accuracy.check))
    where, check = max(checks, key=lambda one: one[1].severity)
    return check.severity, f"{where}: {check}"


def sharp_gates(baseline: Baseline, bundle: Bundle, images: Sequence[Sample]) -> Judged:
    """As `all_gates`, in the order contract, stored, exact; the others only where these hold.

    A broken contract ends it: what runs then is not what the contract says.
    """
    contract = compare_contract(bundle, baseline.reference)
    if not contract.passed:
        return Judged(failed={"contract": contract.verdict})
    failed = {}
    programs = baseline.reference.programs
    if programs is not None and has_stored(bundle):
        stored = compare_stored(bundle, programs())
        failed |= {} if stored.passed else {"stored": stored.verdict}
    exact = proof.without_rounding(baseline, bundle, images, Clock(Silent()))
    if exact is not None and not exact.passed:
        failed["exact"] = exact.verdict
    if failed:
        return Judged(failed=failed)
    # Questions are the longest part, and no fault that parity sees needs them.
    found = all_gates(replace(baseline, answers=None), bundle, images)
    return found if found.failed else all_gates(baseline, bundle, images)
