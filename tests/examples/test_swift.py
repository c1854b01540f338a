"""The Swift sample can't be compiled here: its names and its prompt are held against ours."""

import json
import re
from pathlib import Path

import pytest

from fastvlm_export.exporter import prompt
from fastvlm_export.exporter.bundle import SCHEMA, Manifest, Source
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.targets import TargetName, coreml
from fastvlm_export.targets import coreml_model as names
from fastvlm_export.targets.coreml_session import COMPUTE_UNITS, OLDEST_MACOS

FOLDER = Path(__file__).parents[2] / "examples" / "swift"
SOURCES = {path.stem: path.read_text("utf-8") for path in FOLDER.rglob("Sources/**/*.swift")}
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
PACKAGES = {names.VISION, names.EMBEDDING, names.DECODER}
FUNCTIONS = {names.PREFILL, names.DECODE}
TENSORS = {
    names.PIXELS,
    names.FEATURES,
    names.IDS,
    names.EMBEDS,
    names.POSITION,
    names.LENGTH,
    names.LOGITS,
}


def code(stem):
    """A source without its comments."""
    return re.sub(r"//.*", "", SOURCES[stem])


def literals(text):
    return LITERAL.findall(text)


def struct(stem, name):
    """The body of a struct or an enum, without what is nested in it."""
    text = code(stem)
    start = text.index("{", re.search(rf"(struct|enum) {name}\b", text).end())
    body, depth = [], 0
    for character in text[start:]:
        depth += character == "{"
        if depth == 1:
            body.append(character)
        depth -= character == "}"
        if not depth:
            return "".join(body)
    raise AssertionError(f"{name} does not end")


def fields(stem, name):
    """JSON key -> Swift type of each stored property of a Decodable struct."""
    types = dict(re.findall(r"let (\w+): ([^\n=]+?)\s*\n", struct(stem, name)))
    keys = {}
    if coding := re.search(rf"struct {name}\b.*?enum CodingKeys[^{{]*{{(.*?)}}", code(stem), re.S):
        keys = dict(re.findall(r'case (\w+) = "(\w+)"', coding.group(1)))
        plain = re.findall(r"case ([\w, ]+)\n", coding.group(1))
        assert set(types) == set(keys) | {one for line in plain for one in re.split(r",\s*", line)}
    return {keys.get(name, name): kind for name, kind in types.items()}


@pytest.fixture(scope="module")
def manifest():
    """A manifest as JSON has it."""
    values = Manifest(
        schema=SCHEMA,
        source=Source(name="toy", layout="random", sha256="0" * 64),
        target=TargetName.COREML,
        recipe={"name": "fp16"},
        quantization={},
        resolution=1024,
        context=2048,
        image_tokens=256,
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=1024),
        prompt_template=prompt.TEMPLATE,
        image_token=prompt.IMAGE_TOKEN,
        image_token_id=9,
        eos_token_ids=(1, 2),
        model={},
        graphs={},
        versions={},
        files={},
        artifact={"layout": coreml.LAYOUT, "prefill_chunk": coreml.CHUNK},
    )
    return json.loads(values.to_json())


def fits(value, kind):
    """Whether Swift's JSONDecoder makes such a value of that type."""
    if kind.startswith("["):
        return isinstance(value, list) and all(fits(one, kind[1:-1]) for one in value)
    if kind == "Int":
        return isinstance(value, int)
    if kind == "Double":
        return isinstance(value, int | float)
    if kind == "String":
        return isinstance(value, str)
    return kind in {"Preprocessing", "Artifact", "Strategy"}


@pytest.mark.parametrize(
    ("stem", "name", "part"),
    [
        ("Manifest", "Manifest", None),
        ("Manifest", "Artifact", "artifact"),
        ("Preprocessing", "Preprocessing", "preprocessing"),
    ],
)
def test_every_key_it_reads_is_in_a_manifest_with_a_value_of_its_type(manifest, stem, name, part):
    found = fields(stem, name)
    values = manifest[part] if part else manifest
    assert found
    for key, kind in found.items():
        assert key in values, key
        assert fits(values[key], kind), (key, kind, values[key])


def test_it_knows_every_way_to_make_an_image_square():
    assert set(re.findall(r"case (\w+)", struct("Preprocessing", "Strategy"))) == set(Strategy)


def test_it_accepts_exactly_the_bundles_that_are_written():
    guard = re.search(r"guard (schema.*?)else", code("Manifest"), re.S).group(1)
    found = dict(re.findall(r'([\w.]+) == "?(\w+)"?', guard))
    assert found == {
        "schema": str(SCHEMA),
        "target": TargetName.COREML,
        "artifact.layout": coreml.LAYOUT,
        "promptTemplate": prompt.TEMPLATE,
        "preprocessing.resampling": Preprocessing(strategy=Strategy.PAD, resolution=1).resampling,
    }


def test_packages_functions_and_tensors_have_our_names():
    found = {one for one in literals(code("FastVLM")) if " " not in one}
    assert found == PACKAGES | FUNCTIONS | TENSORS


def test_each_function_is_given_its_inputs_and_asked_for_its_output():
    text = code("FastVLM")
    asked = [
        re.findall(rf'"({"|".join(TENSORS)})"', body)
        for body in re.split(r"\bfunc ", text)
        if "prediction(" in body
    ]
    assert asked == [
        [names.PIXELS, names.FEATURES],
        [names.IDS, names.EMBEDS],
        [names.EMBEDS, names.POSITION, names.LENGTH, names.LOGITS],
    ]


def test_its_prompt_is_the_one_that_bundles_are_proven_with():
    texts = [one for one in literals(code("Demo")) if "<|im_start|>" in one]
    question = "What is 2 + 2?"
    said = [json.loads(f'"{one.replace(chr(92) + "(question)", question)}"') for one in texts]
    assert said == prompt.qwen_2_prompt(question).split(prompt.IMAGE_TOKEN)


def test_it_offers_the_compute_units_of_bench():
    choices = re.search(r"let choices.*?\[\n(.*?)\]", code("Demo"), re.S).group(1)
    assert tuple(literals(choices)) == COMPUTE_UNITS
    usage = next(one for one in literals(code("Demo")) if one.startswith("Usage"))
    assert "|".join(COMPUTE_UNITS) in usage


def test_it_is_built_for_the_system_that_the_packages_need():
    package = (FOLDER / "Package.swift").read_text("utf-8")
    assert f".macOS(.v{OLDEST_MACOS})" in package
    target = re.search(r'executableTarget\(\s*name: "(\w+)"', package).group(1)
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert (FOLDER / "Sources" / target).is_dir()
    assert f".build/release/{target} " in readme


def test_its_readme_names_its_files_and_that_nothing_has_compiled_them():
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+)\.swift`", readme)) == set(SOURCES)
    assert "Not compiled yet" in readme
