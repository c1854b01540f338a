"""Placement as tables for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import formats
from .placement import Device, FunctionPlacement, Operation, Placement

LISTED = 12
"""Operations that are listed for a function; JSON has all."""

DEVICE_NAMES = {
    Device.NEURAL_ENGINE: "Neural Engine",
    Device.GPU: "GPU",
    Device.CPU: "CPU",
    Device.UNKNOWN: "not said",
}


def placement(found: Sequence[Placement]) -> Group:
    """For each choice of units: shares by device, then what fell off the Neural Engine."""
    parts: list[RenderableType] = []
    for one in found:
        if one.problem:
            parts.append(Text(f"Placement, {one.compute_units}: {one.problem}", "yellow"))
            continue
        parts.append(_table(one))
        for function in one.functions:
            parts += _fallen(function)
    return Group(*parts)


def _table(found: Placement) -> Table:
    title = f"Placement by Core ML, {found.compute_units}: share of operations, of estimated cost"
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("Function", no_wrap=True)
    table.add_column("Operations", justify="right")
    devices = [one for one in Device if one is not Device.UNKNOWN or _used(found, one)]
    for device in devices:
        table.add_column(DEVICE_NAMES[device], justify="right", no_wrap=True)
    for function in found.functions:
        shares = [_shares(function, device) for device in devices]
        table.add_row(Text(_name(function)), str(len(function.operations)), *shares)
    return table


def _used(found: Placement, device: Device) -> bool:
    return any(function.share_of_operations(device) for function in found.functions)


def _shares(function: FunctionPlacement, device: Device) -> str:
    cost = function.share_of_cost(device)
    estimated = "-" if cost is None else _percent(cost)
    return f"{_percent(function.share_of_operations(device))}, {estimated}"


def _percent(share: float) -> str:
    return f"{formats.number(round(100 * share, 1))} %"


def _name(function: FunctionPlacement) -> str:
    return f"{function.package.removesuffix('.mlpackage')} {function.function}"


def _fallen(function: FunctionPlacement) -> list[Text]:
    fallen = function.fallen
    if not fallen:
        return []
    lines = [Text(f"{_name(function)}: {len(fallen)} operations fell off the Neural Engine")]
    lines += [Text(f"  {_described(one)}", "dim") for one in fallen[:LISTED]]
    if len(fallen) > LISTED:
        lines.append(Text(f"  and {len(fallen) - LISTED} more: see --json", "dim"))
    return lines


def _described(one: Operation) -> str:
    able = Device.NEURAL_ENGINE in one.supported
    reason = "could run there" if able else "can't run there"
    return f"{one.op_type} {one.name}: {DEVICE_NAMES[one.device]}, {reason}"
