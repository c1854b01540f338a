"""Models that coremltools' own tools made, from PyTorch to a package and back."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.validate.mil import Interpreter, open_model

from .programs import ct

with quiet_import():
    import coremltools.optimize.coreml as cto


class Tower(nn.Module):
    """Convolutions, attention and norms, as a vision tower has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.layer = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = x + self.depth(x) * x.mean((2, 3), keepdim=True).sigmoid()
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.layer(x)).reshape(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(attended))


def tower() -> Tower:
    torch.manual_seed(0)
    model = Tower()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval().requires_grad_(False)


IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def convert(model: nn.Module, *, half: bool = False) -> Any:
    program = torch.export.export(model, (IMAGE,)).run_decompositions({})
    return ct.convert(
        program,
        inputs=[ct.TensorType(name="image", shape=tuple(IMAGE.shape), dtype=np.float32)],
        outputs=[ct.TensorType(name="features", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        skip_model_load=True,
    )


def predicted(model: Any, path: Path, *, exact: bool = False) -> Tensor:
    model.save(str(path))
    (result,) = open_model(path, "main", exact=exact).predict({"image": IMAGE.numpy()}).values()
    return torch.from_numpy(result)


def test_a_tower_equals_pytorch(tmp_path: Path) -> None:
    model = tower()
    expected = model(IMAGE)
    result = predicted(convert(model), tmp_path / "full.mlpackage")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_tower_in_float16_is_near_and_exact_is_the_rounded_weights(tmp_path: Path) -> None:
    model = tower()
    expected = model(IMAGE)
    package = convert(model, half=True)
    typed = predicted(package, tmp_path / "half.mlpackage")
    exact = predicted(package, tmp_path / "half.mlpackage", exact=True)
    rounded = tower()
    for parameter in rounded.parameters():
        parameter.copy_(parameter.half().float())
    # coremltools folds BatchNorm before it rounds, so weights differ by roundings of it.
    torch.testing.assert_close(exact, rounded(IMAGE), rtol=2e-3, atol=2e-3)
    error = float((typed - expected).abs().max())
    assert 0 < error < 0.01
    assert float((typed - exact).abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("linear int8", lambda model: cto.linear_quantize_weights(
            model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(
                mode="linear_symmetric", weight_threshold=64)))),
        ("linear int4 by block", lambda model: cto.linear_quantize_weights(
            model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(
                mode="linear", dtype="int4", granularity="per_block", block_size=8,
                weight_threshold=64)))),
        ("palette", lambda model: cto.palettize_weights(
            model, cto.OptimizationConfig(cto.OpPalettizerConfig(
                mode="uniform", nbits=4, weight_threshold=64)))),
        ("palettes of groups", lambda model: cto.palettize_weights(
            model, cto.OptimizationConfig(cto.OpPalettizerConfig(
                mode="uniform", nbits=6, granularity="per_grouped_channel", group_size=4,
                weight_threshold=64)))),
        ("pruned", lambda model: cto.prune_weights(
            model, cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(
                target_sparsity=0.4, weight_threshold=64)))),
    ],
)  # fmt: skip
def test_compressed_weights_equal_their_decompressed_ones(
    tmp_path: Path, name: str, compress: Any
) -> None:
    """coremltools expands what it compressed; the interpreter must find the same numbers."""
    packed = compress(convert(tower()))
    operations = [
        operation.type
        for operation in packed.get_spec()
        .mlProgram.functions["main"]
        .block_specializations["CoreML8"]
        .operations
    ]
    assert any(kind.startswith("constexpr_") for kind in operations), name
    result = predicted(packed, tmp_path / "packed.mlpackage")
    expanded = predicted(cto.decompress_weights(packed), tmp_path / "expanded.mlpackage")
    torch.testing.assert_close(result, expanded, rtol=1e-5, atol=1e-5)


CAPACITY, WIDTH, HEADS = 16, 24, 3


class Decoder(nn.Module):
    """One attention layer whose cache is a buffer that a position writes into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 50)
        self.register_buffer("keyCache", torch.zeros(1, HEADS, CAPACITY, WIDTH // HEADS))
        self.register_buffer("valueCache", torch.zeros(1, HEADS, CAPACITY, WIDTH // HEADS))

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """mask [1, 1, new, past + new] is 0 or very negative."""
        new, total = mask.shape[-2], mask.shape[-1]
        qkv = self.qkv(self.norm(embeds)).reshape(1, new, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        self.keyCache[:, :, total - new : total] = qkv[1]
        self.valueCache[:, :, total - new : total] = qkv[2]
        keys, values = self.keyCache[:, :, :total], self.valueCache[:, :, :total]
        scores = qkv[0] @ keys.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return self.head(embeds + attended)


def mask_of(past: int, new: int) -> Tensor:
    kept = torch.ones(new, past + new).tril(past) > 0
    return torch.where(kept, 0.0, -10000.0)[None, None]


def convert_decoder(path: Path) -> None:
    decoder = Decoder().eval().requires_grad_(False)
    shape = tuple(decoder.keyCache.shape)
    traced = torch.jit.trace(decoder, (torch.rand(1, 2, WIDTH), mask_of(3, 2)))
    new = ct.RangeDim(1, CAPACITY, default=1)
    total = ct.RangeDim(1, CAPACITY, default=1)
    model = ct.convert(
        traced,
        inputs=[
            ct.TensorType(name="embeds", shape=(1, new, WIDTH), dtype=np.float32),
            ct.TensorType(name="mask", shape=(1, 1, new, total), dtype=np.float32),
        ],
        outputs=[ct.TensorType(name="logits", dtype=np.float32)],
        states=[
            ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)
            for name in ("keyCache", "valueCache")
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(path))


def decode(model: Interpreter, decoder: Decoder, state: Any, past: int, new: int) -> float:
    """The worst difference of one step from PyTorch's."""
    embeds = torch.rand(1, new, WIDTH, generator=torch.Generator().manual_seed(past))
    mask = mask_of(past, new)
    result = model.predict({"embeds": embeds.numpy(), "mask": mask.numpy()}, state)["logits"]
    return float((torch.from_numpy(result) - decoder(embeds, mask)).abs().max())


def test_a_stateful_decoder_equals_pytorch_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "decoder.mlpackage"
    convert_decoder(path)
    # States are float16 in Core ML even where the program computes in float32: exact keeps them.
    model = open_model(path, "main", exact=True)
    typed = open_model(path, "main")
    decoder, again = Decoder().eval().requires_grad_(False), Decoder().eval().requires_grad_(False)
    state, rounded = model.make_state(), typed.make_state()
    errors = []
    for past, new in ((0, 5), (5, 1), (6, 3), (9, 1)):
        assert decode(model, decoder, state, past, new) < 1e-5
        errors.append(decode(typed, again, rounded, past, new))
    assert 1e-6 < max(errors) < 1e-2


def test_functions_of_one_package_share_weights_and_states(tmp_path: Path) -> None:
    single = tmp_path / "single.mlpackage"
    convert_decoder(single)
    descriptor = ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(single), "main", "prefill")
    descriptor.add_function(str(single), "main", "decode")
    descriptor.default_function_name = "prefill"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(descriptor, str(both))
    prefill, step = open_model(both, "prefill", exact=True), open_model(both, "decode", exact=True)
    decoder = Decoder().eval().requires_grad_(False)
    state = prefill.make_state()
    assert decode(prefill, decoder, state, 0, 4) < 1e-5
    assert decode(step, decoder, state, 4, 1) < 1e-5
    large = [t for t in prefill._program.slots if t is not None and t.numel() >= WIDTH * WIDTH]
    kept = {t.data_ptr() for t in step._program.slots if t is not None}
    assert len(large) >= 2 and all(t.data_ptr() in kept for t in large)
