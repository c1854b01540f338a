"""A report with every section, of small made-up or quickly measured numbers."""

from dataclasses import replace

import numpy as np
from PIL import Image

from fastvlm_export.exporter.reparameterize import Fold
from fastvlm_export.quantize.apply import Record
from fastvlm_export.quantize.ranges import OpRange
from fastvlm_export.quantize.recipes import RECIPES, Method
from fastvlm_export.quantize.weights import LayerRecord
from fastvlm_export.validate import machine, recording
from fastvlm_export.validate.accuracy import AccuracyReport, AnswerSample
from fastvlm_export.validate.digits import Kind
from fastvlm_export.validate.latency import Backend, LatencyResult, Part, SubjectResult, Timing
from fastvlm_export.validate.loss import Answers, measure_loss
from fastvlm_export.validate.proof_types import Accuracy
from fastvlm_export.validate.report import Example, Export, File, Folding, Report
from fastvlm_export.validate.sessions import INTERPRETER, NOT_TIMED

from .fakes import Altered, case, compare, tiny_session

IMAGE = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))


def parity_result(fault=lambda x: x * np.float32(1 + 1e-6)):
    return compare(
        Altered(tiny_session(), decode=fault),
        cases=[case("digits-1.png"), case("flower.jpg", seed=1)],
        steps=4,
    )


def subject(name="onnx", scale=1.0):
    def timing(seconds):
        return Timing(seconds=tuple(scale * seconds * (1 + i / 50) for i in range(9)))

    parts = dict(zip(Part, map(timing, (0.012, 0.25, 0.14, 0.0004)), strict=True))
    return SubjectResult(
        name=name,
        backend=Backend.BUNDLE,
        setting="fp32; onnxruntime 1.31",
        load_cold=timing(1.2),
        load_warm=timing(0.3),
        load_note="cold: 12.3 MB came from disk",
        parts=parts,
        ttft=timing(0.4024),
        decode=timing(0.2),
        tokens=16,
        first_text="4",
        peak_memory_bytes=int(412e6 * scale),
    )


def latency_result(*peers):
    return LatencyResult(
        subjects=(subject(), *peers),
        machine=machine.describe(),
        threads=2,
        prompt_tokens=40,
        warmup=2,
    )


def accuracy_report(wrong=()):
    samples = [
        AnswerSample(
            image=IMAGE,
            kind=list(Kind)[i % 3],
            question=f"Question {i}?",
            expected=str(i),
            got="wrong" if i in wrong else str(i),
        )
        for i in range(30)
    ]
    return AccuracyReport(samples=tuple(samples))


def accuracy(candidate_wrong=(3,), reference_wrong=(3,), original_wrong=None, limit=0.0):
    return Accuracy(
        candidate=accuracy_report(candidate_wrong),
        reference=accuracy_report(reference_wrong),
        original=None if original_wrong is None else accuracy_report(original_wrong),
        limit=limit,
    )


def record(recipe=RECIPES["int4"], **changes):
    """What applying a recipe might have found: two layers of one kind, operators beyond fp16."""
    layers = tuple(
        LayerRecord(
            layer=name, bits=bits, group_size=group, method=Method.RTN, error=0.01 * (1 + index)
        )
        for index, (name, bits, group) in enumerate(
            [
                ("decoder.layers.0.mlp.up_proj", 4, 32),
                ("decoder.layers.1.mlp.up_proj", 4, 32),
                ("decoder.lm_head", 8, None),
            ]
        )
    )
    kept = tuple(
        OpRange(node=f"mul_{i}", op="aten.mul", layer=f"stage.{i}", entering=1e4 * i, leaving=60.0)
        for i in range(1, 4)
    )
    values = {
        "recipe": recipe,
        "layers": layers,
        "kept": {"vision": kept},
        "calibration_source": "bundled images",
        "calibration": {"flower.jpg": "ab" * 32},
    }
    return Record(**(values | changes))


def quantization_loss(fault=lambda x: x * np.float32(1.01), limits=RECIPES["int4"].limits):
    recordings = recording.record(tiny_session(), [case("digits-1.png")], 4)
    loss = measure_loss(recordings, Altered(tiny_session(), decode=fault), limits)
    answers = Answers(original=accuracy_report(()), quantized=accuracy_report(()))
    return replace(loss, answers=answers)


def quantized_report(**changes):
    values = {
        "recipe": "int4",
        "quantized": record(),
        "quantization": quantization_loss(),
        "accuracy": accuracy(candidate_wrong=(3,), reference_wrong=(3,), original_wrong=()),
    }
    return full_report(**(values | changes))


def core_ml_report(**changes):
    """A bundle that no device ran, compared in both ways."""
    values = {
        "target": "coreml",
        "recipe": "int4",
        "exact": parity_result(),
        "latency": None,
        "latency_note": NOT_TIMED,
        "runtime": INTERPRETER,
    }
    return quantized_report(**(values | changes))


def folding():
    folds = tuple(
        Fold(
            block=f"network.0.{i}",
            branches=4,
            batch_norms=5,
            layer_scales=1,
            difference=2e-7 * (i + 1),
            limit=1e-5,
        )
        for i in range(5)
    )
    return Folding(folds=folds, difference=3e-7, limit=1e-5)


def full_report(**changes):
    values = {
        "source": "fastvlm-digits",
        "target": "onnx",
        "recipe": "fp32",
        "checkpoint": {
            "layout": "apple",
            "parameters": {"tower": 2_000_000, "decoder": 1_000_000},
            "notes": ["lm_head.weight is a redundant copy"],
        },
        "reparameterization": folding(),
        "export": Export(
            seconds={"Load the checkpoint": 0.3, "Lower to onnx": 24.0},
            peak_memory_bytes=900_000_000,
            files=(
                File(path="onnx/vision_encoder.onnx", bytes=9_000_000, sha256="ab" * 32),
                File(path="tokenizer.json", bytes=21_000, sha256="cd" * 32),
            ),
        ),
        "parity": parity_result(),
        "accuracy": accuracy(),
        "latency": latency_result(subject("PyTorch eager", 3.1)),
        "examples": (
            Example(image=IMAGE, name="a.png", question="What?", reference="7", candidate="7"),
        ),
    }
    return Report(**(values | changes))
