"""A toy ExecuTorch bundle, its eager answer, and an `adb` that has a folder for a phone."""

import sys
import textwrap

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from fastvlm_export.exporter import prompt
from fastvlm_export.exporter.bundle import MANIFEST, SCHEMA, Bundle, Manifest, Source, files_of
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.samples import Sample
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, PROGRAM, VISION

RESOLUTION, IMAGE_TOKENS, WIDTH, CONTEXT = 8, 3, 16, 256
IMAGE_TOKEN_ID = 300  # beyond the embedding: a runner that looks it up fails
SERIAL = "emulator-5554"


class Vision(nn.Module):
    """[1,3,R,R] -> [1,N,D]."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3 * RESOLUTION * RESOLUTION // IMAGE_TOKENS, WIDTH)

    def forward(self, pixels):
        return self.project(pixels.reshape(1, IMAGE_TOKENS, -1))


class Embedding(nn.Module):
    """[1,S] -> [1,S,D]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)

    def forward(self, ids):
        return self.table(ids)


class Decoder(nn.Module):
    """Logits of all that was seen, later positions weighing more: order and cache matter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("cache", torch.zeros(CONTEXT, WIDTH))

    def forward(self, embeds, position):
        self.cache.index_put_((position,), embeds[0])
        age = (position[-1:] - torch.arange(CONTEXT)).float()
        weights = torch.where(age >= 0, torch.exp(-0.5 * age), 0.0)
        return self.head((self.cache * weights[:, None]).sum(0))[None, None]


def modules():
    torch.manual_seed(3)
    return Vision().eval(), Embedding().eval(), Decoder().eval()


def program():
    """The toy as a .pte of portable operators."""
    from executorch.exir import to_edge  # noqa: PLC0415 - only what lowers needs it

    size = torch.export.Dim("size", min=1, max=CONTEXT)
    ids, rows = torch.zeros(1, 3, dtype=torch.int64), torch.randn(1, 3, WIDTH)
    pixels = torch.randn(1, 3, RESOLUTION, RESOLUTION)
    examples = (
        ((pixels,), None),
        ((ids,), ({1: size},)),
        ((rows, torch.arange(3)), ({1: size}, {0: size})),
    )
    with torch.no_grad():
        exported = {
            name: torch.export.export(module, inputs, dynamic_shapes=shapes)
            for name, module, (inputs, shapes) in zip(
                (VISION, EMBEDDING, DECODER), modules(), examples, strict=True
            )
        }
    constants = {"get_max_seq_len": CONTEXT, "get_max_context_len": CONTEXT}
    return to_edge(exported, constant_methods=constants).to_executorch().buffer


@torch.no_grad()
def eager(pixels, ids, new_tokens):
    """The tokens that the toy gives, by PyTorch: the first and `new_tokens` more."""
    vision, embedding, decoder = modules()
    ids = torch.tensor([ids])
    embeds = embedding(torch.where(ids == IMAGE_TOKEN_ID, 0, ids))
    embeds[ids == IMAGE_TOKEN_ID] = vision(torch.from_numpy(pixels))[0]
    tokens, length = [], 0
    for _ in range(new_tokens + 1):
        logits = decoder(embeds, torch.arange(length, length + embeds.shape[1]))
        length += embeds.shape[1]
        tokens.append(int(logits.flatten().argmax()))
        embeds = embedding(torch.tensor([tokens[-1:]]))
    return tokens


def write_bundle(folder, content, **changes):
    """A bundle of the toy, with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    (folder / PROGRAM).write_bytes(content)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: i for i, one in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "schema": SCHEMA,
        "source": Source(name="toy", layout="random", sha256="0" * 64),
        "target": "executorch",
        "recipe": {"name": "fp32"},
        "quantization": {},
        "resolution": RESOLUTION,
        "context": CONTEXT,
        "image_tokens": IMAGE_TOKENS,
        "preprocessing": Preprocessing(strategy=Strategy.PAD, resolution=RESOLUTION),
        "prompt_template": prompt.TEMPLATE,
        "image_token": prompt.IMAGE_TOKEN,
        "image_token_id": IMAGE_TOKEN_ID,
        "eos_token_ids": (255,),
        "model": {},
        "graphs": {},
        "versions": {},
        "files": files_of(folder),
        "artifact": {"backend": "portable"},
    }
    manifest = Manifest(**(values | changes))
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle(path=folder, manifest=manifest)


def sample():
    values = np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3)
    return Sample(name="toy", image=Image.fromarray(values), question="Why?")


# `adb` as far as the bench needs it: a device's /data/local/tmp is a folder, its shell is sh, and
# what only Android has (getprop, dumpsys, its df) is in the folder bin.
ADB = """
import os, pathlib, subprocess, shutil, sys, time
root = pathlib.Path({root!r})
with (root / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
fault = (root / "fault").read_text() if (root / "fault").exists() else ""
here = lambda text: text.replace("/data/local/tmp", str(root / "tmp"))
match sys.argv[1:]:
    case ["devices"]:
        print("List of devices attached")
        print((root / "devices").read_text())
    case ["-s", serial, "push", source, target]:
        assert serial == {serial!r}, serial
        if fault == "full":
            sys.exit(f"adb: error: failed to copy '{{source}}': No space left on device")
        shutil.copy(source, here(target))
    case ["-s", serial, "shell", command]:
        assert serial == {serial!r}, serial
        if fault == "gone" and "exec" in command:
            sys.exit(f"adb: device '{{serial}}' not found")
        path = str(root / "bin") + ":" + os.environ["PATH"]
        done = subprocess.run(["sh", "-c", here(command)], env=os.environ | {{"PATH": path}})
        sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
    case other:
        sys.exit(f"adb: unknown command {{other}}")
"""
ANDROID = {
    "getprop": """
        [ro.product.manufacturer]: [Toys]
        [ro.product.model]: [Phone 1]
        [ro.build.version.release]: [16]
        [ro.soc.manufacturer]: [Paper]
        [ro.soc.model]: [P1]
        [ro.product.cpu.abilist]: [x86_64,x86]
        """,
    "dumpsys": "IsStatusOverride: false\nThermal Status: 0\n",
    "df": """
        Filesystem     1K-blocks   Used Available Use% Mounted on
        /dev/block/dm-9 10000000 500000   9500000   6% /data
        """,
}


def plug_in(root, folder):
    """Put an `adb` into `folder` whose only device lives in `root`."""
    for name in ("bin", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "devices").write_text(f"{SERIAL}\tdevice\n")
    for name, text in ANDROID.items():
        say(root, name, text)
    folder.mkdir(parents=True)
    # Isolated and without site-packages: it starts many times.
    _script(folder / "adb", f"{sys.executable} -IS", ADB.format(root=str(root), serial=SERIAL))
    return root


def say(root, name, text):
    """Let a command of the device print something."""
    lines = textwrap.dedent(text).strip()
    _script(root / "bin" / name, "/bin/sh", f"cat <<'END'\n{lines}\nEND")


def _script(path, interpreter, code):
    path.write_text(f"#!{interpreter}\n{code}\n")
    path.chmod(0o755)
