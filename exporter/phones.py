"""`bench` of a bundle on a phone: run it there, read a log that came from one, or pack for one."""

from dataclasses import dataclass
from pathlib import Path

from ..validate import devices
from ..validate.device_latency import DeviceLatency
from ..validate.devices import Kit
from ..validate.latency import Plan
from .bundle import open_bundle
from .clock import Clock
from .errors import ExportError
from .progress import Progress, Silent
from .samples import Sample, samples


@dataclass(frozen=True, kw_only=True)
class PhoneRequest:
    """What `bench` was asked for about a phone: one of `device`, `stats` and `kit`.

    `device` is adb://SERIAL, with the runner to push there and the threads that it may use; `stats`
    a log of what a runner printed; `kit` a folder to write what a runner needs into. `elsewhere`
    are options that were given, too, and that only a bench on this machine knows.
    """

    bundle: Path
    device: str | None = None
    runner: Path | None = None
    threads: int | None = None
    stats: Path | None = None
    kit: Path | None = None
    image: Path | None = None
    plan: Plan | None = None
    elsewhere: tuple[str, ...] = ()

    @property
    def asked(self) -> bool:
        """Whether any of this was asked for at all."""
        given = (self.device, self.runner, self.threads, self.stats, self.kit)
        return any(one is not None for one in given)


def bench(request: PhoneRequest, progress: Progress | None = None) -> DeviceLatency | Kit:
    """Time a bundle on a phone, or take the one step of it that can be taken here."""
    _check(request)
    clock = Clock(progress or Silent())
    clock.stage("Check the files")
    bundle = open_bundle(request.bundle, clock.detail)
    if request.stats is not None:
        return devices.from_log(request.stats, bundle)
    plan = request.plan or Plan()
    sample = _sample(request.image)
    if request.kit is not None:
        clock.stage("Write the kit")
        return devices.write_kit(bundle, sample, plan, request.kit)
    clock.stage("Measure latency on the device")
    return devices.run_on(
        request.device or "",
        bundle,
        request.runner,
        sample,
        plan,
        threads=request.threads,
        say=clock.detail,
    )


def _sample(image: Path | None) -> Sample:
    """The image that was asked for, or the one that every bench uses."""
    shown = samples([image] if image else ())
    return shown[-1] if image else shown[0]


def _check(request: PhoneRequest) -> None:
    """Raises ExportError for options that contradict each other or lack their other half."""
    kinds = {"--device": request.device, "--stats": request.stats, "--kit": request.kit}
    given = [name for name, value in kinds.items() if value is not None]
    extras = {"--runner": request.runner, "--threads": request.threads}
    loose = [name for name, value in extras.items() if value is not None]
    if loose and request.device is None:
        raise ExportError(
            f"{' and '.join(loose)}: only for --device.", "Add --device adb://SERIAL, or leave out."
        )
    if len(given) > 1:
        raise ExportError(f"{' and '.join(given)} exclude each other.", f"Give {given[0]} alone.")
    if request.elsewhere:
        raise ExportError(
            f"{' and '.join(request.elsewhere)}: a phone runs the bundle and nothing beside it, "
            f"so not with {given[0]}.",
            f"Leave it out, or leave out {given[0]} to measure here.",
        )
    if request.stats is not None and request.image:
        raise ExportError(
            "--image and --stats: the log is of whatever image its runner was given.",
            "Leave out --image.",
        )
    if request.device is not None:
        devices.check_url(request.device)
        devices.check_runner(request.runner)
