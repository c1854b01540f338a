"""The same findings as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import delegation_view, formats, tensorrt_view
from .digits import Kind
from .formats import PART_NAMES
from .latency import LatencyResult, SubjectResult
from .parity import STAGE_NAMES, ParityResult, Scope, Stage, Summary, summarize
from .pooled import ALL
from .quantized import EXACT, loss_rows

if TYPE_CHECKING:
    from .contract import Contract
    from .loss import QuantizationLoss
    from .proof_types import Accuracy
    from .report import Report
    from .stored_types import StoredWeights

SHOWN = 5  # tensors that are missing, or foreign; report.json lists every one


def render(report: "Report") -> Group:
    """Everything a report holds, and the verdict last, where the eye ends up."""
    parts: list[RenderableType] = []
    if report.quantization:
        parts.append(loss(report.quantization))
    if report.parity:
        reference = "the quantized reference" if report.quantized else "PyTorch"
        parts.append(parity(report.parity, f"Export error against {reference}"))
    if report.exact:
        parts.append(parity(report.exact, "Export error without rounding"))
        parts.append(Text(EXACT, "dim"))
    if report.contract:
        parts.append(contract(report.contract))
    if report.stored:
        parts.append(stored(report.stored))
    elif report.stored_note:
        parts.append(Text(report.stored_note, "yellow"))
    if report.placement:
        parts.append(delegation_view.terminal(report.placement))
    if report.engines:
        parts.append(tensorrt_view.terminal(report.engines))
    if report.accuracy:
        parts.append(accuracy(report.accuracy, report.target))
    if report.latency:
        parts.append(latency(report.latency))
    elif report.latency_note:
        parts.append(Text(report.latency_note, "yellow"))
    word, style = ("✓ Passed", "green") if report.passed else ("✗ Failed", "red")
    parts.append(Text.assemble((f"{word}  ", f"bold {style}"), report.verdict))
    return Group(*parts)


def loss(found: "QuantizationLoss") -> Table:
    """What the recipe costs, whatever the target."""
    table = _table(
        f"Quantization loss: quantized against original, both in PyTorch, {len(found.cases)} images"
    )
    table.add_column("", no_wrap=True)
    table.add_column("Value", justify="right")
    table.add_column("Limit", justify="right", style="dim", no_wrap=True)
    table.add_column("")
    for row in loss_rows(found):
        sign = Text("") if row.passed is None else _sign(row.passed)
        table.add_row(row.label, Text(row.value), row.limit, sign)
    return table


def parity(result: ParityResult, title: str = "Export error against PyTorch") -> Group:
    """The worst of each check over all images, by stage."""
    images = len({m.case for m in result.measurements} - {ALL})
    many = f"worst of {images} images" if images > 1 else "one image"
    table = _table(f"{title}, {many}, {result.steps} tokens")
    table.add_column("Stage", no_wrap=True)
    table.add_column("Check", no_wrap=True)
    for name in ("Isolated", "End to end", "Limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    before = None
    notes = []
    for line in summarize(result):
        check, case = line.overall
        table.add_row(
            Text("" if line.stage == before else _short(line.stage), "bold"),
            formats.check_name(line.name),
            *(_worst(line, scope) for scope in Scope),
            Text(formats.check_limit(line.name, line.limit), "dim"),
            _sign(line.passed) if line.judged else "",
        )
        if not line.passed:
            reason = check.message or formats.check_value(line.name, check.value)
            name = f"{STAGE_NAMES[line.stage]}, {formats.check_name(line.name)}"
            notes.append(Text(f"✗ {name}: {reason}, {case}", "red"))
        before = line.stage
    if result.ties:
        notes.append(Text(f"{len(result.ties)} token ties within rounding: see the report"))
    return Group(table, *notes)


def contract(found: "Contract") -> Group:
    """How much of what clients read was compared, and each value that is wrong."""
    lines = [Text(f"✗ {one}", "red") for one in found.differences[:SHOWN]]
    said = f"What clients read: {found.values} values in {len(found.files)} files"
    return Group(Text.assemble(_sign(found.passed), f" {said}"), *lines)


def stored(found: "StoredWeights") -> Group:
    """How many tensors of each function were looked up, and those that are not the program's."""
    table = _table("Stored numbers against the programs', one by one")
    table.add_column("Package", no_wrap=True)
    for name in ("Tensors", "Numbers", "Missing", "Foreign"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    notes = []
    for one in found.functions:
        counts = (one.tensors, one.numbers, len(one.missing), len(one.foreign))
        cells = (f"{count:,}" for count in counts)
        table.add_row(f"{one.package}, {one.function}", *cells, _sign(one.passed))
        notes += [Text(f"✗ {one.package} has no {name}", "red") for name in one.missing[:SHOWN]]
        notes += [Text(f"✗ {one.package} adds {name}", "red") for name in one.foreign[:SHOWN]]
    return Group(table, *notes)


def _sign(passed: bool) -> Text:
    return Text("✓", "green") if passed else Text("✗", "bold red")


def _short(stage: Stage) -> str:
    return STAGE_NAMES[stage].removesuffix(" logits")


def _worst(line: Summary, scope: Scope) -> Text:
    if scope not in line.worst:
        return Text("")
    check = line.worst[scope][0]
    style = "" if check.passed else "bold red"
    return Text(formats.check_value(line.name, check.value), style)


def accuracy(found: "Accuracy", target: str) -> Table:
    """Exact answers by kind of question."""
    table = _table("Exact answers on held-out digits")
    table.add_column("Question")
    sides = {formats.target_name(target): found.candidate} | found.references
    for name in sides:
        table.add_column(name)
    for kind in Kind:
        parts = [side.kinds[kind] for side in sides.values()]
        table.add_row(kind.value, *(formats.share(part.right, part.total) for part in parts))
    totals = [side.total for side in sides.values()]
    cells = [formats.share(total.right, total.total) for total in totals]
    table.add_row("all", *cells, style="bold")
    return table


def latency(result: LatencyResult) -> Group:
    """Median and 95th percentile of each part; the ratio where there is a peer."""
    peers = result.subjects[1:]
    ours = result.subjects[0]
    table = _table(
        f"Time to first token, {result.prompt_tokens} prompt tokens, {ours.ttft.n} runs, "
        f"{result.threads} threads"
    )
    table.add_column("Part", no_wrap=True)
    for subject in result.subjects:
        table.add_column(Text(formats.target_name(subject.name)), justify="right")
        table.add_column("p95", justify="right", style="dim")
    for peer in peers:
        table.add_column(Text(f"{formats.target_name(peer.name)} takes"), justify="right")
    ratios = [result.ratios(peer) for peer in peers]
    for name, label in PART_NAMES.items():
        cells = [cell for subject in result.subjects for cell in _timing(subject, name)]
        times = [f"{ratio[name]:.2f}x" if name in ratio else "" for ratio in ratios]
        unit = ", tokens/s" if name == "decode" else ""
        table.add_row(label + unit, *cells, *times, style="bold" if name == "ttft" else "")
    memory = [cell for one in result.subjects for cell in (formats.size(one.peak_memory_bytes), "")]
    more = [f"{peer.peak_memory_bytes / ours.peak_memory_bytes:.2f}x" for peer in peers]
    table.add_row("Peak memory", *memory, *more)
    notes = [
        Text(f"{formats.target_name(one.name)}: {one.setting}; load {one.load_note}", "dim")
        for one in result.subjects
    ]
    if result.machine.busy:
        wanted = formats.number(result.machine.load or 0)
        busy = f"The machine was busy: {wanted} processes wanted a core over the minute before."
        notes.append(Text(f"{busy} Numbers are worth less for it.", "yellow"))
    return Group(table, *notes)


def _timing(subject: SubjectResult, name: str) -> tuple[str, str]:
    """Median and p95 cells of one part."""
    timing = subject.timing(name)
    if timing is None:
        return "-", ""
    if name == "decode":
        return formats.rate(subject.tokens_per_second), ""
    return formats.duration(timing.p50), formats.duration(timing.p95)


def facts(found: Mapping[str, object], title: str) -> Table:
    """Labels and values, as `inspect` gives them."""
    table = _table(title)
    table.show_header = False
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in found.items():
        table.add_row(Text(label), Text("\n".join(formats.lines(value))))
    return table


def targets(rows: Sequence[Mapping[str, Any]]) -> Group:
    """What each target and each of its backends can do here, and the versions of what they use."""
    table = _table("Targets")
    table.add_column("Target", no_wrap=True)
    for name in ("Export here", "Run here", "Recipes"):
        table.add_column(name)
    for row in rows:
        table.add_row(*_target(row, Text(row["target"], "bold")))
        for backend in row["backends"]:
            table.add_row(*_target(backend, Text(f"  {backend['backend']}")))
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return Group(table, Text(f"Installed: {listed or 'nothing that a target needs'}"))


def target_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to do about targets that lack something, and about versions that were not tested.

    Lines to be printed unwrapped, since they hold commands to be copied.
    """
    notes = []
    for row in rows:
        notes += [f"{row['target']}: {row['remedy']}"] if row["remedy"] else []
        remedies = [backend["remedy"] for backend in row["backends"]]
        notes += [f"{row['target']}: {remedy}" for remedy in remedies if remedy]
    for row in rows:
        notes += [untested(one) for one in row["untested"]]
    return list(dict.fromkeys(notes))


def untested(one: Mapping[str, str]) -> str:
    """An installed version that was not tested, and the command that installs one that was."""
    return (
        f"{one['package']} {one['installed']} is outside the tested range {one['tested']}: "
        f"{one['remedy']}"
    )


def _target(row: Mapping[str, Any], name: Text) -> Iterator[RenderableType]:
    yield name
    yield _yes(row["lower"])
    yield _runs(row)
    yield ", ".join(row["recipes"])


def _runs(row: Mapping[str, Any]) -> Text:
    """Whether bundles of a target or backend run here, or what stands in for their runtime."""
    if row["runtime"] and not row["run"]:
        return Text(str(row["runtime"]), "yellow")
    return _yes(row["run"])


def _yes(value: object) -> Text:
    return Text("✓ yes", "green") if value else Text("✗ no", "red")


def _table(title: str) -> Table:
    return Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
