"""Small models with a recipe's layers beside them, for tests of simulation and sensitivity."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.calibration import Calibration, load, pixels
from fastvlm_export.quantize.recipes import Recipe
from fastvlm_export.quantize.simulate import variants

from ..targets.conftest import CONTEXT, RESOLUTION, byte_tokenizer, lively_model


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
    tokenizer = byte_tokenizer()
    raw = lively_model(tokenizer.vocab_size, tied=tied)
    spec = ExportSpec(
        decoder=raw.config.decoder,
        features=raw.config.tower.features,
        projector_layers=raw.config.projector_layers,
        context=CONTEXT,
        image_tokens=raw.config.tower.image_tokens(RESOLUTION),
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=RESOLUTION),
        tokenizer=tokenizer,
        image_token_id=tokenizer.vocab_size,
        eos_token_ids=(0,),
    )
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
