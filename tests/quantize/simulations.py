"""Small models with a recipe's layers beside them, for tests of simulation and sensitivity."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.calibration import Calibration, load, pixels
from fastvlm_export.quantize.recipes import Recipe
from fastvlm_export.quantize.simulate import variants

from ..targets.conftest import byte_tokenizer, lively_model, make_spec


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A small random model in float32, and every layer of it as a recipe has it."""

    model: FastVLM
    spec: ExportSpec
    recipe: Recipe
    calibration: Calibration
    shown: list[Tensor]
    layers: Mapping[str, nn.Module]


def simulation(
    recipe: Recipe, *, tied: bool, change: Callable[[FastVLM], None] = lambda _: None
) -> Simulation:
    """`change` may alter the reparameterized model before anything is quantized."""
    raw = lively_model(byte_tokenizer().vocab_size, tied=tied)
    spec = make_spec(raw)
    model = reparameterize(raw).model.eval()
    change(model)
    calibration = dataclasses.replace(load(None), images=load(None).images[3:6])
    shown = pixels(calibration, spec.preprocessing)
    return Simulation(
        model=model,
        spec=spec,
        recipe=recipe,
        calibration=calibration,
        shown=shown,
        layers=variants(model, recipe, spec, shown, lambda _: None),
    )
