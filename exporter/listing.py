"""What `fastvlm-export targets` lists: where each target exports and runs, and its recipes."""

from collections.abc import Sequence

from .. import targets
from ..quantize.recipes import RECIPES
from ..targets import TargetName
from ..targets.base import DEFAULTS, Options, Target
from ..targets.executorch_model import Backend
from ..targets.tensorrt_package import Backend as Package
from ..validate.sessions import runs_here
from . import versions

BACKENDS: dict[str, Sequence[str]] = {
    TargetName.EXECUTORCH: tuple(Backend),
    TargetName.TENSORRT: tuple(Package),
}
"""What `--backend` takes, of targets that have the choice."""


def rows() -> list[dict[str, object]]:
    """A row for each target, as plain data; `backends` for those that have a choice of them."""
    return [_row(name) for name in TargetName]


def _row(name: TargetName) -> dict[str, object]:
    target = targets.get(name)
    here, runtime = target.availability(), runs_here(name)
    return {
        "target": str(name),
        "lower": here.lower,
        "run": here.run,
        "runtime": runtime.name if runtime else None,
        "recipes": recipes(target),
        "versions": dict(here.versions),
        "untested": [one.to_dict() for one in versions.untested((str(name),))],
        "remedy": here.remedy,
        "backends": [_backend(name, backend) for backend in BACKENDS.get(name, ())],
    }


def _backend(target_name: str, name: str) -> dict[str, object]:
    """Whether a backend can be had here, else what to do; the recipes that it computes."""
    target, options = targets.get(target_name), Options(backend=str(name))
    problems = target.option_problems(options)
    runtime = None if problems else runs_here(target_name, name)
    return {
        "backend": str(name),
        "lower": target.availability().lower and not problems,
        "runtime": runtime.name if runtime else None,
        "run": bool(runtime and runtime.device),
        "recipes": [] if problems else recipes(target, options),
        "remedy": "; ".join(problems),
    }


def recipes(target: Target, options: Options = DEFAULTS) -> list[str]:
    """The built-in recipes that a target takes under these options."""
    return [
        name
        for name, recipe in RECIPES.items()
        if not target.problems(target.adapt(recipe, options), None, options=options)
    ]
