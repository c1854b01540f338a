"""Three small ONNX graphs with the interface of FastVLM's, and the plan that builds them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastvlm_export.exporter import bundle as bundles
from fastvlm_export.exporter.bundle import Bundle, Manifest, Source
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import tensorrt
from fastvlm_export.targets.tensorrt_build import build, write_plan
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import (
    ATTENDED,
    GRAPHS,
    NEW,
    GraphPlan,
    Plan,
    engine_file,
    onnx_file,
    profiles,
)

CONTEXT, WIDTH, VOCABULARY = 32, 16, 24
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}

Dims = Sequence[int | str]


def tensor(name: str, dtype: str, dims: Dims) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[dtype], list(dims))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray[Any, Any]],
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def vision(dtype: str = "float32") -> onnx.ModelProto:
    """pixel_values -> Conv, in `dtype` -> image_features."""
    kernel = np.random.default_rng(0).standard_normal((WIDTH, 3, 4, 4)).astype(dtype)
    nodes = [
        helper.make_node("Cast", ["pixel_values"], ["pixels"], "tower/Cast", to=TYPES[dtype]),
        helper.make_node("Conv", ["pixels", "kernel"], ["patches"], "tower/Conv", strides=[4, 4]),
        helper.make_node("Reshape", ["patches", "sizes"], ["rows"], "tower/Reshape"),
        helper.make_node("Transpose", ["rows"], ["turned"], "tower/Transpose", perm=[0, 2, 1]),
        helper.make_node("Cast", ["turned"], ["image_features"], "tower/Cast_2", to=1),
    ]
    return model(
        nodes,
        [tensor("pixel_values", "float32", (1, 3, 8, 8))],
        [tensor("image_features", "float32", (1, 4, WIDTH))],
        {"kernel": kernel, "sizes": np.array([1, WIDTH, 4])},
    )


def embedding() -> onnx.ModelProto:
    table = np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    return model(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"], "table/Gather")],
        [tensor("input_ids", "int64", (1, NEW))],
        [tensor("inputs_embeds", "float32", (1, NEW, WIDTH))],
        {"table": table},
    )


def decoder() -> onnx.ModelProto:
    """The last row of the embeddings times a matrix, scaled by how many positions are valid."""
    head = np.random.default_rng(2).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["inputs_embeds", "last"], ["row"], "head/Gather", axis=1),
        helper.make_node("MatMul", ["row", "matrix"], ["scores"], "head/MatMul"),
        helper.make_node("ReduceSum", ["attention_mask", "axes"], ["valid"], "mask/ReduceSum"),
        helper.make_node("Cast", ["valid"], ["count"], "mask/Cast", to=1),
        helper.make_node("Unsqueeze", ["count", "axes"], ["factor"], "mask/Unsqueeze"),
        helper.make_node("Mul", ["scores", "factor"], ["logits"], "head/Mul"),
    ]
    return model(
        nodes,
        [
            tensor("inputs_embeds", "float32", (1, NEW, WIDTH)),
            tensor("attention_mask", "int64", (1, ATTENDED)),
        ],
        [tensor("logits", "float32", (1, 1, VOCABULARY))],
        {"matrix": head, "last": np.array([-1]), "axes": np.array([1])},
    )


def signature(values: Sequence[onnx.ValueInfoProto]) -> dict[str, str]:
    """Name -> "float32[1,sequence_length,16]"."""
    found = {}
    for value in values:
        one = value.type.tensor_type
        sizes = ",".join(dim.dim_param or str(dim.dim_value) for dim in one.shape.dim)
        found[value.name] = f"{helper.tensor_dtype_to_np_dtype(one.elem_type)}[{sizes}]"
    return found


def graph_plan(name: str, graph: onnx.ModelProto, **changes: Any) -> GraphPlan:
    inputs, outputs = signature(graph.graph.input), signature(graph.graph.output)
    return GraphPlan(
        onnx=onnx_file(name),
        engine=engine_file(name),
        inputs=inputs,
        outputs=outputs,
        profiles=profiles(inputs, CONTEXT, 4),
        **changes,
    )


def folder(out: Path, *, float_type: str = "float32", **graphs: onnx.ModelProto) -> Plan:
    """Write the ONNX files and the plan of a bundle below `out`; `graphs` stand for the toys."""
    models = {"vision": vision(), "embedding": embedding(), "decoder": decoder(), **graphs}
    (out / "onnx").mkdir(parents=True)
    for name, one in models.items():
        (out / onnx_file(name)).write_bytes(one.SerializeToString(deterministic=True))
    plan = Plan(
        backend=Backend.RTX,
        compute_capabilities=("80", "120"),
        float_type=float_type,
        context=CONTEXT,
        graphs={name: graph_plan(name, models[name]) for name in GRAPHS},
    )
    write_plan(out, plan)
    return plan


def bundle(out: Path, *, engines: bool = True, recipe: str = "fp32", **graphs: Any) -> Bundle:
    """A whole bundle of the toys, its engines built."""
    plan = folder(out, **graphs)
    record = build(out, lambda _: None, engines=engines)
    return sealed(
        out,
        artifact=tensorrt.details(record),
        graphs={
            name: {"inputs": one.inputs, "outputs": one.outputs}
            for name, one in plan.graphs.items()
        },
        recipe=RECIPES[recipe].to_dict(),
    )


def sealed(out: Path, **changes: Any) -> Bundle:
    """Write the manifest anew, with the hashes of what is there now; `changes` are its fields'."""
    if (out / bundles.MANIFEST).exists():
        values = Manifest.from_json((out / bundles.MANIFEST).read_text()).__dict__
    else:
        values = {
            "schema": bundles.SCHEMA,
            "source": Source(name="toy", layout="random", sha256="0" * 64),
            "target": "tensorrt",
            "quantization": {},
            "resolution": 8,
            "context": CONTEXT,
            "image_tokens": 4,
            "preprocessing": Preprocessing(
                strategy=Strategy.PAD, resolution=8, mean=(0, 0, 0), std=(1, 1, 1)
            ),
            "prompt_template": "qwen_2",
            "image_token": "<image>",
            "image_token_id": 1,
            "eos_token_ids": (0,),
            "model": {},
            "versions": {},
        }
    manifest = Manifest(**{**values, **changes, "files": bundles.files_of(out)})
    (out / bundles.MANIFEST).write_text(manifest.to_json())
    return bundles.open_bundle(out)
