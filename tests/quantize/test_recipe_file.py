"""TOML recipes: what they mean, the way out and back in, and one clear error for a bad one."""

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.recipe_file import find, read, write
from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    LossLimits,
    Method,
    Observer,
    Part,
    Precision,
    Recipe,
)
from fastvlm_export.quantize.toml_file import LARGEST_FILE
from fastvlm_export.targets import onnx_recipes

from . import strategies

# Each example writes the one file anew, so that a shared folder is no matter.
one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def recipe_of(folder: Path, text: str, name: str = "mine.toml") -> Recipe:
    (folder / name).write_text(text)
    return read(folder / name)


def problems(folder: Path, text: str, name: str = "mine.toml") -> list[str]:
    """The lines of the one ExportError."""
    with pytest.raises(ExportError) as raised:
        print(recipe_of(folder, text, name))
    first, *lines = raised.value.message.splitlines()
    assert str(folder / name) in first
    assert str(folder / name) in raised.value.hint
    assert "fastvlm-export targets" in raised.value.hint
    return [line.removeprefix("  - ") for line in lines]


def problem(folder: Path, text: str, name: str = "mine.toml") -> str:
    found = problems(folder, text, name)
    assert len(found) == 1, found
    return found[0]


def test_an_empty_file_is_float32(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "") == Recipe(name="mine")


@pytest.mark.parametrize("base", RECIPES)
def test_a_base_alone(base: str, tmp_path: Path) -> None:
    expected = dataclasses.replace(RECIPES[base], name="mine")
    assert recipe_of(tmp_path, f'base = "{base}"') == expected


def test_the_readmes_example_is_a_recipe_that_onnx_takes(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    _, _, rest = readme.partition("```toml\n")
    example_recipe = recipe_of(tmp_path, rest.partition("```")[0])
    assert example_recipe.precision("decoder.layers.0.mlp.up_proj").bits == 8
    assert example_recipe.precision("vision_tower.network.10.0.convffn.fc1").bits is None
    assert onnx_recipes.problems(example_recipe, None, tied=True) == []


def test_the_form_in_the_docstring(tmp_path: Path) -> None:
    """The documentation of the form is a recipe, but for the float format that it is not in."""
    _, _, text = (recipe_file.__doc__ or "").partition("\n\n")
    lines = [line for line in text.splitlines() if "range_limit" not in line]
    assert recipe_of(tmp_path, "\n".join(lines)) == Recipe(
        name="mine",
        vision=RECIPES["int4"].vision,
        embedding=RECIPES["int4"].embedding,
        decoder=dataclasses.replace(RECIPES["int4"].decoder, method=Method.GPTQ),
        head=RECIPES["int4"].head,
        layers=(
            LayerRule(
                pattern="decoder.layers.0.mlp.*",
                precision=Precision(
                    bits=8,
                    group_size=32,
                    method=Method.GPTQ,
                    activations=Activations.DYNAMIC,
                ),
            ),
            LayerRule(pattern="projector*", precision=Precision()),
        ),
        observer=Observer.PERCENTILE,
        limits=LossLimits(mean_kl=0.3, accuracy_points=1.5),
    )


def test_keys_that_are_not_set_are_the_bases(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 'base = "int4"\n[decoder]\ngroup_size = 128')
    assert recipe.decoder == dataclasses.replace(RECIPES["int4"].decoder, group_size=128)
    assert recipe.head == RECIPES["int4"].head


def test_rules_start_from_their_part_as_the_file_has_it(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        """
        base = "int4"
        [[layers]]
        pattern = "decoder.layers.1.*"
        bits = 8
        [[layers]]
        pattern = "decoder.lm_head"
        method = "hqq"
        [decoder]
        group_size = 64
        """,
    )
    layer, head = (rule.precision for rule in recipe.layers)
    assert layer == Precision(bits=8, group_size=64, activations=Activations.DYNAMIC)
    assert head == dataclasses.replace(RECIPES["int4"].head, method=Method.HQQ)


def test_channel_takes_the_groups_away(tmp_path: Path) -> None:
    text = 'base = "int4"\n[decoder]\nbits = 8\ngroup_size = "channel"'
    assert recipe_of(tmp_path, text).decoder == RECIPES["int8"].decoder


def test_lookup_tables_start_anew_but_for_the_bits(tmp_path: Path) -> None:
    """A group size, a symmetry and activations mean something else beside scales."""
    text = 'base = "int4"\n[vision]\nmethod = "palette"\n[decoder]\nmethod = "palette"'
    recipe = recipe_of(tmp_path, text)
    assert recipe.vision == Precision(bits=8, method=Method.PALETTE)
    assert recipe.decoder == Precision(bits=4, method=Method.PALETTE)
    assert recipe.head == RECIPES["int4"].head
    back = recipe_of(tmp_path, 'base = "lut4"\n[decoder]\nmethod = "rtn"')
    assert back.decoder == Precision(bits=4)
    assert back.head == RECIPES["lut4"].head
    grouped = recipe_of(tmp_path, 'base = "lut4"\n[decoder]\ngroup_size = 8\n[head]\nbits = 8')
    assert grouped.decoder == dataclasses.replace(RECIPES["lut4"].decoder, group_size=8)
    assert grouped.head == dataclasses.replace(RECIPES["lut4"].head, bits=8)
    whole = recipe_of(tmp_path, 'base = "lut4"\n[decoder]\ngroup_size = "tensor"')
    assert whole.decoder == Precision(bits=4, method=Method.PALETTE)
    assert "symmetric" not in write(RECIPES["lut6"])


def test_keep_takes_the_integers_away(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 'base = "int8"\n[vision]\nkeep = true\n[head]\nkeep = false')
    assert recipe.vision == Precision()
    assert recipe.head == RECIPES["int8"].head


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ('base = "int8"', "int8"),
        ('base = "int8"\n[decoder]\nbits = 4\ngroup_size = 32', "int4"),
        ('base = "int4"\n[decoder]\nbits = 8', "int8"),
        ('[[layers]]\npattern = "projector"\nbits = 4', "int4"),
        ('float = "fp16"', "fp16"),
        ('float = "fp16"\n[head]\nbits = 8', "int8"),
        ('base = "fp16"\nfloat = "fp32"', "fp32"),
        ('base = "lut6"', "lut6"),
        ('base = "lut6"\n[head]\nbits = 4', "lut4"),
        ('[head]\nmethod = "palette"\nbits = 8', "int8"),
        ('[head]\nmethod = "palette"\nbits = 1', "int4"),
    ],
)
def test_limits_go_by_the_fewest_bits(text: str, like: str, tmp_path: Path) -> None:
    assert recipe_of(tmp_path, text).limits == RECIPES[like].limits


def test_one_limit_of_two(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 'base = "int8"\n[limits]\naccuracy_points = 0')
    assert recipe.limits == dataclasses.replace(RECIPES["int8"].limits, accuracy_points=0.0)
    lone = problem(tmp_path, "[limits]\nmean_kl = 0.1")
    assert lone.startswith("limits.accuracy_points is missing")


def test_names(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, 'name = "a.b-c_d+e"').name == "a.b-c_d+e"
    assert recipe_of(tmp_path, "", "other.toml").name == "other"
    found = problem(tmp_path, 'base = "int4"', "my recipe.toml")
    assert found.startswith('name is missing, and the file\'s, "my recipe", is not up to 64')
    for name in ("", "a/b", "..", "a b", "ü", "x" * 65, "\\u001b[31m"):
        assert problem(tmp_path, f'name = "{name}"').startswith("name is ")


def test_a_built_ins_name_is_for_its_equal(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, 'base = "int4"', "int4.toml") == RECIPES["int4"]
    found = problem(tmp_path, 'base = "int4"\n[head]\nmethod = "hqq"', "int4.toml")
    assert found.startswith('name is "int4", a built-in recipe that this file differs from')


@pytest.mark.parametrize("name", RECIPES)
def test_built_in_recipes_come_back(name: str, tmp_path: Path) -> None:
    text = write(RECIPES[name])
    print(text)
    assert repr(recipe_of(tmp_path, text)) == repr(RECIPES[name])


@one_file
@given(recipe=strategies.recipes())
def test_recipes_come_back(recipe: Recipe, tmp_path: Path) -> None:
    text = write(recipe)
    assert recipe_of(tmp_path, text) == recipe, text


def test_what_counts_for_nothing_is_not_written(tmp_path: Path) -> None:
    recipe = Recipe(
        name="x",
        head=Precision(group_size=32, symmetric=False),
        observer=Observer.PERCENTILE,
        percentile=99.0,
        range_limit=100.0,
    )
    assert recipe_of(tmp_path, write(recipe)) == Recipe(name="x")


TABLES = 'method = "palette"'
ONE_PROBLEM = [
    # unknown keys
    ("bse = 'int4'", "bse is no key. Did you mean 'base'?"),
    ("[decodr]\nbits = 8", "decodr is no key. Did you mean 'decoder'?"),
    ("[decoder]\nbits = 8\ngroup_sizes = 3", "decoder.group_sizes is no key. Did you mean"),
    ("[decoder]\nbits = 8\nxyz = 3", "decoder.xyz is no key. There are: bits, group_size,"),
    ("[limits]\nmean_kl = 1\naccuracy_points = 1\nkl = 1", "limits.kl is no key. There are: mean"),
    ('"\\u001b[31m" = 1', '"\\u001b[31m" is no key.'),
    # types and bounds
    ("base = 3", 'base is 3, not "fp32" or "fp16" or "int8" or "int4"'),
    ('base = "int3"', 'base is "int3", not "fp32"'),
    ('base = "int3"\n[head]\ngroup_size = 32', 'base is "int3", not "fp32"'),
    ('float = "fp8"', 'float is "fp8", not "fp32" or "fp16"'),
    ("name = 3", "name is 3, not up to 64 letters"),
    ("decoder = 4", "decoder is 4, not a table: [decoder]"),
    ("layers = 4", "layers is 4, not tables: [[layers]]"),
    ("layers = [1]", "layers is [1], not tables: [[layers]]"),
    ("[layers]\nbits = 4", 'layers is {"bits": 4}, not tables: [[layers]]'),
    ("[decoder]\nbits = true", "decoder.bits is true, not 4 or 8"),
    ("[decoder]\nbits = 8.0", "decoder.bits is 8.0, not 4 or 8"),
    ("[decoder]\nbits = 3", "decoder.bits is 3, not 4 or 8"),
    ("[decoder]\nbits = '8'", 'decoder.bits is "8", not 4 or 8'),
    ("[decoder]\nbits = 8\ngroup_size = -32", 'decoder.group_size is -32, not "channel" or a'),
    ("[decoder]\nbits = 8\ngroup_size = 0", 'decoder.group_size is 0, not "channel" or a whole'),
    ("[decoder]\nbits = 8\ngroup_size = true", "decoder.group_size is true, not"),
    ("[decoder]\nbits = 8\ngroup_size = 32.0", "decoder.group_size is 32.0, not"),
    ("[decoder]\nbits = 8\ngroup_size = 'row'", 'decoder.group_size is "row", not "channel" or'),
    (f"[head]\nbits = 8\ngroup_size = {10**30}", "head.group_size is 1000000000"),
    ("[decoder]\nbits = 8\nsymmetric = 1", "decoder.symmetric is 1, not true or false"),
    ("[decoder]\nbits = 8\nmethod = 'awq'", 'decoder.method is "awq", not "rtn" or "hqq" or'),
    ("[decoder]\nbits = 8\nmethod = ['rtn']", 'decoder.method is ["rtn"], not'),
    ("[head]\nbits = 8\nactivations = 'dynamic'\nactivation_bits = 4", "head.activation_bits is 4"),
    ("base = 'int8'\nobserver = 'max'", 'observer is "max", not "minmax" or "percentile"'),
    ("percentile = nan", "percentile is NaN, not a number from 50 to 100"),
    ("percentile = -inf", "percentile is -Infinity, not a number from 50 to 100"),
    ("percentile = 0.99", "percentile is 0.99, not a number from 50 to 100"),
    ("percentile = true", "percentile is true, not a number from 50 to 100"),
    ("percentile = 99-01-01", "is not TOML"),
    ("range_limit = 65505.0", "range_limit is 65505.0, not a number from 1 to 65504"),
    ("range_limit = '1e4'", 'range_limit is "1e4", not a number'),
    ("range_limit = 1979-05-27", 'range_limit is "1979-05-27", not a number'),
    (f"range_limit = 0x{'f' * 5000}", "range_limit is a very large int, not a number"),
    ("range_limit = 0", "range_limit is 0, not a number from 1 to 65504"),
    ("[limits]\nmean_kl = nan\naccuracy_points = 1", "limits.mean_kl is NaN, not a number from 0"),
    ("[limits]\nmean_kl = 1\naccuracy_points = -1", "limits.accuracy_points is -1, not a number"),
    # impossible together
    ("[decoder]\ngroup_size = 32", "decoder.group_size needs decoder.bits: without"),
    ("[decoder]\nactivations = 'dynamic'", "decoder.activations needs decoder.bits"),
    ("[decoder]\nbits = 8\nactivations = 'static'", 'decoder.activations is "static", not "float"'),
    ("[head]\nbits = 8\nactivations = 'static'", 'head.activations is "static", not "float" or "d'),
    ("[embedding]\nbits = 8\nactivations = 'static'", 'embedding.activations is "static", not'),
    ("[embedding]\nbits = 8\nactivations = 'dynamic'", 'embedding.activations is "dynamic", not'),
    ("[vision]\nbits = 8\nactivations = 'dynamic'", 'vision.activations is "dynamic", not "float"'),
    ("[vision]\nbits = 8\nmethod = 'gptq'", 'vision.method is "gptq", not "rtn" or "palette" (all'),
    ("[vision]\nbits = 8\nmethod = 'hqq'", 'vision.method is "hqq", not "rtn" or "palette" (all'),
    ("[embedding]\nbits = 8\nmethod = 'gptq'", 'embedding.method is "gptq", not "rtn" or "hqq"'),
    ("[decoder]\nbits = 8\nactivation_bits = 8", "decoder.activation_bits needs decoder.activ"),
    ("[decoder]\nbits = 8\nkeep = true", "decoder.bits and decoder.keep = true contradict"),
    ("[decoder]\nkeep = 1", "decoder.keep is 1, not true or false"),
    ("observer = 'histogram'", 'observer counts for "static" and "symmetric" activations only'),
    ("base = 'int8'\npercentile = 99", 'percentile needs observer = "percentile", not "minmax"'),
    ("base = 'int8'\nrange_limit = 99", 'range_limit needs float = "fp16", not "fp32"'),
    # lookup tables
    (f"[vision]\n{TABLES}\nbits = 5", "vision.bits is 5, not 1 or 2 or 3 or 4 or 6 or 8"),
    (f"[vision]\n{TABLES}\nbits = 4\nsymmetric = true", "vision.symmetric says nothing about"),
    (f"[vision]\n{TABLES}\nbits = 4\nsymmetric = false", "vision.symmetric says nothing about"),
    (f"[head]\n{TABLES}\nbits = 4\nsymmetric = 1", "head.symmetric is 1, not true or false"),
    (f"[decoder]\n{TABLES}", "decoder.method needs decoder.bits: without"),
    (
        f"base = 'int8'\n[vision]\n{TABLES}\nactivations = 'static'",
        'vision.activations is "static", not "float" (all there is beside lookup tables)',
    ),
    (
        f"[head]\n{TABLES}\nbits = 4\ngroup_size = 'channel'",
        'head.group_size is "channel", not "tensor" or a whole number from 1',
    ),
    ("[head]\nbits = 4\ngroup_size = 'tensor'", 'head.group_size is "tensor", not "channel" or'),
    ("base = 'lut6'\n[head]\nmethod = 'rtn'", "head.bits is missing: rtn has no 6, as the base"),
    ("base = 'lut4'\n[head]\nbits = 5", "head.bits is 5, not 1 or 2 or 3 or 4 or 6 or 8"),
    ("base = 'lut4'\n[head]\nactivations = 'dynamic'", 'head.activations is "dynamic", not "fl'),
    # rules
    ("[[layers]]\nbits = 8", "layers[1].pattern is missing"),
    ("[decoder]\nbits = 4\nscale_format = 'fp8'", 'decoder.scale_format is "fp8", not "float" or'),
    ("[decoder]\nscale_format = 'bf16'", "decoder.scale_format needs decoder.bits: without"),
    (
        "[vision]\nbits = 8\nscale_format = 'bf16'",
        'vision.scale_format is "bf16", not "float" (all that vision layers can have)',
    ),
    (
        f"[head]\n{TABLES}\nbits = 4\nscale_format = 'bf16'",
        "head.scale_format says nothing about lookup tables",
    ),
    ("[[layers]]\npattern = 3\nbits = 8", "layers[1].pattern is 3, not a pattern of layer names"),
    ("[[layers]]\npattern = ''\nbits = 8", 'layers[1].pattern is "", not a pattern'),
    ("[[layers]]\npattern = 'a\"b'\nbits = 8", "layers[1].pattern is "),
    ("[[layers]]\npattern = 'projector'", 'layers["projector"].bits is missing, or keep = true'),
    ("[[layers]]\npattern = '*.fc1'\nbits = 8", 'layers["*.fc1"].pattern could match layers of'),
    ("[[layers]]\npattern = 'decoder.*'\nkeep = true", 'layers["decoder.*"].pattern could match'),
    ("[[layers]]\npattern = 'tower.*'\nbits = 8", 'layers["tower.*"].pattern matches no layer'),
    ("[[layers]]\npattern = 'projector*'\nbits = 5", 'layers["projector*"].bits is 5, not 4 or 8'),
    (
        "[[layers]]\npattern = 'projector*'\nbits = 8\nactivations = 'dynamic'",
        'layers["projector*"].activations is "dynamic", not "float" or "static" or "symmetric" or ',
    ),
    (
        2 * "[[layers]]\npattern = 'projector*'\nbits = 8\n",
        'layers["projector*"].pattern is there twice',
    ),
    (
        "[[layers]]\npattern = 'decoder.layers.*'\nkeep = true\nbits = 8",
        'layers["decoder.layers.*"].bits and layers["decoder.layers.*"].keep = true contradict',
    ),
]


@pytest.mark.parametrize(("text", "expected"), ONE_PROBLEM)
def test_one_problem(text: str, expected: str, tmp_path: Path) -> None:
    if "is not TOML" in expected:
        with pytest.raises(ExportError, match=expected):
            recipe_of(tmp_path, text)
        return
    found = problem(tmp_path, text)
    print(found)
    assert found.startswith(expected)
    assert found.isascii()
    assert found.isprintable()


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = """
        bas = "int4"
        float = "fp64"
        [decoder]
        bits = 7
        group_size = -1
        [embedding]
        method = "gptq"
        [[layers]]
        pattern = "*"
        bits = 0
        [limits]
        mean_kl = "small"
        accuracy_points = 1
    """
    found = problems(tmp_path, text)
    print("\n".join(found))
    keys = [line.split(" ")[0] for line in found]
    assert sorted(keys) == [
        "bas",
        "decoder.bits",
        "decoder.group_size",
        "embedding.method",
        "embedding.method",  # gptq is not for it, and it has no bits
        "float",
        'layers["*"].bits',
        'layers["*"].pattern',
        "limits.mean_kl",
    ]


def test_very_many_problems_are_counted(tmp_path: Path) -> None:
    found = problems(tmp_path, "\n".join(f"x{number} = 1" for number in range(1000)))
    assert len(found) == recipe_file.SHOWN_PROBLEMS + 1
    assert found[-1] == "and 980 more"


def message(path: Path) -> str:
    with pytest.raises(ExportError) as raised:
        read(path)
    assert raised.value.hint
    return raised.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "folder.toml").mkdir()
    assert message(tmp_path / "mien.toml").endswith("mien.toml. Did you mean 'mine.toml'?")
    assert "There is no recipe file" in message(tmp_path / "nowhere" / "x.toml")
    assert "is a folder" in message(tmp_path / "folder.toml")
    assert "cannot be read" in message(tmp_path / "a\0b.toml")
    assert "cannot be read" in message(tmp_path / ("x" * 300 + ".toml"))
    assert "cannot be read" in message(tmp_path / "mine.toml" / "x.toml")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    path.chmod(0)
    assert "Permission denied" in message(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'name = "mine"\nbits 4', "is not TOML: Expected '=' after a key in a key/value pair (at"),
        (b"\n\n[decoder\n", "line 3"),
        (b"a = 1\na = 2\nb = 3", "is not TOML: Cannot overwrite a value (at line 2"),
        (b'name = "\xff"', "is not UTF-8 text (byte 8)"),
        ('base = "int4"'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
        (b"\0", "is not TOML"),
        (b"PK\x03\x04", "is not TOML"),
        (b"#" * (LARGEST_FILE + 1), "is larger than 1048576 bytes"),
        (b"a = " + b"[" * 100000, "is nested too deeply"),
        (b"a = " + b"1" * 5000, "is not TOML"),
        (b"a = 2026-13-45", "is not TOML"),
        (b'{"base": "int4"}', "is not TOML"),
    ],
)
def test_files_that_are_no_toml(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    found = message(tmp_path / "mine.toml")
    print(found)
    assert expected in found
    assert len(found) < 300


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'\xef\xbb\xbfbase = "int4"\r\n[head]\r\nbits = 8\r\n')
    assert read(tmp_path / "mine.toml") == dataclasses.replace(RECIPES["int4"], name="mine")


def test_find(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "int8"')
    (tmp_path / "OLD.TOML").write_text('base = "int4"')
    assert find("int8") is RECIPES["int8"]
    assert find(str(tmp_path / "mine.toml")).decoder == RECIPES["int8"].decoder
    assert find(str(tmp_path / "OLD.TOML")).name == "OLD"
    for wrong in ("int88", str(tmp_path / "mine"), str(tmp_path), "", "a\0b"):
        with pytest.raises(ExportError, match="There is no recipe named"):
            find(wrong)


# Fuzzing: whatever a file holds, it is a recipe or an ExportError.

SCALARS = st.one_of(
    st.sampled_from(
        ("nan", "inf", "-inf", "true", "false", "0", "-1", "4", "8", "32", "99.9", "1e400", "[]")
    ),
    st.sampled_from(('"fp16"', '"int4"', '"channel"', '"static"', '"gptq"', '"percentile"', '""')),
    st.sampled_from(('"lut6"', '"palette"', '"tensor"', '"rtn"', "6", "3")),
    st.sampled_from(("{}", "[{}]", "[1]", "1979-05-27", "07:32:00", "0xffff", "{bits = 4}")),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(st.characters(codec="ascii", exclude_characters="'", min_codepoint=32)).map(
        "'{}'".format
    ),
)
KEYS = st.sampled_from(
    (
        *("name", "base", "float", "observer", "percentile", "range_limit", *Part),
        *("layers", "limits", "bits", "group_size", "symmetric", "method", "activations"),
        *("activation_bits", "pattern", "keep", "mean_kl", "accuracy_points", "x", '"a b"'),
    )
)
HEADERS = st.sampled_from(
    ("", *(f"[{part}]" for part in Part), "[[layers]]", "[limits]", "[layers]", "[x.y]")
)
ASSIGNMENTS = st.tuples(KEYS, SCALARS).map(" = ".join)
LINES = st.lists(ASSIGNMENTS | HEADERS, max_size=12).map("\n".join)


def is_recipe_or_error(path: Path) -> None:
    try:
        recipe = read(path)
    except ExportError as error:
        assert len(error.message) < 20000
        return
    assert recipe == Recipe.from_dict(recipe.to_dict())
    assert (recipe.limits is not None) or not recipe.quantized
    path.write_text(write(recipe))
    assert read(path) == recipe


@settings(one_file, max_examples=500)
@given(text=LINES)
@example(text='float = "fp16"\nrange_limit = 1e400')
def test_any_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    is_recipe_or_error(tmp_path / "mine.toml")


@one_file
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    is_recipe_or_error(tmp_path / "mine.toml")


@one_file
@given(recipe=strategies.recipes(), data=st.data())
def test_recipes_with_a_piece_cut_out(recipe: Recipe, data: st.DataObject, tmp_path: Path) -> None:
    text = write(recipe)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    (tmp_path / "mine.toml").write_text(text[:start] + text[end:])
    is_recipe_or_error(tmp_path / "mine.toml")


def test_a_limit_of_each_float_format_is_there() -> None:
    """`read` takes the limits of the built-in named like the format."""
    assert {format_.value for format_ in Float} <= RECIPES.keys()
