"""What users get wrong: the command ends with 2 and one line that tells what was expected and what to do."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import zipfile

import pytest
import torch
from filelock import FileLock
from helpers.command import contents, refuses
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from maskpro_kernels.cli import main
from maskpro_kernels.training.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

SIZES = "--batch-size 4 --seq-len 16 --calibration-batches 2 --eval-windows 2 --eval-length 24 --steps 4 --eval-every 2"
SOURCES = "--data text.txt --device cpu"
LEARN = f"learn --estimator reinforce --model model --output out --dtype float32 {SOURCES} {SIZES}"
EVAL = f"eval reinforce {SOURCES} --eval-length 24"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Folder with a model, a text, and runs that have ended and that were killed, by both estimators."""
    folder = tmp_path_factory.mktemp("template")
    models = {name: tiny_model() for name in ("model", "overflowing")}
    models["overflowing"].model.norm.weight.data.fill_(6e4)
    models["narrow"] = tiny_model(hidden_size=20, intermediate_size=20)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    (folder / "empty").mkdir()
    step = MaskTrainer.step

    def killed(trainer):
        if trainer.steps_done == 2:
            raise Killed
        return step(trainer)

    with pytest.MonkeyPatch.context() as patched:
        route_to_the_eager_reference(patched)
        patched.chdir(folder)
        for estimator in ("reinforce", "straight-through"):
            arguments = f"{LEARN} --estimator {estimator} --output".split()
            assert main.main([*arguments, estimator]) == 0
            with patched.context() as broken, pytest.raises(Killed):
                broken.setattr(MaskTrainer, "step", killed)
                main.main([*arguments, f"killed-{estimator}"])
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch, capsys):
    """A copy of the template to damage, the current folder."""
    folder = shutil.copytree(template, tmp_path / "place")
    for run in folder.glob("killed-*"):
        edit(run / "settings.json", settings={"model": str(folder / "model"), "data": str(folder / "text.txt")})
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # their logs go where stderr was when they were imported
    for library in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler(sys.stderr)])
    return folder


def edit(path, **changes):
    """Change values of a JSON file, of a dict in it those that are given."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
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


def removed(path):
    def damage(place):
        for found in place.glob(path):
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    return damage


def edited(path, **changes):
    return lambda place: edit(place / path, **changes)


def copied(source, target):
    """What puts one file in the place of another."""
    return lambda place: shutil.copy(place / source, place / target)


def tensors(path, change, metadata=None):
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


def base_has_moved(place):
    content = load_file(place / LOGITS)
    save_file(content, place / LOGITS, METADATA | {"model": "/none/model"})


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


Q = "model.layers.0.self_attn.q_proj.weight"
METADATA = {"model": "model", "pattern": "2:4", "dtype": "float32", "weights": "0"}
LOGITS = "reinforce/logits.safetensors"
JOURNAL, SNAPSHOTS = "reinforce/progress/journal", "reinforce/progress/snapshot-*"
KILLED = "killed-reinforce/progress"
RESUME = "learn --device cpu --resume killed-reinforce"

HELP = "--help` tells what it takes"
# by name: the command, what is done to the folder before it, what the error says was expected, what it says to do
CASES = {
    "no command": ("", None, "required: COMMAND", f"`maskpro {HELP}"),
    "unknown command": ("train", None, "invalid choice: 'train'", "choose from"),
    "unknown option": (f"{LEARN} --step 3", None, "unrecognized arguments: --step", f"`maskpro learn {HELP}"),
    "two ways to explore": (f"{LEARN} --gap 5 --flip-rate 0.1", None, "not allowed with argument --gap", HELP),
    "no whole number": (f"{LEARN} --steps many", None, "--steps: expected a whole number, got 'many'", HELP),
    "no number": (f"{LEARN} --lr fast", None, "--lr: expected a number, got 'fast'", f"`maskpro learn {HELP}"),
    "unknown initial mask": (f"{LEARN} --init random", None, "--init: invalid choice: 'random'", "choose from"),
    "unknown dtype": (f"{LEARN} --dtype int8", None, "--dtype: invalid choice: 'int8'", "choose from"),
    "missing argument": ("eval reinforce", None, "are required: --data", f"`maskpro eval {HELP}"),
    # learn: values
    "no model": (f"learn --output out {SOURCES}", None, "model: expected --model", "or --resume alone"),
    "pattern the wrong way round": (f"{LEARN} --pattern 4:2", None, "1 <= N < M, got 4:2", "M in (2, 4, 8, 16, 32)"),
    "pattern of another M": (f"{LEARN} --pattern 2:5", None, "pattern: expected N:M", "M in (2, 4, 8, 16, 32)"),
    "pattern in words": (f"{LEARN} --pattern two", None, 'pattern: expected "N:M"', 'such as "2:4"'),
    "no steps": (f"{LEARN} --steps 0", None, "steps: expected", "at least 1, got 0"),
    "seed below 0": (f"{LEARN} --seed -1", None, "seed: expected", "at least 0, got -1"),
    "seed of 64 bits": (f"{LEARN} --seed {1 << 63}", None, "seed: expected an int", "below 2**63"),
    "gap out of reach": (f"{LEARN} --gap 27", None, "gap: expected at most 26", "as far as noise reaches"),
    "rate no gap gives": (
        f"{LEARN} --flip-rate 1",
        None,
        "flip_rate: expected a float",
        "in [1.5e-11, 0.8333] for 2:4",
    ),
    "learning rate below 0": (f"{LEARN} --lr -1", None, "lr: expected a float", "above 0"),
    "alpha above 1": (f"{LEARN} --alpha 1.5", None, "alpha: expected a float", "at most 1"),
    "alpha of no tracker": (
        f"{LEARN} --estimator straight-through --alpha 0.5",
        None,
        "alpha: expected none, for it is of reinforce alone",
        "leave it out",
    ),
    "too many draws": (f"{LEARN} --draws 99999999", None, "draws: expected an int", "in [1, 65536]"),
    "no such device": (f"{LEARN} --device abacus", None, "expected a device of this machine, got", "there is cpu"),
    "no such GPU": (f"{LEARN} --device cuda:99", None, "expected a device of this machine, got", "there is cpu"),
    "a device without memory": (f"{LEARN} --device meta", None, "of this machine, got 'meta'", "there is cpu"),
    # learn: models
    "no such folder": (f"{LEARN} --model ./none", None, "'smollm2-135m', a folder or a hub id", "no such folder"),
    "no such model": (f"{LEARN} --model none", None, "model: expected a causal language model", "check the name"),
    "a file for a model": (f"{LEARN} --model text.txt", None, "model: expected a folder", "the folder that it lies in"),
    "folder of no model": (f"{LEARN} --model empty", None, "with a config.json", "that save_pretrained has written"),
    "torn config": (LEARN, cut("model/config.json"), "is not a valid JSON file", "copy or download it again"),
    "unknown architecture": (
        LEARN,
        edited("model/config.json", model_type="x"),
        "a causal language model",
        "download it again",
    ),
    "model of another kind": (LEARN, write("model/config.json", '{"model_type": "vit"}'), "ViTConfig", "download"),
    "torn weights": (
        LEARN,
        cut("model/model.safetensors"),
        "model: expected a causal language model",
        "copy or download it again",
    ),
    "no weights": (LEARN, removed("model/model.safetensors"), "expected a causal language model", "copy or download"),
    "a part of the weights": (
        LEARN,
        tensors("model/model.safetensors", lambda content: dict(list(content.items())[:-1])),
        "expected all weights of the model in 'model', got none that fit for 1",
        "copy or download it again",
    ),
    "weights of other shapes": (
        LEARN,
        edited("model/config.json", intermediate_size=128),
        "got none that fit for 6, such as model.layers.0.mlp.down_proj.weight",
        "copy or download it again",
    ),
    "no tokenizer": (
        LEARN,
        removed("model/tokenizer*"),
        "model: expected a causal language model and its tokenizer",
        "copy or download it again",
    ),
    "another model's tokenizer": (LEARN, a_foreign_tokenizer, "expected tokens below 32", "put the model's own beside"),
    "weights that are NaN": (
        LEARN,
        tensors("model/model.safetensors", of_first(lambda tensor: tensor.fill_(torch.nan))),
        "model: expected a finite loss, got nan in float32",
        "copy or download it again",
    ),
    "layers that are infinite": (
        LEARN,
        tensors("model/model.safetensors", lambda content: content | {Q: content[Q] / 0}),
        "expected finite weights, got NaN or infinity in model.layers.0.self_attn.q_proj",
        "take another --pattern, --dtype or model",
    ),
    "a loss beyond float16": (
        f"{LEARN} --model overflowing --dtype float16",
        None,
        "model: expected a finite loss, got nan in float16",
        "take --dtype float32",
    ),
    "pattern that divides no layer": (
        f"{LEARN} --model narrow --pattern 2:8",
        None,
        "expected an nn.Linear that 2:8 fits, all were left out: in_features 20 not divisible by 8",
        "take another --pattern",
    ),
    # learn: texts
    "no such text": (
        f"{LEARN} --data none.txt",
        None,
        'expected "pydoc", "stdlib", a text file or a dataset',
        "pip install",
    ),
    "a folder for a text": (
        f"{LEARN} --data empty",
        None,
        "expected a text file, got the folder 'empty'",
        "give a file in it",
    ),
    "an empty text": (LEARN, write("text.txt", ""), "expected at least 3 paragraphs", "the text is empty"),
    "one paragraph": (LEARN, write("text.txt", "w0 w1"), "at least 3 paragraphs", "separated by blank lines"),
    "text that is not UTF-8": (
        LEARN,
        write("text.txt", b"\xff\xfe\x00"),
        "expected UTF-8 text in 'text.txt'",
        "convert it to UTF-8",
    ),
    "too short to test": (
        LEARN,
        write("text.txt", "\n\n".join(["w0 w1"] * 9)),
        "at least 24 tokens",
        "smaller --eval-length",
    ),
    "too short to learn": (f"{LEARN} --seq-len 9999", None, "at least 9999 tokens", "smaller --seq-len"),
    "too short for a batch": (f"{LEARN} --batch-size 999", None, "batch_size: expected 1 to", "smaller --batch-size"),
    "other text too short": (
        f"{LEARN} --other-data short.txt",
        write("short.txt", "w0\n\nw0\n\nw0"),
        "other_data: text",
        "a longer text",
    ),
    # learn: output
    "a folder that is full": (
        f"{LEARN} --output reinforce",
        None,
        "output: expected a new or empty folder",
        "give another",
    ),
    "a run that can go on": (
        f"{LEARN} --output killed-reinforce",
        None,
        "holds a run",
        "maskpro learn --resume killed-reinforce",
    ),
    "a file for a folder": (f"{LEARN} --output text.txt", None, "output: expected a folder", "give another name"),
    "below a file": (f"{LEARN} --output text.txt/out", None, "output: expected a folder", "give another name"),
    # learn --resume
    "nothing to resume": ("learn --resume none", None, "resume: expected a folder in which", "begin with"),
    "a run that has ended": ("learn --resume reinforce", None, "expected a run that has not ended", "`maskpro export`"),
    "settings beside resume": (
        f"{RESUME} --lr 1",
        None,
        "no other option but --device, --parallel and --quiet, got --lr",
        "own settings",
    ),
    "torn settings": (RESUME, cut("killed-reinforce/settings.json"), "resume: expected a folder", "from a copy"),
    "settings of something else": (
        RESUME,
        write("killed-reinforce/settings.json", "[1]"),
        "resume: expected",
        "from a copy",
    ),
    "settings with a gap": (
        RESUME,
        edited("killed-reinforce/settings.json", settings={"steps": "many"}),
        "resume: expected the settings of a run",
        "from a copy",
    ),
    "settings of an unknown dtype": (
        RESUME,
        edited("killed-reinforce/settings.json", settings={"dtype": "float4"}),
        "dtype: expected one of bfloat16, float32, float16, got 'float4'",
        "from a copy",
    ),
    "settings without a table": (
        RESUME,
        edited("killed-reinforce/settings.json", table=[{}]),
        "had begun",
        "from a copy",
    ),
    "another seed in the settings": (
        RESUME,
        edited("killed-reinforce/settings.json", settings={"seed": 1}),
        "expected a run with seed 1, got 0",
        "put back the model, the text",
    ),
    "another text": (
        RESUME,
        write("text.txt", tiny_text(seed=1)),
        "expected a run with batches of this trainer",
        "put back",
    ),
    "other weights": (
        RESUME,
        tensors("model/model.safetensors", lambda content: content | {Q: content[Q] + 1}),
        "expected a run with weights",
        "put back the model",
    ),
    "a model that has moved": (RESUME, removed("model"), "no such folder", "a folder or a hub id"),
    "no journal": (RESUME, removed(f"{KILLED}/journal"), "expected a folder with a journal", "put back"),
    "a foreign journal": (RESUME, write(f"{KILLED}/journal", "hello, world: a text"), "expected a journal", "put back"),
    "a damaged journal": (RESUME, changed(f"{KILLED}/journal", a_flipped_byte), "a whole record of step 0", "put back"),
    "the journal of another run": (RESUME, another_journal, "expected a run with seed 0, got 1", "put back"),
    "no snapshots": (RESUME, removed(f"{KILLED}/snapshot-*"), "expected a folder with snapshots", "put back"),
    "torn snapshots": (RESUME, cut(f"{KILLED}/snapshot-*"), "snapshot: expected a sound one", "put back"),
    "torn snapshots of straight-through": (
        "learn --device cpu --resume killed-straight-through",
        cut("killed-straight-through/progress/snapshot-*"),
        "snapshot: expected a sound one",
        "put back",
    ),
    "torn perplexities": (
        RESUME,
        cut(f"{KILLED}/validation.jsonl"),
        "expected a perplexity in each line",
        "move the file away",
    ),
    "no first perplexity": (
        RESUME,
        write(f"{KILLED}/validation.jsonl", '{"step": 0, "tokens": 0, "perplexity": NaN}'),
        "expected a perplexity in each line",
        "move the file away",
    ),
    # eval
    "eval of nothing": (f"{EVAL} --eval-windows 0", None, "eval_windows: expected", "at least 1"),
    "eval of no folder": (f"eval ./none {SOURCES}", None, "model: expected", "no such folder"),
    "eval of a run that goes on": (
        f"eval killed-reinforce {SOURCES}",
        None,
        "a run that has ended",
        "maskpro learn --resume killed-",
    ),
    "torn report": (
        EVAL,
        cut("reinforce/report.json"),
        "expected a report of `maskpro learn`",
        "`maskpro learn --resume`",
    ),
    "report of another program": (
        EVAL,
        write("reinforce/report.json", '{"model": "x"}'),
        "expected a report",
        "from a copy",
    ),
    "report that is a list": (EVAL, write("reinforce/report.json", "[]"), "expected a report", "from a copy"),
    "report in another encoding": (
        EVAL,
        write("reinforce/report.json", b"\xff\xfe{}"),
        "expected a report",
        "from a copy",
    ),
    "report of another pattern": (
        EVAL,
        edited("reinforce/report.json", pattern="4:2"),
        "expected a report",
        "from a copy",
    ),
    "report of other layers": (
        EVAL,
        edited("reinforce/report.json", converted=["x"]),
        "a linear layer 'x'",
        "from a copy",
    ),
    "report of another dtype": (
        EVAL,
        edited("reinforce/report.json", settings={"dtype": "f4"}),
        "a report",
        "from a copy",
    ),
    "report without rows": (EVAL, edited("reinforce/report.json", table=[]), "expected a report", "from a copy"),
    "torn checkpoint": (
        EVAL,
        cut("reinforce/model.safetensors"),
        "model: expected a causal language model",
        "copy or download it again",
    ),
    # compare
    "compare with no run": ("compare reinforce model", None, "without report.json", "give the folder of a run"),
    "compare with a torn report": (
        "compare reinforce straight-through",
        cut("straight-through/report.json"),
        "a report",
        "copy",
    ),
    "compare other texts": (
        "compare reinforce straight-through",
        edited("straight-through/report.json", eval_tokens=7),
        "expected the same eval_tokens in all, got 48 and 7",
        "compare it apart",
    ),
    "a picture that is there": (
        "compare reinforce --picture text.txt",
        None,
        "expected a new file",
        "give another name",
    ),
    "a picture nowhere": ("compare reinforce --picture none/p.png", None, "a folder that exists", "make it first"),
    "a picture of no kind": ("compare reinforce --picture p.xyz", None, "expected a file that ends in", ".png"),
    # export
    "export of no run": (
        "export model out",
        None,
        "run: expected a folder written by `maskpro learn`",
        "give the folder of a run",
    ),
    "export of a run that goes on": ("export killed-reinforce out", None, "without logits", "maskpro learn --resume"),
    "export into a full folder": ("export reinforce model", None, "expected a new or empty folder", "give another"),
    "torn logits": (
        "export reinforce out",
        cut(LOGITS),
        "expected a safetensors file",
        "restore logits.safetensors from a copy",
    ),
    "logits of another program": (
        "export reinforce out",
        tensors(LOGITS, lambda content: content),
        "got a file without ['dtype', 'model', 'pattern', 'weights']",
        "restore logits.safetensors from a copy",
    ),
    "logits of an unknown dtype": (
        "export reinforce out",
        tensors(LOGITS, lambda content: content, METADATA | {"dtype": "float4"}),
        "expected a dtype among bfloat16, float32, float16, got 'float4'",
        "restore logits.safetensors",
    ),
    "logits of an unknown pattern": (
        "export reinforce out",
        tensors(LOGITS, lambda content: content, METADATA | {"pattern": "3:5"}),
        "pattern: expected N:M",
        "restore logits.safetensors",
    ),
    "logits that are NaN": (
        "export reinforce out",
        tensors(LOGITS, of_first(lambda tensor: tensor.fill_(torch.nan)), METADATA),
        "expected finite logits [out, K]",
        "restore logits.safetensors",
    ),
    "whole numbers for logits": (
        "export reinforce out",
        tensors(LOGITS, of_first(lambda tensor: tensor.int()), METADATA),
        "expected finite logits [out, K], got [32, 64] of torch.int32",
        "by `maskpro replay --output`",
    ),
    "logits of another model's layers": (
        "export reinforce out",
        tensors(LOGITS, lambda content: {"x": next(iter(content.values()))}, METADATA),
        "'x' matches none",
        "another model than 'model'",
    ),
    "logits of another model's shapes": (
        "export reinforce out",
        tensors(LOGITS, lambda content: content, METADATA | {"model": "narrow"}),
        "expected",
        "another model than 'narrow'",
    ),
    "a base model of other weights": (
        "export reinforce out",
        tensors(LOGITS, lambda content: content, METADATA),
        "run: expected the weights of 'model' that its masks were learned on",
        "put back the base model as it was",
    ),
    "a base model that has moved": (
        "export reinforce out",
        base_has_moved,
        "no such folder",
        "put back the base model of the run",
    ),
    # replay
    "replay of nothing": ("replay none", None, "got 'none': there is none", "check its name"),
    "replay of no run": ("replay model", None, "run: expected a folder of `maskpro learn", "without a journal"),
    "replay of straight-through": ("replay straight-through", None, "cannot be replayed", "logits.safetensors"),
    "an empty journal": (
        "replay reinforce",
        write(JOURNAL, ""),
        "expected a journal of maskpro_kernels",
        "from a copy",
    ),
    "another file as journal": ("replay reinforce", copied("model/config.json", JOURNAL), "expected a journal", "copy"),
    "a journal with a torn header": (
        "replay reinforce",
        changed(JOURNAL, lambda content: content[:99]),
        "expected a whole header",
        "from a copy",
    ),
    "a journal of a later version": (
        "replay reinforce",
        changed(JOURNAL, lambda content: content[:8] + b"\x09" + content[9:]),
        "expected version 1, got 9",
        "from a copy",
    ),
    "a journal damaged in its middle": (
        "replay reinforce",
        changed(JOURNAL, a_flipped_byte),
        "a whole record of step 2 at byte",
        "from a copy",
    ),
    "a journal that is another run's": ("replay reinforce", another_journal, "of another run", "from a copy"),
    "no first snapshot": ("replay reinforce", removed(SNAPSHOTS), "snapshot: expected a sound one", "from a copy"),
    "a damaged first snapshot": ("replay reinforce", cut(SNAPSHOTS), "1 are damaged or of another run", "from a copy"),
    "more steps than taken": ("replay reinforce --steps 5", None, "steps: expected 0 to 4", "got 5"),
    "fewer steps than none": ("replay reinforce --steps -1", None, "steps: expected 0 to 4", "got -1"),
    "a replay over a file": ("replay reinforce --output text.txt", None, "expected a new file", "give another name"),
    "a replay into nowhere": ("replay reinforce --output none/x", None, "a folder that exists", "make it first"),
    "a replay elsewhere": ("replay reinforce --device cuda:99", None, "a device of this machine", "there is cpu"),
    # import and validate
    "import of nothing": ("import none out", None, "source: expected a file or folder", "there is none of that name"),
    "import of masks alone": ("import text.txt out", None, "expected the model that the masks", "add --model"),
    "import of a dense model": (
        "import model out",
        None,
        "pattern: expected one that some layer follows",
        "`maskpro validate`",
    ),
    "import of no masks": (
        "import text.txt out --model model",
        None,
        "masks: expected a file of bool masks",
        "which is damaged or holds more than tensors",
    ),
    "import of torn arrays": (
        "import m.npz out --model model",
        write("m.npz", "PK"),
        "masks: expected an .npz file of MaskLLM",
        "which is damaged or of another kind",
    ),
    "import of another archive": (
        "import m.npz out --model model",
        archived("m.npz"),
        "masks: expected an .npz file of MaskLLM",
        "flat uint8 arrays expected, config.json is none",
    ),
    "import of masks in torch's older form, torn": (
        "import m.pt out --model model",
        torn_masks("m.pt"),
        "masks: expected a file of bool masks",
        "which is damaged or holds more than tensors",
    ),
    "import into a full folder": ("import model reinforce", None, "expected a new or empty folder", "give another"),
    "import of torn weights": (
        "import model out",
        cut("model/model.safetensors"),
        "a whole safetensors file",
        "copy or download it again",
    ),
    "validation of nothing": ("validate none", None, "expected a folder with safetensors files", "'none'"),
    "validation of another file": ("validate text.txt", None, "expected a folder with safetensors files", "'text.txt'"),
    "validation of a packed weight that is flat": (
        "validate flat.safetensors",
        flat("flat.safetensors"),
        "expected matrices x.values and x.bitmask",
        "got [3] and [2]",
    ),
    "validation of a torn file": (
        "validate model",
        cut("model/model.safetensors"),
        "a whole safetensors file",
        "model",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_one_line_and_changes_nothing(name, place, capsys):
    command, damage, expected, cure = CASES[name]
    if damage is not None:
        damage(place)
    refuses(capsys, place, command.split(), expected, cure)


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
def test_what_was_damaged_is_sound_otherwise(estimator, place, capsys):
    """The cases fail by what was done to them alone."""
    assert main.main(["learn", "--resume", f"killed-{estimator}", "--device", "cpu"]) == 0
    assert main.main(["eval", estimator, *EVAL.split()[2:]]) == 0
    assert main.main(["compare", "reinforce", "straight-through", "--picture", "picture.png"]) == 0
    assert main.main(["export", estimator, "out"]) == 0
    assert main.main(["validate", "out"]) == 0
    assert main.main(["import", "out", "packed"]) == 0
    assert main.main(["replay", "reinforce", "--output", "file", "--device", "cpu"]) == 0


CURES = {
    "move the report away": (EVAL, cut("reinforce/report.json"), removed("reinforce/report.json")),
    "have the report written again": (
        "learn --device cpu --resume reinforce",
        cut("reinforce/report.json"),
        removed("reinforce/report.json"),
    ),
    "move the perplexities away": (RESUME, cut(f"{KILLED}/validation.jsonl"), removed(f"{KILLED}/validation.jsonl")),
    "rebuild the logits": ("export reinforce out", cut(LOGITS), rebuilt),
}


@pytest.mark.parametrize("cure", CURES)
def test_cures_work(cure, place, capsys):
    command, damage, mend = CURES[cure]
    damage(place)
    assert main.main(command.split()) == 2
    mend(place)
    assert main.main(command.split()) == 0


def test_a_run_that_another_process_holds(place, capsys):
    with FileLock(place / KILLED / ".lock"):
        refuses(capsys, place, RESUME.split(), "expected a run that no process is at", "wait for the other, or end it")


def test_a_start_that_fails_leaves_its_folder_free(place, capsys, monkeypatch):
    """Losses of the initial masks that are not finite are found behind the first snapshot."""

    def without_losses(trainer, progress):
        raise FloatingPointError("loss under the initial masks: expected finite numbers, batches [0] give none")

    monkeypatch.setattr(MaskTrainer, "_losses_of_initial_masks", without_losses)
    for output in ("out", "empty"):
        before = contents(place)
        assert main.main(f"{LEARN} --output {output}".split()) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("maskpro: error: loss under the initial masks")
        assert contents(place) == before


def test_the_retries_of_the_hub_are_not_told(place, capsys, monkeypatch):
    hub, heard = logging.getLogger("huggingface_hub.utils._http"), []

    def unreachable(name):
        heard.append(hub.isEnabledFor(logging.WARNING))
        raise OSError("We couldn't connect to 'https://huggingface.co'. Check your internet connection.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    told = "connect to 'https://huggingface.co'; there is no folder of that name; of a model on the hub check the name"
    refuses(capsys, place, [*LEARN.split(), "--model", "none"], told)
    assert heard == [False] and hub.isEnabledFor(logging.WARNING)


def test_a_warning_is_told_in_one_line(place, capsys):
    changed(f"{KILLED}/journal", lambda content: content[:-1])(place)
    capsys.readouterr()
    assert main.main(RESUME.split()) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warn" in line.lower()]
    assert line == f"maskpro: warning: the last record of {KILLED}/journal was cut short: its step is taken again"
