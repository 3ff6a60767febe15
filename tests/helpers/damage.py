"""Commands on a folder of models and runs, and ways to damage what they read: each gives what does it to a folder."""

from __future__ import annotations

import json
import shutil
import zipfile

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from helpers.tiny_llama import tiny_tokenizer
from maskpro_kernels.checkpoints.logits import Logits, write_logits
from maskpro_kernels.cli import main
from maskpro_kernels.digests import digest, sealed_line

SIZES = "--batch-size 4 --seq-len 16 --calibration-batches 2 --eval-windows 2 --eval-length 24 --steps 4 --eval-every 2"
SOURCES = "--data text.txt --device cpu"
RUN = "learn --estimator reinforce --model model --output out --dtype float32 --other-data pydoc"
LEARN = f"{RUN} {SOURCES} {SIZES}"
PLACED = f"{RUN} --data text.txt {SIZES}"
EVAL = f"eval reinforce {SOURCES} --eval-length 24"
RESUME = "learn --device cpu --resume killed-reinforce"
HELP = "--help` tells what it takes"

# In the folder: runs that have ended and that were killed, by both estimators
LOGITS = "reinforce/logits.safetensors"
JOURNAL = "reinforce/progress/journal"
SNAPSHOTS = "reinforce/progress/snapshot-*"
KILLED = "killed-reinforce/progress"
METADATA = {
    "model": "model",
    "pattern": "2:4",
    "dtype": "float32",
    "weights": "0",
    "dense_weights": "0",
    "weights_are": "weights frozen",
}
Q = "model.layers.0.self_attn.q_proj.weight"


def edit(path, **changes):
    """Change values of a JSON file, of a dict in it those that are given, as if it had been written so."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def write(path, content):
    """What writes a file."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda place: (place / path).write_bytes(content)


def cut(path):
    """What cuts the second half of a file off."""
    return changed(path, lambda content: content[: len(content) // 2])


def changed(path, change):
    """What changes the bytes of the files of a pattern."""

    def damage(place):
        for file in place.glob(path):
            file.write_bytes(change(file.read_bytes()))

    return damage


def replaced(path, old, new):
    """What replaces the first of such words in a file by another."""
    return changed(path, lambda content: content.replace(old.encode(), new.encode(), 1))


def swapped(one, other):
    """A change of bytes: two words in each other's place."""
    return lambda content: content.replace(one, b"<one>").replace(other, one).replace(b"<one>", other)


def removed(path):
    def damage(place):
        for found in place.glob(path):
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    return damage


def edited(path, **changes):
    return lambda place: edit(place / path, **changes)


def together(*damages):
    """What does one damage after the other."""

    def damage(place):
        for do in damages:
            do(place)

    return damage


def copied(source, target):
    """What puts one file in the place of another."""
    return lambda place: shutil.copy(place / source, place / target)


def changed_tensors(path, change, metadata=None):
    """What changes the tensors of a safetensors file."""

    def damage(place):
        content = load_file(place / path)
        save_file(change(content), place / path, metadata=metadata or {"format": "pt"})

    return damage


def of_first(change):
    """A change of the first tensor by name."""
    return lambda content: content | {min(content): change(content[min(content)].clone())}


def a_foreign_tokenizer(place):
    words = {word: index for index, word in enumerate(["[UNK]", *(f"x{i}" for i in range(50)), "w0"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tiny_tokenizer().backend_tokenizer.pre_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(place / "model")


def another_journal(place):
    """That of a run by another seed."""
    assert main.main(f"{LEARN} --seed 1 --output other".split()) == 0
    for run in ("reinforce", "killed-reinforce"):
        shutil.copy(place / "other" / "progress" / "journal", place / run / "progress" / "journal")


def relearned(change=None, **metadata):
    """What writes the logits of a run as if it had learned others, or had other metadata."""

    def write(place):
        logits = load_file(place / LOGITS)
        logits = logits if change is None else change(logits)
        write_logits(Logits(logits, {}, metadata), place / LOGITS)
        edit(place / "reinforce/report.json", logits=digest(logits[name] for name in sorted(logits)))

    return write


def rebuilt(place):
    (place / LOGITS).unlink()
    assert main.main(f"replay reinforce --device cpu --output {LOGITS}".split()) == 0


def archived(path):
    """What writes a zip file of one that is no array."""

    def write(place):
        with zipfile.ZipFile(place / path, "w") as file:
            file.write(place / "model" / "config.json", "config.json")

    return write


def torn_masks(path):
    def write(place):
        torch.save({"x": torch.ones(4, 8).bool()}, place / path, _use_new_zipfile_serialization=False)
        (place / path).write_bytes((place / path).read_bytes()[:-60])

    return write


def flat(path):
    parts = {"x.values": torch.ones(3), "x.bitmask": torch.ones(2, dtype=torch.uint8)}
    return lambda place: save_file(parts, place / path)


def a_flipped_byte(content):
    return content[:-60] + bytes([content[-60] ^ 1]) + content[-59:]


def a_flipped_digit_of_the_table(content):
    """Of a run's settings."""
    before, name, behind = content.partition(b'"perplexity": ')
    return before + name + bytes([behind[0] ^ 1]) + behind[1:]


def both_of_another_run(place):
    """Its settings and its validation perplexities, under another id."""
    edit(place / "killed-reinforce/settings.json", run="0" * 32)
    path = place / KILLED / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["digest"]
    path.write_bytes(b"".join(sealed_line(row, "0" * 32) for row in rows))
