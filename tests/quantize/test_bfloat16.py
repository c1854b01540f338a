"""bfloat16: what is stored in which type, what its numbers are, and how near they come."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastvlm_export.exporter import checkpoint, graphs
from fastvlm_export.exporter.model.decoder import RMSNorm
from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.apply import needs_calibration, quantize
from fastvlm_export.quantize.recipes import RECIPES, Float, Recipe
from fastvlm_export.quantize.retype import CACHE, to_bfloat16
from fastvlm_export.quantize.runnable import Float32Interpreter, runnable
from fastvlm_export.targets.eager import ProgramSession

from . import halves
from .halves import BRAIN_INT8, error, half_inputs, quantized, small

BF16 = RECIPES["bf16"]
CAST = "aten._to_copy.default"


def stored(program: ExportedProgram) -> dict[str, Tensor]:
    return {**program.constants, **program.state_dict}


def types(program: ExportedProgram) -> Counter[torch.dtype]:
    """Of every operator's tensor."""
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "call_function"]
    flat = torch.utils._pytree.tree_leaves(values)
    return Counter(x.dtype for x in flat if isinstance(x, Tensor))


def test_no_image_is_needed_and_nothing_stays_behind() -> None:
    assert not needs_calibration(BF16)
    model, spec = small()
    found = quantize(model, BF16, spec, None, halves.silent)
    assert (found.record.kept, found.record.layers) == ({}, ())
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model was changed"


@pytest.mark.parametrize("name", ["vision", "embedding", "decoder"])
def test_weights_are_bfloat16_and_the_interface_float32_but_for_the_cache(name: str) -> None:
    model, spec = small()
    graph = graphs.build(
        model, resolution=halves.RESOLUTION, context=spec.context, image_token_id=1
    )[name]
    program = quantized(BF16).programs[name]
    assert {x.dtype for x in stored(program).values()} == {torch.bfloat16}
    nodes = {n.name: n.meta.get("val") for n in program.graph.nodes}
    signature = program.graph_signature
    for names, ends in (
        (graph.inputs, signature.user_inputs),
        (graph.outputs, signature.user_outputs),
    ):
        for outside, inside in zip(names, ends, strict=True):
            found = nodes[str(inside)].dtype
            if found.is_floating_point:
                cache = outside.startswith(CACHE)
                assert found is (torch.bfloat16 if cache else torch.float32), outside
    found = types(program)
    assert torch.float16 not in found
    assert found[torch.bfloat16] > 0
    if name == "decoder":
        norms = sum(isinstance(m, RMSNorm) for m in model.decoder.modules())
        statistics = [n for n in program.graph.nodes if str(n.target) == "aten.rsqrt.default"]
        assert len(statistics) == norms
        assert {n.meta["val"].dtype for n in statistics} == {torch.float32}
    else:  # casts at the two ends alone
        casts = sum(str(n.target) == CAST for n in program.graph.nodes)
        assert casts <= 2


@pytest.mark.parametrize("name", ["vision", "embedding", "decoder"])
def test_numbers_are_float32s_but_for_the_roundings(name: str) -> None:
    model, spec = small()
    graph = graphs.build(
        model, resolution=halves.RESOLUTION, context=spec.context, image_token_id=1
    )[name]
    inputs = tuple(graph.inputs.values())
    if name == "vision":
        inputs = (halves.shown()[0],)
    expected = graph.module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    program = to_bfloat16(graph)
    found = runnable(program)(*half_inputs(program, inputs))
    worst = max(error(f, e) for f, e in zip(found, expected, strict=True))
    print(f"{name}: {worst:.2e} of the peak")
    assert 2**-12 < worst < 8 * 3e-3
    for value, of_program in zip(found, program.graph_signature.user_outputs, strict=True):
        nodes = {n.name: n.meta.get("val") for n in program.graph.nodes}
        assert value.dtype is nodes[str(of_program)].dtype


def test_the_interpreter_rounds_as_bfloat16_does() -> None:
    """One product: its float32 sum is rounded once, as PyTorch's own kernel does."""
    linear = torch.nn.Linear(64, 32).eval().requires_grad_(False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    graph = graphs.Graph(name="one", module=linear, inputs={"x": x}, outputs=("y",), dynamic={})
    program = to_bfloat16(graph)
    (found,) = runnable(program)(x)
    wide = (t.bfloat16().float() for t in (x, linear.weight, linear.bias))
    assert torch.equal(found, torch.nn.functional.linear(*wide).bfloat16().float())
    native = program.module()(x)
    assert error(found, native) < 2**-7  # a rounding that falls the other way
    (exact,) = runnable(program, exact=True)(x)
    wide = (t.bfloat16().double() for t in (linear.weight, linear.bias))
    assert error(exact, torch.nn.functional.linear(x.double(), *wide)) < 1e-6


def test_large_values_survive() -> None:
    """1e6 is beyond float16, not beyond bfloat16."""
    _, spec = small()
    run = runnable(quantized(BF16).programs["decoder"])
    config = spec.decoder
    past = [torch.full((1, config.kv_heads, 2, config.head_dim), 1e6).bfloat16()]
    x = torch.ones(1, 1, config.hidden_size)
    logits, *present = run(x, torch.ones(1, 3, dtype=torch.int64), *past * (2 * config.layers))
    assert logits.isfinite().all()
    assert {p.dtype for p in present} == {torch.bfloat16}
    assert float(present[0][0, 0, 0, 0]) == pytest.approx(1e6, rel=2**-8)


def test_a_session_hands_the_cache_on_in_bfloat16() -> None:
    _, spec = small()
    session = ProgramSession(quantized(BF16).programs, spec.decoder, spec.context)
    ids = torch.arange(5)[None].numpy()
    whole = session.decode(session.embed(ids))
    assert {x.dtype for x in session.past} == {torch.bfloat16}
    session.reset()
    for i in range(5):
        stepwise = session.decode(session.embed(ids[:, i : i + 1]))
    assert error(torch.from_numpy(stepwise), torch.from_numpy(whole)) < 8 * 3e-3


def test_integers_are_those_of_float32_and_scales_numbers_of_bfloat16() -> None:
    ours, full = (
        quantized(r).programs
        for r in (BRAIN_INT8, dataclasses.replace(BRAIN_INT8, float_format=Float.FP32))
    )
    checked = 0
    for name in ("embedding", "decoder"):
        for key, value in stored(full[name]).items():
            found = stored(ours[name])[key]
            if value.dtype is torch.float32:
                assert found.dtype is torch.bfloat16, key
                assert error(found, value) < 2**-8
            else:
                assert torch.equal(found, value), key
                checked += value.numel()
    assert checked > 10_000
    for node in ours["vision"].graph.nodes:
        if "quantize_per_tensor" in str(node.target):
            assert float(torch.tensor(node.args[1]).bfloat16()) == node.args[1]
    weights = {k: v for k, v in stored(ours["vision"]).items() if v.dtype is torch.int8}
    before = stored(full["vision"])
    assert weights
    assert all(torch.equal(v, before[k]) for k, v in weights.items())
    assert {x.dtype for k, x in stored(ours["vision"]).items() if "zero_point" not in k} == {
        torch.int8,
        torch.bfloat16,
    }


def test_a_recipe_file_says_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('float = "bf16"\n')
    recipe = recipe_file.read(path)
    assert recipe == dataclasses.replace(BF16, name="mine")
    path.write_text(recipe_file.write(recipe))
    assert recipe_file.read(path) == recipe
    assert Recipe.from_dict(BF16.to_dict()) == BF16


def test_the_bundled_models_features_stay() -> None:
    """Against its own float32, and against PyTorch's own bfloat16 kernels."""
    bundled = checkpoint.bundled()
    model = bundled.model().eval()
    graph = graphs.build(model, resolution=bundled.resolution, context=64, image_token_id=1)[
        "vision"
    ]
    x = torch.rand(
        1, 3, bundled.resolution, bundled.resolution, generator=torch.Generator().manual_seed(2)
    )
    program = to_bfloat16(graph)
    with torch.inference_mode():
        expected, native = graph.module(x), program.module()(x)
        found = runnable(program)(x)[0]
    loss, apart = (float((found - e).norm() / e.norm()) for e in (expected, native))
    print(f"loss {loss:.2e}, PyTorch's kernels {apart:.2e}")
    assert 1e-3 < loss < 5e-2
    assert apart < 5e-2


def test_the_interpreter_computes_in_float32() -> None:
    """Values inside are float32 tensors: PyTorch's bfloat16 kernels take no part."""
    seen: set[torch.dtype] = set()

    class Watched(Float32Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            seen.update(
                x.dtype
                for x in torch.utils._pytree.tree_leaves(value)
                if isinstance(x, Tensor) and x.is_floating_point()
            )
            return value

    with torch.inference_mode():
        Watched(quantized(BF16).programs["vision"]).run(halves.shown()[0])
    assert seen == {torch.float32}
