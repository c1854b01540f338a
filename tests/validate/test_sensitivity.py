import dataclasses
import itertools
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.apply import quantize
from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    LayerRule,
    Method,
    Part,
    Precision,
    Recipe,
)
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.quantize.simulate import simulated
from fastvlm_export.quantize.weights import layer_names, layer_widths
from fastvlm_export.targets import onnx_recipes
from fastvlm_export.validate import sensitivity_mix as mixing
from fastvlm_export.validate import sensitivity_report as reports
from fastvlm_export.validate.sensitivity import POSITIONS, Prompt, losses, prompts
from fastvlm_export.validate.sensitivity_budget import (
    Ladder,
    Rung,
    float_size,
    mixed_recipe,
    next_precision,
    parse_budget,
    predicted,
    size_of,
    stored_size,
    upgrades,
    within_loss,
    within_size,
)
from fastvlm_export.validate.sensitivity_mix import Losses, Options
from fastvlm_export.validate.sensitivity_report import LayerLoss, Mixed, Sensitivity

from ..quantize.simulations import Simulation, simulation

PLANTED = "decoder.layers.1.mlp.down_proj"
OUTLIERS = 200.0


def silent(_: str) -> None:
    pass


def plant(model: FastVLM) -> None:
    """The same function, but one weight in each group of 32 takes nearly all of its scale.

    down(u * v) with column c of `down` times 200 and row c of `up` over 200.
    """
    layer = model.get_submodule(PLANTED.rpartition(".")[0])
    with torch.no_grad():
        layer.down_proj.weight[:, ::32] *= OUTLIERS
        layer.up_proj.weight[::32] /= OUTLIERS


@pytest.fixture(scope="module")
def planted() -> Simulation:
    return simulation(RECIPES["int4"], tied=True, change=plant)


@pytest.fixture(scope="module")
def asked(planted: Simulation) -> list[Prompt]:
    return prompts(planted.model, planted.shown, planted.spec, silent)


@pytest.fixture(scope="module")
def options(planted: Simulation) -> Options:
    s = planted
    return mixing.options(s.model, s.recipe, s.spec, s.shown, silent, upgraded=True)


@pytest.fixture(scope="module")
def measured(options: Options, asked: list[Prompt]) -> Losses:
    return mixing.measure(options, asked, silent)


@torch.no_grad()
def whole_run(model: FastVLM, prompt: Prompt) -> Tensor:
    """Probabilities of the compared positions, with nothing reused."""
    x = model.embed(prompt.ids)
    x[:, prompt.places] = model.encode_image(prompt.pixels)
    return model(x)[0, -POSITIONS:].double().softmax(-1)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return float((torch.cat(one) - torch.cat(other)).abs().sum(-1).mean()) / 2


def test_prompts_follow_the_original_s_own_answers(
    planted: Simulation, asked: list[Prompt]
) -> None:
    assert len(asked) == len(planted.shown)
    for prompt in asked:
        answers = whole_run(planted.model, prompt).argmax(-1)
        assert torch.equal(prompt.ids[0, -POSITIONS + 1 :], answers[:-1])
        assert int(prompt.places.sum()) == planted.spec.image_tokens


def test_running_only_what_is_behind_a_layer_gives_the_loss_of_a_whole_run(
    planted: Simulation, asked: list[Prompt], measured: Losses
) -> None:
    s = planted
    originals = [whole_run(s.model, prompt) for prompt in asked]
    for name, layer in s.layers.items():
        with simulated(s.model, {name: layer}):
            changed = [whole_run(s.model, prompt) for prompt in asked]
        expected = distance(originals, changed)
        assert expected > 0, name
        assert measured.alone[name][s.recipe.precision(name)] == pytest.approx(expected, rel=1e-4)
    with simulated(s.model, s.layers):
        changed = [whole_run(s.model, prompt) for prompt in asked]
    assert measured.together == pytest.approx(distance(originals, changed), rel=1e-4)


def test_nothing_changed_loses_nothing(planted: Simulation, asked: list[Prompt]) -> None:
    own = {PLANTED: planted.model.get_submodule(PLANTED)}
    assert losses(planted.model, asked, [{}, own], silent) == [0.0, 0.0]


def test_a_layer_that_gives_nan_loses_everything(planted: Simulation, asked: list[Prompt]) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((*x.shape[:-1], planted.spec.decoder.hidden_size), torch.nan)

    assert losses(planted.model, asked, [{PLANTED: Broken()}], silent) == [1.0]


def test_an_original_that_gives_nan_is_refused(asked: list[Prompt]) -> None:
    def spoil(model: FastVLM) -> None:
        model.decoder.norm.weight.data[0] = torch.nan

    broken = simulation(Recipe(name="none"), tied=True, change=spoil)
    with pytest.raises(ExportError, match="NaN or infinity"):
        losses(broken.model, asked, [{}], silent)


def test_the_planted_layer_comes_first(options: Options, measured: Losses) -> None:
    layers = mixing.layer_losses(options, measured)
    ranked = sorted(layers, key=lambda layer: -layer.loss)
    print([(layer.layer, f"{layer.loss:.3%}") for layer in ranked[:3]])
    assert ranked[0].layer == PLANTED
    assert ranked[0].loss > 1.5 * ranked[1].loss
    assert [layer.layer for layer in layers] == list(options.modules)


def test_sizes_are_those_of_the_modules(planted: Simulation, options: Options) -> None:
    for name, modules in options.modules.items():
        for precision, module in modules.items():
            if part_is_vision(name):
                continue
            buffers = dict(module.named_buffers())
            weight = buffers.pop("weight")
            expected = weight.numel() * (precision.bits or 0) // 8
            expected += sum(4 * buffer.numel() for buffer in buffers.values())
            assert stored_size(planted.model, name, precision) == expected, name
    conv = planted.model.get_submodule("vision_tower.patch_embed.2.reparam_conv")
    rows, width = conv.weight.flatten(1).shape
    size = stored_size(
        planted.model, "vision_tower.patch_embed.2.reparam_conv", planted.recipe.vision
    )
    assert size == rows * width + 4 * rows + 4 * rows
    asymmetric = Precision(bits=4, group_size=32, symmetric=False)
    table = stored_size(planted.model, HEAD, asymmetric)
    rows, width = planted.model.decoder.embed_tokens.weight.shape
    assert table == rows * (width // 2) + rows * (width // 32) * 4 + rows * (width // 32) // 2
    tables = Precision(bits=6, group_size=16, method=Method.PALETTE)
    layer = "decoder.layers.0.mlp.up_proj"
    rows, width = planted.model.get_submodule(layer).weight.shape
    assert stored_size(planted.model, layer, tables) == rows * width * 6 // 8 + rows // 16 * 64 * 4
    whole = dataclasses.replace(tables, group_size=None)
    assert stored_size(planted.model, layer, whole) == rows * width * 6 // 8 + 64 * 4
    assert next_precision(tables) == dataclasses.replace(whole, bits=8)


def part_is_vision(name: str) -> bool:
    return not name.startswith("decoder.")


@pytest.fixture(scope="module")
def mixes(
    options: Options, measured: Losses, asked: list[Prompt]
) -> dict[str, tuple[Mixed, Recipe]]:
    whole = measured.together
    texts = [f"{100 * whole * share:.6f}%" for share in (0.01, 0.2, 0.5, 0.8, 1.01)]
    return {
        text: mixing.mix(options, measured, parse_budget(text), asked, "r.toml", silent)
        for text in (*texts, "0%")
    }


def test_every_budget_is_met_by_measurement_and_a_smaller_one_takes_more(
    mixes: dict[str, tuple[Mixed, Recipe]], measured: Losses
) -> None:
    by_budget = sorted(mixes.values(), key=lambda mix: parse_budget(mix[0].budget).loss or 0.0)
    for mixed, _ in by_budget:
        print(f"{mixed.budget}: {mixed.size} bytes, measured {mixed.measured:.4%}")
        assert mixed.measured <= (parse_budget(mixed.budget).loss or 0.0)
        assert mixed.recipe_size <= mixed.size <= mixed.float_size
    sizes = [mixed.size for mixed, _ in by_budget]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3
    everything, recipe = mixes["0%"]
    assert everything.measured == 0
    assert not everything.upgraded or recipe.precision(PLANTED).bits is None
    unchanged = by_budget[-1][0]
    assert unchanged.upgraded == {}
    assert unchanged.measured == pytest.approx(measured.together, rel=1e-6)


def test_a_size_is_kept_and_more_bytes_lose_less(
    options: Options, measured: Losses, asked: list[Prompt]
) -> None:
    whole = float_size(options.model)

    def mixed_for(size: int) -> Mixed:
        found = mixing.mix(options, measured, parse_budget(f"{size}B"), asked, "r.toml", silent)[0]
        assert found.size <= size
        return found

    most = mixed_for(2 * whole)
    assert (most.measured, most.size) == (0, whole)
    least = mixed_for(most.recipe_size)
    assert least.upgraded == {}
    assert least.measured == pytest.approx(measured.together, rel=1e-6)
    half = mixed_for((whole + most.recipe_size) // 2)
    assert half.size > 0.9 * (whole + most.recipe_size) / 2
    assert 0 < half.measured < 0.5 * least.measured
    assert 0 < half.predicted < least.predicted
    with pytest.raises(ExportError, match="more than --budget allows"):
        mixing.check_size(options, parse_budget(f"{most.recipe_size - 1}B"))
    mixing.check_size(options, parse_budget(f"{most.recipe_size}B"))
    mixing.check_size(options, parse_budget("0%"))


def test_the_written_recipe_reads_back_and_onnx_can_express_it(
    options: Options, mixes: dict[str, tuple[Mixed, Recipe]]
) -> None:
    widths = layer_widths(options.model.decoder)
    for mixed, recipe in mixes.values():
        assert onnx_recipes.problems(recipe, widths, tied=True) == []
        for layer, precisions in options.modules.items():
            precision = recipe.precision(layer)
            assert precision.bits == mixed.upgraded.get(layer, next(iter(precisions)).bits)
        # A tied table is stored once: both of its uses have the same bits.
        assert recipe.precision(EMBEDDING).bits == recipe.precision(HEAD).bits


def test_written_recipes_are_the_same_when_read(
    mixes: dict[str, tuple[Mixed, Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for mixed, recipe in mixes.values():
        path = tmp_path_factory.mktemp("recipes") / "mixed.toml"
        path.write_text(recipe_file.write(recipe), "utf-8")
        assert recipe_file.read(path) == recipe
        assert recipe.name == mixed.name


@torch.no_grad()
def test_the_really_quantized_programs_meet_the_budget(
    planted: Simulation, asked: list[Prompt], mixes: dict[str, tuple[Mixed, Recipe]]
) -> None:
    s = planted
    mixed, recipe = sorted(mixes.values(), key=lambda mix: mix[0].size)[2]
    assert {4, 8, None} <= {recipe.precision(name).bits for name in s.layers}
    made = quantize(s.model, recipe, s.spec, s.calibration, silent)
    programs = {name: runnable(program) for name, program in made.programs.items()}
    theirs = []
    for prompt in asked:
        x = programs["embedding"](prompt.ids)[0].clone()
        x[:, prompt.places] = programs["vision"](prompt.pixels)[0]
        for length in range(x.shape[1] - POSITIONS + 1, x.shape[1] + 1):
            config = s.spec.decoder
            past = torch.zeros(1, config.kv_heads, 0, config.head_dim)
            mask = torch.ones(1, length, dtype=torch.int64)
            logits, *_ = programs["decoder"](x[:, :length], mask, *[past] * (2 * config.layers))
            theirs.append(logits[0].double().softmax(-1))
    loss = distance([whole_run(s.model, prompt) for prompt in asked], theirs)
    print(f"budget {mixed.budget}, simulated {mixed.measured:.5%}, programs {loss:.5%}")
    # RTN gives the same integers whatever else is quantized; what is left is float rounding, which
    # may tip an activation over to the next integer.
    assert loss == pytest.approx(mixed.measured, rel=0.02)


@pytest.mark.parametrize(
    "text", ["abc", "-1%", "0.5", "nan%", "inf%", "", "%", "MB", "400MiB", "1e3%", "5 %%", "0,5%"]
)
def test_a_budget_that_is_none_is_one_error(text: str) -> None:
    with pytest.raises(ExportError, match="neither a loss nor a size") as error:
        parse_budget(text)
    assert "--budget 0.5%" in error.value.hint


def test_budgets_are_percent_and_decimal_bytes() -> None:
    assert parse_budget("0.5%").loss == 0.005
    assert parse_budget(" 5 % ").loss == 0.05
    assert parse_budget("400MB").size == 400_000_000
    assert parse_budget("1.5 gb").size == 1_500_000_000
    assert parse_budget("12kB").size == 12_000
    with pytest.raises(ExportError, match="no more than all tokens"):
        parse_budget("101%")


def rung(bits: int | None, size: int, loss: float) -> Rung:
    return Rung(precisions=(Precision(bits=bits),), size=size, loss=loss)


LADDERS = [
    Ladder(layers=("a",), rungs=(rung(4, 10, 0.5), rung(8, 20, 0.1), rung(None, 80, 0.0))),
    # 8 bits are no better than 4: it goes to float at once.
    Ladder(layers=("b",), rungs=(rung(4, 10, 0.3), rung(8, 20, 0.3), rung(None, 80, 0.0))),
    # 8 bits per channel take less than 4 bits in groups of 8.
    Ladder(layers=("c",), rungs=(rung(4, 30, 0.2), rung(8, 25, 0.1), rung(None, 90, 0.0))),
]


def test_upgrades_come_by_loss_saved_per_byte() -> None:
    assert upgrades(LADDERS) == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 0, 1),
        (1, 2, 1),
        (2, 2, 1),
        (2, 2, 2),
    ]
    assert size_of(LADDERS, (1, 2, 1), 1000) == 1125
    assert predicted(LADDERS, (1, 2, 1)) == pytest.approx(0.2)


def test_a_size_leaves_out_what_does_not_fit_and_takes_what_does() -> None:
    # After a -> 8 bits, b -> float (70 more) does not fit, nor does a -> float; c stays.
    assert within_size(LADDERS, upgrades(LADDERS), 60, 0) == (1, 0, 1)
    assert within_size(LADDERS, upgrades(LADDERS), 125, 0) == (1, 2, 1)
    assert within_size(LADDERS, upgrades(LADDERS), 10**6, 0) == (2, 2, 2)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_bisection_meets_the_limit_and_a_smaller_one_never_stops_earlier(
    measured: list[float], limits: tuple[float, float]
) -> None:
    # Measured losses need not fall all the way; the last choice is all float.
    path = [(index,) for index in range(len(measured))]
    table = dict(zip(path, [*measured[:-1], 0.0], strict=True))
    asked: list[tuple[int, ...]] = []

    def measure(choice: tuple[int, ...]) -> float:
        asked.append(choice)
        return table[choice]

    found = [within_loss(path, limit, measure) for limit in sorted(limits)]
    for (choice, loss), limit in zip(found, sorted(limits), strict=True):
        assert loss == table[choice] <= limit
    assert found[0][0] >= found[1][0]
    assert len(asked) <= 2 * len(path).bit_length()


NAMES = [
    "vision_tower.patch_embed.2.reparam_conv",
    *(
        f"vision_tower.network.{i}.{j}.convffn.fc{k}"
        for i in (0, 4)
        for j in (0, 1)
        for k in (1, 2)
    ),
    "projector.0",
    "projector.2",
    EMBEDDING,
    *(
        f"decoder.layers.{i}.{part}"
        for i in range(11)
        for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ),
    HEAD,
]
KEPT = LayerRule(pattern="decoder.layers.1.mlp.*", precision=Precision())


@given(st.data())
def test_rules_give_every_layer_what_is_wanted_and_no_other(data: st.DataObject) -> None:
    base = dataclasses.replace(RECIPES["int4"], layers=(KEPT,))
    floats = [name for name in NAMES if base.precision(name).bits is None]
    wanted = {}
    for name in NAMES:
        own = base.precision(name)
        if name not in floats:
            choices = [own, *filter(None, [next_precision(own)]), Precision()]
            wanted[name] = data.draw(st.sampled_from(choices))
    recipe = mixed_recipe(base, wanted, floats, "mixed")
    assert {name: recipe.precision(name) for name in wanted} == wanted
    assert all(recipe.precision(name).bits is None for name in floats)
    # A pattern reaches into one part only: a recipe file takes no others.
    assert all(len(setting.parts) == 1 for setting in recipe.settings)
    assert recipe.name == "mixed"


def test_rules_use_patterns_where_many_layers_agree() -> None:
    base = RECIPES["int4"]
    eight = next_precision(base.decoder)
    assert eight == Precision(bits=8, activations=Activations.DYNAMIC)
    downs = {name: eight for name in NAMES if name.endswith("down_proj")}
    others = {name: base.precision(name) for name in NAMES if name not in downs}
    made = mixed_recipe(base, {**others, **downs}, [], "mixed")
    assert [rule.pattern for rule in made.layers] == ["decoder.layers.*.mlp.down_proj"]
    every = {
        n: Precision() if n.startswith("decoder.layers.") else base.precision(n) for n in NAMES
    }
    made = mixed_recipe(base, every, [], "mixed")
    assert [rule.pattern for rule in made.layers] == ["decoder.layers.*"]
    assert mixed_recipe(base, others | dict.fromkeys(downs, base.decoder), [], "m").layers == ()


def test_layer_names_hold_every_layer_that_was_quantized(options: Options) -> None:
    assert set(options.modules) <= set(layer_names(options.model))


def test_a_recipe_that_reaches_no_layer_is_refused(planted: Simulation) -> None:
    recipe = Recipe(
        name="nowhere",
        layers=(LayerRule(pattern="decoder.layers.77.*", precision=Precision(bits=8)),),
    )
    s = planted
    with pytest.raises(ExportError, match="quantizes no layer") as error:
        mixing.options(s.model, recipe, s.spec, s.shown, silent, upgraded=False)
    assert "--recipe int4" in error.value.hint


def sensitivity(loss: float) -> Sensitivity:
    kinds = itertools.cycle(Part)
    return Sensitivity(
        source="<model> & co",
        recipe="int4",
        prompts=3,
        positions=27,
        layers=tuple(
            LayerLoss(layer=f"layer.{i}", part=next(kinds), bits=4, size=10**i, loss=loss * i)
            for i in range(25)
        ),
        together=0.5 * loss,
    )


def test_the_plot_stands_alone_and_follows_dark_mode() -> None:
    found = sensitivity(1e-3)
    for text in (reports.svg(found), reports.page(found)):
        assert "prefers-color-scheme: dark" in text
        assert "layer.24, 4 bits: 2.4 %" in text
        assert "src=" not in text
        assert "href=" not in text
        assert "<model>" not in text
    root = ET.fromstring(reports.svg(found))  # noqa: S314 - our own text
    bars = [bar for bar in root.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    assert len(bars) == 25
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights == sorted(heights)
    assert heights[0] == 0
    assert "layer.13" in reports.page(found)


def test_no_loss_at_all_is_plotted_and_shared_out_without_dividing_by_it() -> None:
    found = sensitivity(0.0)
    assert found.share(found.layers[0]) == 0
    ET.fromstring(reports.svg(found))  # noqa: S314 - our own text


def test_json_lists_every_layer_by_loss() -> None:
    rows = sensitivity(1e-3).to_dict()["layers"]
    assert isinstance(rows, list)
    assert [row["layer"] for row in rows[:2]] == ["layer.24", "layer.23"]
    assert len(rows) == 25
    assert sum(row["share"] for row in rows) == pytest.approx(1)
