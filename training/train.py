"""Train the bundled model from nothing: `python training/train.py --seed 0 --out DIR`.

The result is a checkpoint in Apple's layout. After every stage the float32 state is kept under
DIR/stages, so that `--after STAGE` goes on where a stopped run was; every stage has its own random
stream, so the result is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import corpus
import saving
import stages
import torch
from stages import Figures, Stage
from torch import nn

from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.validate import digits

THREADS = 2

PLAN: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(name="tower-128", steps=1500, batch=32, rate=4e-3, floor=0.3, height=128, width=128),
        Stage(
            name="tower-256", steps=1400, batch=32, rate=2e-3, floor=0.3, height=128, warmup=0.02
        ),
        Stage(name="decoder", steps=700, batch=64, rate=2e-3, floor=0.1),
        Stage(name="projector", steps=300, batch=32, rate=3e-3, floor=0.1),
        Stage(name="captions", steps=900, batch=32, rate=1e-3, floor=0.3, warmup=0.05),
        Stage(name="instructions", steps=800, batch=32, rate=8e-4, warmup=0.03),
    )
}


def model_config() -> FastVLMConfig:
    """The sizes of the bundled model: about two million parameters, 16 tokens per image."""
    return FastVLMConfig(
        tower=fastvithd(
            widths=(16, 32, 64, 128, 256),
            depths=(1, 1, 2, 2, 1),
            features=512,
            se_width=32,
            head_width=0,
            train_form=True,
        ),
        decoder=DecoderConfig(
            vocab_size=corpus.EMBEDDING_ROWS,
            hidden_size=128,
            intermediate_size=384,
            layers=4,
            heads=4,
            kv_heads=2,
            head_dim=32,
            max_positions=2048,
        ),
    )


def initialize(model: FastVLM) -> None:
    """Start layer scales at one (1e-5 suits long training only), the decoder's matrices small."""
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.ones_(parameter)
    for module in model.decoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def main() -> None:
    """Run the stages in order and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--after", choices=tuple(PLAN), help="go on after this stage of DIR")
    parser.add_argument("--scale", type=float, default=1.0, help="part of each stage's steps")
    options = parser.parse_args()
    kept: Path = options.out / "stages"
    kept.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(THREADS)
    torch.manual_seed(options.seed)
    tokenizer = corpus.build_tokenizer()
    writer = corpus.Writer(tokenizer)
    model = FastVLM(model_config())
    initialize(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}, torch {torch.__version__}")

    names = list(PLAN)
    if options.after:
        model.load_state_dict(torch.load(kept / f"{options.after}.pt", weights_only=True))
        names = names[names.index(options.after) + 1 :]
        torch.manual_seed(options.seed)
    began = time.monotonic()
    for name in names:
        stage = shorten(PLAN[name], options.scale)
        rng = random.Random(f"{options.seed} {name}")  # noqa: S311 - reproducible, not secret
        figures = run_stage(model, stage, writer, rng)
        torch.save(model.state_dict(), kept / f"{name}.pt")
        torch.manual_seed(options.seed)  # so that a run that goes on from here draws the same
        if name in ("captions", "instructions"):
            saving.write_checkpoint(model, tokenizer, options.out)
            figures = {**figures, **stages.exact_answers(model, writer)}
        print(f"{name} done at {time.monotonic() - began:.0f} s: {json.dumps(figures)}", flush=True)

    reloaded = FastVLM(model_config())
    saving.read_weights(reloaded, options.out)
    print(f"as stored in bf16: {json.dumps(stages.exact_answers(reloaded, writer))}")


def run_stage(model: FastVLM, stage: Stage, writer: corpus.Writer, rng: random.Random) -> Figures:
    """Run one stage of the plan by its name."""
    actions: dict[str, Callable[[], Figures]] = {
        "tower-128": lambda: stages.pretrain_tower(model, stage, 2, rng),
        "tower-256": lambda: stages.pretrain_tower(model, stage, digits.MAX_DIGITS, rng),
        "decoder": lambda: stages.pretrain_decoder(model, stage, writer, rng),
        "projector": lambda: stages.align_projector(model, stage, writer, rng),
        "captions": lambda: stages.train_everything(model, stage, writer, rng, questions=0),
        "instructions": lambda: stages.train_everything(model, stage, writer, rng, questions=2),
    }
    return actions[stage.name]()


def shorten(stage: Stage, scale: float) -> Stage:
    """Return the stage with a part of its steps."""
    return stage if scale == 1 else replace(stage, steps=max(1, int(stage.steps * scale)))


if __name__ == "__main__":
    main()
