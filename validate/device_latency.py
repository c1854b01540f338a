"""A phone's times in the JSON that every bench prints, from what a runner there said of its runs.

The clock starts with the model loaded and the image as pixels in memory:
    encode       pixels -> image features
    prefill      embed the prompt, splice the features in, decode all of it -> logits
    first_token  pick the token
Their sum is TTFT. The image file was read and resized on the host, so no part is `preprocess`; a
runner that does not tell the parts apart leaves its TTFT whole. Decoding and memory are as
everywhere. What nobody measured is None, and `not_measured` says why.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ..targets import TargetName
from .latency import Backend, Part, Timing
from .runner_stats import RunnerStats, RunStats

NAME = TargetName.EXECUTORCH.value


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device says about itself; None or empty where it does not.

    `thermal_*` are Android's: 0 none, 1 light, 2 moderate, 3 severe and above.
    """

    serial: str
    model: str = ""
    system: str = ""
    soc: str = ""
    abis: tuple[str, ...] = ()
    cores: int | None = None
    memory_bytes: int | None = None
    load: float | None = None
    thermal_before: int | None = None
    thermal_after: int | None = None

    @property
    def hot(self) -> bool:
        """True where the device held itself back, or was about to."""
        return max(self.thermal_before or 0, self.thermal_after or 0) > 0


@dataclass(frozen=True, kw_only=True)
class DeviceLatency:
    """One bundle's numbers on one device; `device` is None for a log that came without one."""

    setting: str
    load: Timing | None
    load_note: str
    parts: Mapping[Part, Timing]
    ttft: Timing
    decode: Timing | None
    tokens: int
    prompt_tokens: int
    first_text: str | None
    text: str | None
    warmup: int | None
    threads: int | None
    peak_memory_bytes: int | None
    device: DeviceFacts | None
    not_measured: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first token, at the median; None where it was not timed."""
        return self.tokens / self.decode.p50 if self.decode else None

    def to_dict(self) -> dict[str, object]:
        """The keys of every bench's JSON, in seconds and bytes; and what only a device has."""
        device = self.device
        machine: dict[str, object] | None = (
            {
                "cpu": device.soc,
                "cores": device.cores,
                "memory_bytes": device.memory_bytes,
                "system": device.system,
                "python": None,
                "packages": {},
                "load": device.load,
            }
            if device
            else None
        )
        subject = {
            "name": NAME,
            "backend": Backend.BUNDLE,
            "setting": self.setting,
            "load_cold": None,
            "load_warm": self.load.to_dict() if self.load else None,
            "load_note": self.load_note,
            "parts": {part.value: timing.to_dict() for part, timing in self.parts.items()},
            "ttft": self.ttft.to_dict(),
            "decode": self.decode.to_dict() if self.decode else None,
            "decoded_tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "first_text": self.first_text,
            "peak_memory_bytes": self.peak_memory_bytes,
            "on_device": {},  # of a GPU's own clock
        }
        return {
            "definition": (__doc__ or "").strip(),
            "machine": machine,
            "threads": self.threads,
            "prompt_tokens": self.prompt_tokens,
            "warmup": self.warmup,
            "subjects": [subject],
            "ratios": {},
            "placement": [],
            "device": asdict(device) if device else None,
            "text": self.text,
            "not_measured": dict(self.not_measured),
        }


def result(
    stats: RunnerStats,
    *,
    setting: str,
    load_note: str,
    first_text: str | None = None,
    text: str | None = None,
    warmup: int | None = None,
    device: DeviceFacts | None = None,
) -> DeviceLatency:
    """The runs as one measurement. Texts are those of the tokens that the runner printed."""
    runs = stats.runs
    missing = {"preprocess": "done on the host", "load_cold": "no runner drops the page cache"}
    parts = {}
    for part in (Part.ENCODE, Part.PREFILL, Part.FIRST_TOKEN):
        seconds = tuple(value for run in runs if (value := getattr(run, part.value)) is not None)
        if len(seconds) == len(runs):
            parts[part] = Timing(seconds=seconds)
        else:
            missing[part.value] = "not told apart by the runner; within ttft"
    # One process loads once, and says so with each of its runs.
    load = runs[0].load
    decode = Timing(seconds=tuple(run.decode for run in runs))
    if not stats.generated_tokens:
        missing["decode"] = "no token was generated after the first"
    elif not decode.p50:
        missing["decode"] = "over within one tick of the runner's clock"
    found: dict[str, object] = {
        "load_warm": load,
        "threads": runs[0].threads,
        "peak_memory_bytes": peak_memory(runs),
        "first_text": first_text,
        "warmup": warmup,
    }
    missing |= {name: "not said by the runner" for name, value in found.items() if value is None}
    return DeviceLatency(
        setting=setting,
        load=None if load is None else Timing(seconds=(load,)),
        load_note=load_note,
        parts=parts,
        ttft=Timing(seconds=tuple(run.ttft for run in runs)),
        decode=None if "decode" in missing else decode,
        tokens=stats.generated_tokens,
        prompt_tokens=stats.prompt_tokens,
        first_text=first_text,
        text=text,
        warmup=warmup,
        threads=runs[0].threads,
        peak_memory_bytes=peak_memory(runs),
        device=device,
        not_measured=missing,
    )


def peak_memory(runs: tuple[RunStats, ...]) -> int | None:
    """The largest that any run reports, in bytes."""
    return max((run.peak_memory_bytes for run in runs if run.peak_memory_bytes), default=None)
