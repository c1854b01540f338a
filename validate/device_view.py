"""A device's times as a table for a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import formats
from .device_latency import NAME, DeviceFacts, DeviceLatency
from .devices import Kit
from .formats import PART_NAMES
from .latency import Part, Timing


def render(found: DeviceLatency | Kit) -> RenderableType:
    """A device's times; or a kit's files, and what to do with them."""
    if isinstance(found, DeviceLatency):
        return latency(found)
    lines = [f"{path.name}  {formats.size(path.stat().st_size)}" for path in found.files]
    lines.append(
        f"Run them as examples/ios/README.md or examples/android/README.md say ({found.folder}),"
    )
    lines.append("save what is printed, then: fastvlm-export bench BUNDLE --stats LOG")
    return Text("\n".join(lines))


def latency(found: DeviceLatency) -> Group:
    """Median and 95th percentile of each part; below it the device, and what was not measured."""
    threads = f"{found.threads} threads" if found.threads else "the runner's threads"
    title = (
        f"Time to first token, {found.prompt_tokens} prompt tokens, {found.ttft.n} runs, {threads}"
    )
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("Part", no_wrap=True)
    table.add_column(formats.target_name(NAME), justify="right")
    table.add_column("p95", justify="right", style="dim")
    timings: dict[str, Timing | None] = {
        "load_warm": found.load,
        **{part.value: found.parts.get(part) for part in Part},
        "ttft": found.ttft,
    }
    for name, timing in timings.items():
        cells = _cells(timing)
        table.add_row(PART_NAMES[name], *cells, style="bold" if name == "ttft" else "")
    speed = found.tokens_per_second
    table.add_row("Decode, tokens/s", formats.rate(speed) if speed else "-", "")
    memory = found.peak_memory_bytes
    table.add_row("Peak memory", formats.size(memory) if memory else "-", "")
    notes = [Text(f"{found.setting}; load {found.load_note}", "dim")]
    if found.device:
        notes.insert(0, Text(_device(found.device), "dim"))
        if found.device.hot:
            notes.append(
                Text("The device was hot and held back: numbers are worth less.", "yellow")
            )
    if found.text is not None:
        notes.append(Text(f"It answered: {found.text}", "dim"))
    gaps = [f"{PART_NAMES.get(name, name)}: {why}" for name, why in found.not_measured.items()]
    notes.append(Text("Not measured. " + "; ".join(gaps), "dim"))
    return Group(table, *notes)


def _cells(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "-", ""
    return formats.duration(timing.p50), formats.duration(timing.p95)


def _device(device: DeviceFacts) -> str:
    """Pixel 9, Android 16, Tensor G4, 8 cores, 12 GB."""
    known = [device.model or device.serial, device.system, device.soc]
    known += [f"{device.cores} cores"] if device.cores else []
    known += [formats.size(device.memory_bytes)] if device.memory_bytes else []
    return ", ".join(one for one in known if one)
