"""The packages of small models, run by the interpreter, against PyTorch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.quantize.recipes import RECIPES, Precision
from fastvlm_export.targets import coreml, coreml_graphs, coreml_model
from fastvlm_export.targets.base import Array, Options
from fastvlm_export.targets.coreml_lowering import Translator
from fastvlm_export.targets.coreml_session import CoreMLSession
from fastvlm_export.targets.eager import EagerSession, ProgramSession
from fastvlm_export.validate.mil import open_model

from .conftest import CONTEXT, byte_tokenizer, lively_model, make_spec, normal, programs_of, worst
from .small_coreml import CHUNK, SmallCoreML, small_coreml

with quiet_import():
    from coremltools.models import MLModel

LIMIT = 1e-5


class Packages:
    """A small model under a recipe as Core ML takes it, in a folder."""

    def __init__(self, small: SmallCoreML) -> None:
        self.model, self.spec, self.recipe = small.model, small.spec, small.recipe
        self.programs, self.folder = small.programs, small.folder
        self.bundle: Any = SimpleNamespace(
            path=self.folder, manifest=SimpleNamespace(context=CONTEXT, artifact={})
        )

    def session(self, *, exact: bool = False) -> CoreMLSession:
        return CoreMLSession(self.bundle, partial(open_model, exact=exact))

    def reference(self, *, exact: bool = False) -> ProgramSession:
        return ProgramSession(self.programs, self.spec.decoder, CONTEXT, exact=exact)

    def protobuf(self, package: str) -> Any:
        return MLModel(str(self.folder / package), skip_model_load=True).get_spec()

    def operations(self, package: str) -> Iterator[Any]:
        for function in self.protobuf(package).mlProgram.functions.values():
            yield from function.block_specializations[function.opset].operations


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int4", "lut4", "asymmetric"])
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(small_coreml(tmp_path_factory, request.param))


ONLY_FP16 = pytest.mark.parametrize("packages", ["fp16"], indirect=True)
ONLY_FP32 = pytest.mark.parametrize("packages", ["fp32"], indirect=True)


def test_without_rounding_every_recipe_computes_what_its_program_does(packages: Packages) -> None:
    ours, reference = packages.session(exact=True), packages.reference(exact=True)
    size = packages.spec.preprocessing.resolution
    pixels = np.random.default_rng(1).random((1, 3, size, size), dtype=np.float32)
    assert worst(ours.encode_image(pixels), reference.encode_image(pixels)) < LIMIT
    ids = np.array([[5, 299, 0, 7]])
    assert worst(ours.embed(ids), reference.embed(ids)) < 1e-6
    embeds = reference.embed(np.arange(CHUNK + 3)[None])
    assert worst(ours.decode(embeds), reference.decode(embeds)) < LIMIT
    for token in (3, 150, 299):
        one = reference.embed(np.array([[token]]))
        assert worst(ours.decode(one), reference.decode(one)) < LIMIT


def test_with_rounding_every_recipe_stays_near_its_program(packages: Packages) -> None:
    ours, reference = packages.session(), packages.reference()
    limit = 1e-5 if packages.recipe.float_format == "fp32" else 2e-2
    embeds = packages.reference(exact=True).embed(np.arange(CHUNK + 3)[None])
    assert worst(ours.decode(embeds), reference.decode(embeds)) < limit
    one = embeds[:, :1]
    assert worst(ours.decode(one), reference.decode(one)) < limit


@ONLY_FP32
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, CONTEXT])
def test_a_prompt_of_any_length_is_cut_into_chunks(packages: Packages, length: int) -> None:
    model = EagerSession(reparameterize(packages.model).model, CONTEXT)
    embeds = normal(1, length, packages.spec.decoder.hidden_size)
    assert worst(packages.session().decode(embeds), model.decode(embeds)) < LIMIT


@ONLY_FP32
def test_a_second_turn_may_start_anywhere(packages: Packages) -> None:
    model = EagerSession(reparameterize(packages.model).model, CONTEXT)
    ours = packages.session()
    for seed, length in enumerate((5, 1, 11, 1, CONTEXT - 18)):
        embeds = normal(1, length, packages.spec.decoder.hidden_size, seed=seed)
        assert worst(ours.decode(embeds), model.decode(embeds)) < LIMIT


@ONLY_FP16
def test_neither_padding_nor_an_earlier_answer_is_ever_seen(packages: Packages) -> None:
    decoder = packages.folder / coreml_model.DECODER
    prefill, decode = (open_model(decoder, f) for f in ("prefill", "decode"))
    width = packages.spec.decoder.hidden_size
    embeds = normal(1, CHUNK, width)
    one = {"inputs_embeds": normal(1, 1, width, seed=2), "position": np.array([3], np.int32)}

    def run(state: Any, padding: float) -> list[Array]:
        given = embeds.copy()
        given[:, 3:] *= padding
        first = {"position": np.array([0], np.int32), "length": np.array([3], np.int32)}
        logits = prefill.predict({"inputs_embeds": given, **first}, state)["logits"]
        return [logits, decode.predict(one, state)["logits"]]

    fresh = run(prefill.make_state(), 0.0)
    used = prefill.make_state()
    everything = {"position": np.array([CONTEXT], np.int32), "length": np.array([CHUNK], np.int32)}
    prefill.predict({"inputs_embeds": 100 * embeds, **everything}, used)
    for start in range(0, CONTEXT, CHUNK):
        everything["position"][:] = start
        prefill.predict({"inputs_embeds": 100 * embeds, **everything}, used)
    for again in (run(prefill.make_state(), 50.0), run(used, -30.0)):
        for ours, theirs in zip(again, fresh, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_shapes_are_static_ranks_small_and_nothing_is_infinite(packages: Packages) -> None:
    for package in (coreml_model.VISION, coreml_model.DECODER):
        for operation in packages.operations(package):
            for output in operation.outputs:
                dimensions = output.type.tensorType.dimensions
                assert len(dimensions) <= 5
                assert all(d.WhichOneof("dimension") == "constant" for d in dimensions)
            for value in (*operation.attributes.values(), *_immediate(operation)):
                floats = value.immediateValue.tensor.floats.values
                assert np.isfinite(floats).all()
                raw = value.immediateValue.tensor.bytes.values
                if raw and "FLOAT16" in str(value.type):
                    assert np.isfinite(np.frombuffer(raw, np.float16)).all()


def _immediate(operation: Any) -> Iterator[Any]:
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield binding.value


def test_both_functions_share_their_weights(packages: Packages, tmp_path: Path) -> None:
    whole = packages.folder / coreml_model.DECODER
    alone = tmp_path / "alone.mlpackage"
    prefill = coreml_graphs._decoder(
        packages.programs["decoder"], packages.spec, CHUNK, CONTEXT + CHUNK
    )
    coreml_graphs.save({coreml_model.MAIN: prefill}, "iOS18", alone)
    sizes = [_weights(path) for path in (whole, alone)]
    assert sizes[0] < sizes[1] + 10_000  # positions of one row beside those of a chunk


def _weights(package: Path) -> int:
    return (package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


@ONLY_FP32
def test_the_interface_is_what_clients_are_told(packages: Packages) -> None:
    model, config = coreml_model, packages.spec.decoder
    shape = (config.layers, 1, config.kv_heads, CONTEXT + CHUNK, config.head_dim)
    by_name = {f.name: f for f in packages.protobuf(model.DECODER).description.functions}
    assert set(by_name) == {model.PREFILL, model.DECODE}
    assert packages.protobuf(model.DECODER).description.defaultFunctionName == model.PREFILL
    for function, extra in ((model.PREFILL, {model.LENGTH}), (model.DECODE, set())):
        found = by_name[function]
        assert {i.name for i in found.input} == {model.EMBEDS, model.POSITION, *extra}
        assert [o.name for o in found.output] == [model.LOGITS]
        states = {s.name: tuple(s.type.stateType.arrayType.shape) for s in found.state}
        caches = (model.KEY_CACHE, model.VALUE_CACHE, model.KEY_REST, model.VALUE_REST)
        assert states == dict.fromkeys(caches, shape)
    embedding = packages.protobuf(model.EMBEDDING).description.input[0].type.multiArrayType
    ranges = [(r.lowerBound, r.upperBound) for r in embedding.shapeRange.sizeRanges]
    assert ranges == [(1, 1), (1, CONTEXT)]
    vision = packages.protobuf(model.VISION)
    assert vision.specificationVersion == 9  # iOS 18, macOS 15
    assert vision.description.output[0].name == model.FEATURES


@ONLY_FP16
def test_only_a_float32_decoder_keeps_what_float16_cuts_off(packages: Packages) -> None:
    functions = packages.protobuf(coreml_model.DECODER).description.functions
    for function in functions:
        assert {s.name for s in function.state} == {
            coreml_model.KEY_CACHE,
            coreml_model.VALUE_CACHE,
        }


@ONLY_FP16
def test_every_value_has_the_type_that_it_was_traced_in(packages: Packages) -> None:
    """This model leaves fp16's range, so both types are there."""
    traced = {
        node.name: node.meta["val"].dtype
        for node in packages.programs["vision"].graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    kinds = {10: torch.float16, 11: torch.float32}  # MILSpec.DataType
    found = Counter(
        (traced[output.name], kinds[output.type.tensorType.dataType])
        for operation in packages.operations(coreml_model.VISION)
        for output in operation.outputs
        if operation.type not in ("const", "cast") and output.name in traced
    )
    assert all(wanted is stored for wanted, stored in found)
    assert found[torch.float16, torch.float16] > 50
    assert found[torch.float32, torch.float32] > 5


@pytest.mark.parametrize("packages", ["fp16", "int4"], indirect=True)
def test_the_same_programs_give_the_same_bytes(packages: Packages, tmp_path: Path) -> None:
    coreml_graphs.write(packages.programs, packages.spec, CHUNK, CONTEXT + CHUNK, "iOS18", tmp_path)
    first, second = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (packages.folder, tmp_path)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("packages", ["fp32", "asymmetric"], indirect=True)
def test_the_towers_package_stops_before_the_projector(packages: Packages, tmp_path: Path) -> None:
    path = tmp_path / "fastvithd.mlpackage"
    graphs = coreml_graphs.write_tower(packages.programs["vision"], "iOS18", path)
    config, size = packages.model.config, packages.spec.preprocessing.resolution
    tokens, width = packages.spec.image_tokens, config.tower.features
    assert graphs == {
        "fastvithd.main": {
            "inputs": {"images": f"float32[1,3,{size},{size}]"},
            "outputs": {"image_features": f"float32[1,{tokens},{width}]"},
        }
    }
    pixels = np.random.default_rng(1).random((1, 3, size, size), dtype=np.float32)
    features = open_model(path, "main", exact=True).predict({"images": pixels})["image_features"]
    static = coreml_graphs._static(packages.programs["vision"])
    module = static.module(check_guards=False)
    last = coreml_graphs.unprojected(static).name
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = ((next(n for n in module.graph.nodes if n.name == last),),)
    module.recompile()
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels)).numpy()
    assert worst(features, expected) < LIMIT


@pytest.mark.parametrize("packages", ["int8"], indirect=True)
def test_the_towers_package_does_not_round_for_the_projector(
    packages: Packages, tmp_path: Path
) -> None:
    program = packages.programs["vision"]
    coreml_graphs.write_tower(program, "iOS18", tmp_path / "fastvithd.mlpackage")
    whole = Counter(o.type for o in packages.operations(coreml_model.VISION))
    model = MLModel(str(tmp_path / "fastvithd.mlpackage"), skip_model_load=True).get_spec()
    main = model.mlProgram.functions["main"]
    tower = Counter(o.type for o in main.block_specializations[main.opset].operations)
    assert whole["linear"] - tower["linear"] == 2
    assert whole["quantize"] - tower["quantize"] == 2


@ONLY_FP32
def test_newer_systems_can_be_asked_for(packages: Packages, tmp_path: Path) -> None:
    options = Options(deployment_target="macos26")
    assert coreml.option_problems(options) == []
    artifact = coreml.lower(packages.programs, packages.spec, packages.recipe, tmp_path, options)
    assert artifact.details["deployment_target"] == "iOS26"
    spec = MLModel(str(tmp_path / "vision.mlpackage"), skip_model_load=True).get_spec()
    assert spec.specificationVersion == 10


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(deployment_target="ios17"), "ios18"),
        (Options(deployment_target="windows"), "ios18"),
        (Options(layout="apple"), "apple-app"),
    ],
)
def test_options_that_cannot_be_had_are_named(options: Options, named: str) -> None:
    [line] = coreml.option_problems(options)
    assert named in line


def test_an_operator_without_translation_is_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = torch.export.export(Odd(), (torch.zeros(2),))
    with pytest.raises(NotImplementedError, match="bessel_j0"):
        Translator(program, [None], {}).run()


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_an_image_token_beyond_the_table_is_looked_up_like_its_last_row(
    tmp_path: Path, recipe: str
) -> None:
    vocabulary = byte_tokenizer().vocab_size
    model = lively_model(vocabulary, tied=False, depths=(1, 1, 1, 1, 1), layers=1)
    spec = make_spec(model)
    assert spec.image_token_id == model.config.decoder.vocab_size
    programs = programs_of(model, spec, replace(coreml.adapt(RECIPES[recipe]), vision=Precision()))
    path = tmp_path / "embedding.mlpackage"
    embedding = coreml_graphs.embedding(programs["embedding"], spec)
    coreml_graphs.save({coreml_model.MAIN: embedding}, "iOS18", path)
    ids = np.array([[spec.image_token_id, spec.image_token_id - 1, 3]], np.int32)
    rows = open_model(path, "main").predict({"input_ids": ids})["inputs_embeds"][0]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    reference = ProgramSession(programs, spec.decoder, CONTEXT).embed(ids.astype(np.int64))[0]
    assert worst(rows, reference) < 1e-6
