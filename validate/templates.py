"""Jinja's settings, the same for every page and plot of this folder."""

from collections.abc import Callable, Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(filters: Mapping[str, Callable[..., object]]) -> Environment:
    """Templates of this folder, everything escaped; a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader("fastvlm_export.validate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters
    return made
