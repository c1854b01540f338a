"""The stages a FastVLM is trained in, each a function that changes the model it is given.

(0) tower on dense labels, decoder on text; (1) projector alone; (1.5) everything on captions;
(2) instruction tuning.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import corpus
import torch
from corpus import IGNORED, Images, Writer
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.validate import digits
from fastvlm_export.validate.digits import Kind

NOTHING = 10  # the class of a cell or slot without a digit
_COLOURS = tuple(digits.COLOURS)
_REPORT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How long and how fast one stage learns; `rate` is the peak, `floor` the last part of it."""

    name: str
    steps: int
    batch: int
    rate: float
    floor: float = 0.02
    height: int = digits.RESOLUTION
    width: int = digits.RESOLUTION
    warmup: float = 0.1


Figures = dict[str, float]
Step = Callable[[], tuple[Tensor, Figures]]


def fit(stage: Stage, modules: Iterable[nn.Module], step: Step) -> Figures:
    """Minimize what `step` returns with AdamW; returns the mean figures of the last report.

    Rate: linear warm-up, then half a cosine from `rate` to `floor * rate`. Only matrices decay.
    """
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _share(stage, done + 1))
    began = time.monotonic()
    sums: Figures = {}
    figures: Figures = {}
    for index in range(1, stage.steps + 1):
        loss, seen = step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {index}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for name, value in {"loss": loss.item(), **seen}.items():
            sums[name] = sums.get(name, 0.0) + value / _REPORT_EVERY
        if index % _REPORT_EVERY == 0:
            figures, sums = {name: round(value, 5) for name, value in sums.items()}, {}
            print(f"{stage.name} {index}/{stage.steps} {json.dumps(figures)}", flush=True)
    return {**figures, "seconds": round(time.monotonic() - began, 1)}


def _share(stage: Stage, step: int) -> float:
    """Return the part of the peak rate at a step counted from one."""
    progress = step / stage.steps
    if progress < stage.warmup:
        return progress / stage.warmup
    along = (progress - stage.warmup) / (1 - stage.warmup)
    return stage.floor + (1 - stage.floor) * (1 + math.cos(math.pi * along)) / 2


class TowerHeads(nn.Module):
    """What the tower is asked before it has a decoder: thrown away after the pretraining.

    `cells` says which digit has its centre in each 32-pixel cell, `slots` reads the number left to
    right from the final map, `colour` names the background from its mean.
    """

    def __init__(self, width: int, features: int, cells: int, slots: int) -> None:
        super().__init__()
        self.count = slots
        self.cells = nn.Conv2d(width, NOTHING + 1, 1)
        self.slots = nn.Linear(features * cells, slots * (NOTHING + 1))
        self.colour = nn.Linear(features, len(_COLOURS))

    def forward(self, late: Tensor, final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """late [B,width,H/32,W/32], final [B,features,H/64,W/64] -> logits of the three."""
        slots = self.slots(final.flatten(1)).unflatten(1, (self.count, NOTHING + 1))
        return self.cells(late), slots, self.colour(final.mean((2, 3)))


def pretrain_tower(model: FastVLM, stage: Stage, longest: int, rng: random.Random) -> Figures:
    """Teach the tower to find and tell digits; labels are dense, so few steps go far."""
    tower = model.vision_tower.train()
    widths = model.config.tower.stages
    cells = (stage.height // 64) * (stage.width // 64)
    heads = TowerHeads(widths[-2].width, model.config.tower.features, cells, longest)
    blocks = [layer for layer in tower.network if isinstance(layer, nn.Sequential)]
    seen: list[Tensor] = []
    hook = blocks[-2].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = 0.3  # most cells are empty

    def step() -> tuple[Tensor, Figures]:
        batch = corpus.draw(
            rng, stage.batch, height=stage.height, width=stage.width, longest=longest
        )
        final = tower(batch.pixels)
        cell, slot, colour = heads(seen.pop(), final)
        cell_labels, slot_labels, colour_labels = _dense_labels(batch, longest)
        loss = (
            F.cross_entropy(cell, cell_labels, weight=weight)
            + F.cross_entropy(slot.flatten(0, 1), slot_labels.flatten())
            + F.cross_entropy(colour, colour_labels)
        )
        found = cell_labels != NOTHING
        return loss, {
            "cells": (cell.argmax(1) == cell_labels)[found].float().mean().item(),
            "numbers": (slot.argmax(2) == slot_labels).all(1).float().mean().item(),
            "colours": (colour.argmax(1) == colour_labels).float().mean().item(),
        }

    figures = fit(stage, (tower, heads), step)
    hook.remove()
    return figures


def _dense_labels(batch: Images, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [B,H/32,W/32], slots [B,longest] and colours [B] of a batch."""
    count, _, height, width = batch.pixels.shape
    cells = torch.full((count, height // 32, width // 32), NOTHING)
    slots = torch.full((count, longest), NOTHING)
    for row, scene in enumerate(batch.scenes):
        for position, (digit, (x, y)) in enumerate(zip(scene.digits, scene.centres, strict=True)):
            cells[row, int(y // 32), int(x // 32)] = int(digit)
            slots[row, position] = int(digit)
    colours = torch.tensor([_COLOURS.index(scene.colour) for scene in batch.scenes])
    return cells, slots, colours


def language_loss(
    model: FastVLM, turns: list[tuple[list[int], list[int], list[int]]], features: Tensor | None
) -> tuple[Tensor, Figures]:
    """Cross entropy of the answers; `features` [B,N,D] go between the two parts of each prompt.

    Also the share of answers whose every token is the most likely one.
    """
    before = torch.tensor([turn[0] for turn in turns])
    after = corpus.pad([turn[1] + turn[2] for turn in turns], 0)
    parts = [model.embed(before), model.embed(after)]
    if features is not None:
        parts.insert(1, features)
    inputs = torch.cat(parts, dim=1)
    labels = torch.full(inputs.shape[:2], IGNORED)
    start = inputs.shape[1] - after.shape[1]
    for row, (_, prompt, answer) in enumerate(turns):
        first = start + len(prompt)
        labels[row, first : first + len(answer)] = torch.tensor(answer)
    logits, labels = model(inputs)[:, start:-1], labels[:, start + 1 :]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    right = (logits.argmax(2) == labels) | (labels == IGNORED)
    return loss, {"answers": right.all(1).float().mean().item()}


def pretrain_decoder(model: FastVLM, stage: Stage, writer: Writer, rng: random.Random) -> Figures:
    """Teach the decoder the language: the qwen_2 prompt with a caption where the image will be."""

    def step() -> tuple[Tensor, Figures]:
        turns = []
        for _ in range(stage.batch):
            scene = corpus.imagine(rng)
            question, answer = corpus.question_and_answer(scene, _any_kind(rng))
            before, after, target = writer.turn(question, answer)
            turns.append((before, writer.ids(_told(rng, scene)) + after, target))
        return language_loss(model, turns, None)

    return fit(stage, (model.decoder.train(),), step)


def _told(rng: random.Random, scene: digits.Scene) -> str:
    """Describe a scene in words; half the time the digits have to be counted."""
    return scene.caption() if rng.random() < 0.5 else f"A {scene.colour} image: {scene.digits}."


def align_projector(model: FastVLM, stage: Stage, writer: Writer, rng: random.Random) -> Figures:
    """Stage 1: the projector alone, on captions; tower and decoder stay as they are."""
    model.vision_tower.eval()
    decoder = model.decoder.requires_grad_(False)

    def step() -> tuple[Tensor, Figures]:
        batch = corpus.draw(
            rng,
            stage.batch,
            height=stage.height,
            width=stage.width,
            longest=digits.MAX_DIGITS,
        )
        with torch.no_grad():
            tokens = model.vision_tower(batch.pixels).flatten(2).transpose(1, 2)
        turns = [writer.turn(*corpus.question_and_answer(scene, None)) for scene in batch.scenes]
        return language_loss(model, turns, model.projector(tokens))

    figures = fit(stage, (model.projector,), step)
    decoder.requires_grad_(True)
    return figures


def train_everything(
    model: FastVLM, stage: Stage, writer: Writer, rng: random.Random, *, questions: int
) -> Figures:
    """Stages 1.5 and 2: all parameters; captions only, or `questions` different kinds per image."""
    model.train()

    def step() -> tuple[Tensor, Figures]:
        batch = corpus.draw(
            rng,
            stage.batch,
            height=stage.height,
            width=stage.width,
            longest=digits.MAX_DIGITS,
        )
        turns = []
        for scene in batch.scenes:
            asked = _kinds(rng, questions) if questions else [None]
            turns += [writer.turn(*corpus.question_and_answer(scene, kind)) for kind in asked]
        features = model.encode_image(batch.pixels)
        return language_loss(
            model, turns, features.repeat_interleave(len(turns) // stage.batch, dim=0)
        )

    return fit(stage, (model,), step)


def _any_kind(rng: random.Random) -> Kind | None:
    kinds: list[Kind | None] = [*Kind, None]
    return rng.choice(kinds)


def _kinds(rng: random.Random, count: int) -> list[Kind | None]:
    """The number always, for it is the hardest; then other questions, a caption among them."""
    others: list[Kind | None] = [Kind.COUNT, Kind.COLOUR, None]
    return [Kind.NUMBER, *rng.sample(others, count - 1)]


@torch.inference_mode()
def exact_answers(model: FastVLM, writer: Writer, count: int = 300) -> Figures:
    """Share of exact greedy answers per kind on the first `count` held-out questions."""
    model.eval()
    asked = digits.evaluation_set(count)
    scenes = digits.held_out_scenes(count // 3, seed=digits.EVALUATION_SEED)
    features = torch.cat(
        [
            model.encode_image(corpus.images(scenes[i : i + 25]).pixels)
            for i in range(0, len(scenes), 25)
        ]
    )
    figures: Figures = {}
    for kind in Kind:
        chosen = [question for question in asked if question.kind is kind]
        seen = features[[question.image_index for question in chosen]]
        texts = _answer(model, writer, digits.QUESTIONS[kind], seen)
        right = [text == question.answer for text, question in zip(texts, chosen, strict=True)]
        figures[kind] = sum(right) / len(right)
    figures["all"] = sum(figures.values()) / len(figures)
    return figures


def _answer(model: FastVLM, writer: Writer, question: str, features: Tensor) -> list[str]:
    """Ask one question about every image, features [B,N,D]; greedy, without a cache."""
    before, after, _ = writer.turn(question, "")
    count = len(features)
    inputs = torch.cat(
        [
            model.embed(torch.tensor(before)).expand(count, -1, -1),
            features,
            model.embed(torch.tensor(after)).expand(count, -1, -1),
        ],
        dim=1,
    )
    written: list[Tensor] = []
    for _ in range(digits.MAX_DIGITS + 1):
        written.append(model(inputs)[:, -1].argmax(-1))
        inputs = torch.cat([inputs, model.embed(written[-1])[:, None]], dim=1)
    (end,) = writer.end
    rows = torch.stack(written, dim=1).tolist()
    return [writer.tokenizer.decode(row[: [*row, end].index(end)]) for row in rows]
