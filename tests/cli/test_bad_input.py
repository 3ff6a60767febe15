"""Wrong arguments of the command: one line with the argument, the expectation and the value."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.checkpoints import forge
from helpers.command import SIZES, refuses
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from maskpro_kernels import top_n_mask
from maskpro_kernels.checkpoints.mask_file import save_masks

pytestmark = pytest.mark.usefixtures("eager_reference")

SOURCES = "--data text.txt --device cpu"
LEARN = f"learn --model model --output out --dtype float32 --estimator reinforce --init wanda {SIZES} {SOURCES}"
LONG = "a" * 300


def write(path, content):
    """Return a function that writes a file below a folder."""

    def written(folder):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return written


def with_infinite_head(folder):
    model = tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(folder / "nan")
    tiny_tokenizer().save_pretrained(folder / "nan")


def with_forged_mask(folder):
    weight = torch.ones(4, 8)
    save_masks(folder / "mask", [("layer", top_n_mask(weight, "2:4"), weight)], "2:4", model="tiny")
    forge(folder / "mask", layers='{"layer": [4, 8], "other": [4, 8]}')


def an_encoder(folder):
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    shutil.rmtree(folder / "model")
    BertForMaskedLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


def an_encoder_decoder(folder):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    shutil.rmtree(folder / "model")
    BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, **sizes)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


# by name: the command, what is done to the folder before, parts of the line
CASES = {
    "unknown command": ("train", None, ["command: expected one of learn, eval, export, import, speed, got 'train'"]),
    "unknown option": (f"{LEARN} --step 3", None, ["unrecognized arguments: --step 3", "`maskpro learn --help`"]),
    "no whole number": (f"{LEARN} --steps many", None, ["argument --steps: invalid int value: 'many'"]),
    "no number": (f"{LEARN} --lr fast", None, ["argument --lr: invalid float value: 'fast'"]),
    "unknown dtype": (f"{LEARN} --dtype int8", None, ["argument --dtype: invalid choice: 'int8'"]),
    "missing argument": ("export run", None, ["the following arguments are required: OUTPUT"]),
    "no model": (f"learn --output out {SOURCES}", None, ["model: expected --model, or --resume alone, got none"]),
    "no output": ("learn --model model", None, ["output: expected --output"]),
    "pattern the wrong way round": (f"{LEARN} --pattern 4:2", None, ["1 <= N < M, got 4:2"]),
    "pattern in words": (f"{LEARN} --pattern two", None, ["pattern: expected"]),
    "a density below that of the pattern": (f"{LEARN} --density 0.4", None, ["density: expected above 0.5"]),
    "a dense model": (f"{LEARN} --density 1", None, ["density: expected above 0.5", "got 1.0"]),
    "steps below 0": (f"{LEARN} --steps -1", None, ["steps: expected at least 0, got -1"]),
    "weights that learn without steps": (
        f"{LEARN} --estimator straight-through --train-weights 0.1 --steps 0",
        None,
        ["--train-weights: expected none with --steps 0, got 0.1"],
    ),
    "a window of one token": (f"{LEARN} --seq-len 1", None, ["--seq-len: expected at least 2, got 1"]),
    "seed below 0": (f"{LEARN} --seed -1", None, ["seed: expected at least 0, got -1"]),
    "seed of 64 bits": (f"{LEARN} --seed {1 << 63}", None, ["seed: expected an int below 2**63"]),
    "gap out of reach": (f"{LEARN} --gap 27", None, ["gap: expected at most 26, which noise can cross, got 27"]),
    "gap that is no number": (f"{LEARN} --gap nan", None, ["gap: expected"]),
    "learning rate below 0": (f"{LEARN} --lr -1", None, ["lr: expected", "-1"]),
    "weights that learn without gradients": (
        f"{LEARN} --train-weights 0.1",
        None,
        ["--train-weights: expected none with --estimator reinforce"],
    ),
    "a rate of masks that are fixed": (
        f"{LEARN} --estimator straight-through --train-weights 0.1 --lr 0.1",
        None,
        ["lr: expected none with --train-weights", "got 0.1"],
    ),
    "unknown initial mask": (f"{LEARN} --init randm", None, ["init: expected one of magnitude, wanda", "got 'randm'"]),
    "an initial mask that is a text": (f"{LEARN} --init text.txt", None, ["expected a mask file", "text.txt"]),
    "nothing to import": (
        "import nowhere --output out",
        None,
        ["source: expected a file, a folder or an id owner/name on the hub, got 'nowhere', which does not exist"],
    ),
    "no such device": (f"{LEARN} --device abacus", None, ["device: expected one of cpu", "got 'abacus'"]),
    "no such GPU": (f"{LEARN} --device cuda:99", None, ["device: expected one of cpu", "got 'cuda:99'"]),
    "no such model": (
        LEARN.replace("--model model", "--model /none/at/all"),
        None,
        ["model: expected 'smollm2-135m', a folder or a hub id, got '/none/at/all'"],
    ),
    "a model that is a file": (
        LEARN.replace("--model model", "--model text.txt"),
        None,
        ["model: expected a folder, got the file 'text.txt'"],
    ),
    "a damaged model": (
        LEARN,
        write("model/model.safetensors", b"no tensors"),
        ["model: expected a causal language model and its tokenizer, got 'model'"],
    ),
    "a model without a finite loss": (
        LEARN.replace("--model model", "--model nan") + " --data self",
        with_infinite_head,
        ["model: expected finite logits"],
    ),
    "no such text": (f"{LEARN} --data none.txt", None, ["data: expected", "'none.txt'"]),
    "an empty text": (f"{LEARN} --data empty.txt", write("empty.txt", ""), ["data: expected", "'empty.txt'"]),
    "a text of another encoding": (f"{LEARN} --data b.txt", write("b.txt", b"\xff\xfe\n\n"), ["data: expected UTF-8"]),
    "a text twice": (f"{LEARN} --data text.txt,text.txt", None, ["data: expected each source once"]),
    "a share of nothing": (f"{LEARN} --data text.txt:0,self:1", None, ["data: expected a positive share"]),
    "windows longer than the context": (f"{LEARN} --seq-len 65", None, ["--seq-len: expected windows of at most 64"]),
    "samples longer than the context": (f"{LEARN} --data self --seq-len 65", None, ["--seq-len: expected windows of"]),
    "words in windows longer than the context": (
        "eval model --data text.txt --protocol word --eval-length 65",
        None,
        ["--eval-length: expected windows of at most 64"],
    ),
    "a text shorter than a window": (
        f"{LEARN} --data short.txt",
        write("short.txt", tiny_text(paragraphs=10, words=3)),
        ["data: expected at least 64 tokens"],
    ),
    "a batch that is too large": (
        f"{LEARN} --batch-size 9999",
        None,
        ["--batch-size: expected at most", "longer text"],
    ),
    "data without a share": (f"{LEARN} --data text.txt:,self", None, ["error: data: expected"]),
    "data of nothing": (f"{LEARN} --data ,", None, ["error: data: expected"]),
    "data with a share below 0": (f"{LEARN} --data text.txt:-1,self:2", None, ["error: data: expected"]),
    "an encoder": (LEARN, an_encoder, ["model: expected a causal language model", "'model': bert is an encoder"]),
    "an encoder-decoder": (LEARN, an_encoder_decoder, ["'model': bart is an encoder-decoder"]),
    "an encoder to evaluate": ("eval model --data pydoc", an_encoder, ["'model': bert is an encoder"]),
    "more texts than windows": (f"{LEARN} --data text.txt,pydoc --eval-windows 1", None, ["--eval-windows: expected"]),
    "an output that is not empty": (f"{LEARN} --output model", None, ["output: expected a new or empty folder"]),
    "values of a dense checkpoint": (
        "export run out --values int8",
        None,
        ["values: expected none without --to packed"],
    ),
    "no run": ("export model out", None, ["run: expected a folder written by `maskpro learn`, got 'model'"]),
    "import of nothing": ("import model", None, ["output: expected --output"]),
    "masks without a model": ("import text.txt --output out", None, ["model: expected the model of the masks in"]),
    "import of no zeros": ("import model --output out", None, ["pattern: "]),
    "an output that is a file": (
        f"{LEARN} --output text.txt",
        None,
        ["output: expected a writable folder, got 'text.tx"],
    ),
    "an output below a file": (
        f"{LEARN} --output text.txt/o",
        None,
        ["output: expected a writable folder, got 'text.t"],
    ),
    "an output of too long a name": (f"{LEARN} --output {LONG}", None, ["output: expected a path", "name too long"]),
    "a model of too long a name": (f"{LEARN} --model {LONG}", None, ["model: expected a path", "name too long"]),
    "a mask of too long a name": (f"{LEARN} --init {LONG}", None, ["init: expected a path", "name too long"]),
    "a text of too long a name": (f"{LEARN} --data {LONG}", None, ["data: expected"]),
    "a run of too long a name": (f"learn --resume {LONG}", None, ["resume: expected a path", "name too long"]),
    "models of too long a name": (f"eval none {LONG}", None, ["models: expected a path", "name too long"]),
    "masks of too long a name": (f"import {LONG} --output out", None, ["source: expected a path", "name too long"]),
    "figures in a file that exists": (
        "speed model --output text.txt",
        None,
        ["output: expected a new file in a writable folder, got 'text.txt', which exists"],
    ),
    "figures in no folder": ("eval model --output none/x", None, ["output: expected a new file in a writable folder"]),
    "no file of options": ("learn none.yaml", None, ["none.yaml"]),
    "a mask file that lacks a layer": (
        f"{LEARN} --init mask",
        with_forged_mask,
        ["init: expected metadata of a mask file, got others in 'mask': a layer without a tensor", "'other'"],
    ),
    "a report without entries": (
        "eval run --device cpu",
        write("run/report.json", '{"format": "maskpro-run 3"}'),
        ["expected an entry 'settings' in a file, got none"],
    ),
    "a report without end": ("eval run", write("run/report.json", "[" * 100_000), ["RecursionError: "]),
    "masks that are none": ("import text.txt --model model --output out", None, ["text.txt"]),
}


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "model", tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_a_line(name, folder, capsys):
    command, damage, messages = CASES[name]
    if damage is not None:
        damage(folder)
    if name == "a model without a finite loss":
        # after what the model is asked to write first
        from maskpro_kernels.cli import main

        assert main.main(command.split()) == 2
        assert messages[0] in capsys.readouterr().err.splitlines()[-1]
    else:
        refuses(capsys, folder, command.split(), *messages)
