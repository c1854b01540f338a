"""Numbers as people read them, and values as strict JSON takes them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath

from .metrics import decibels

TARGET_NAMES = {
    "onnx": "ONNX",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
    "executorch": "ExecuTorch",
    "pytorch": "PyTorch eager",
}
NOISE = "noise / peak"
"""The check that people know as PSNR: -20 log10 of it, in dB, of which more is better."""

NOISE_OF_ALL = f"{NOISE}, all"
_DECIBELS = {NOISE: "PSNR", NOISE_OF_ALL: "PSNR, all"}

PART_NAMES = {
    "load_cold": "Load, cold",
    "load_warm": "Load, warm",
    "preprocess": "Preprocess",
    "encode": "Encode image",
    "prefill": "Prefill",
    "first_token": "First token",
    "ttft": "TTFT",
    "decode": "Decode",
}


def plain(value: object) -> object:
    """Dataclasses, enums and paths as JSON values; what is not finite becomes None."""
    out: object = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    elif isinstance(value, Enum):
        out = plain(value.value)
    elif isinstance(value, Mapping):
        out = {str(plain(key)): plain(item) for key, item in value.items()}
    elif isinstance(value, float):
        out = value if math.isfinite(value) else None
    elif isinstance(value, PurePath):
        out = value.as_posix()
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        out = [plain(item) for item in value]
    elif not isinstance(value, str | int | None):
        out = str(value)
    return out


def lines(value: object) -> list[str]:
    """A value for people, one line for each part of a mapping or list that holds more."""
    if isinstance(value, Mapping):
        inner = [(str(key), item) for key, item in value.items()]
        return [f"{key}: {line}" for key, item in inner for line in lines(item)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping) for item in value):
            return [", ".join(lines(item)) for item in value]
        return [", ".join(line for item in value for line in lines(item))]
    if isinstance(value, int) and not isinstance(value, bool):
        return [f"{value:,}" if abs(value) >= 10_000 else str(value)]
    return [str(value)]


def number(value: float) -> str:
    """Three digits: 0, 0.123, 4.5, 1.2e-6."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(value) >= 1e-3:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def check_name(name: str) -> str:
    """A check as people know it."""
    return _DECIBELS.get(name, name)


def check_value(name: str, value: float) -> str:
    """A check's value in the unit that people know it by."""
    if name not in _DECIBELS or not math.isfinite(value):
        return number(value)
    return f"{number(decibels(value))} dB"


def check_limit(name: str, limit: float) -> str:
    """A check's limit likewise: where more is better it is the least; empty where there is none."""
    if math.isinf(limit):
        return ""
    return f"≥ {check_value(name, limit)}" if name in _DECIBELS else number(limit)


def target_name(name: str) -> str:
    """A target as people write it; any other name as it is."""
    return TARGET_NAMES.get(name, name)


def duration(seconds: float) -> str:
    """0.42 ms, 12.3 ms, 456 ms, 7.89 s, 3 min 20 s."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def rate(per_second: float) -> str:
    """Three digits, more for thousands: 3.27, 74.1, 1440."""
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"


def size(count: float) -> str:
    """Bytes in powers of 1000: 812 B, 1.23 MB, 2.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def share(right: int, total: int) -> str:
    """98.3 % (295 of 300); never rounded up to 100 %."""
    if not total:
        return "nothing was asked"
    percent = math.floor(1000 * right / total) / 10
    return f"{percent:.4g} % ({right} of {total})"
