"""int8 values on the command line: export, import, validate, eval, and what the model card tells."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import LAYER, rewrite
from helpers.command import refuses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.cli import main
from maskpro_kernels.hf import MASK_ALONE

pytestmark = pytest.mark.usefixtures("eager_reference")

ROUNDED = (
    "The kept values are rounded to int8, with one scale for each 128 of a row: each is off by half of it at most."
)


@pytest.fixture
def int8(run, tmp_path):
    folder = tmp_path / "int8"
    assert main.main(["export", str(run), str(folder), "--to", "packed", "--values", "int8"]) == 0
    return folder


def test_export_rounds_and_tells_what_it_takes(run, tmp_path, capsys):
    int8 = tmp_path / "int8"
    assert main.main(["export", str(run), str(int8), "--to", "packed", "--values", "int8"]) == 0
    out = capsys.readouterr().out
    # rows of 32 have half a block of values, and scales of 32 bits
    assert "14 packed layers take 5.89 bits a weight, 0.01 MB" in out and "where dense float32 takes 32 bits" in out
    assert "values of 14 rounded to int8" in out
    learned, packed = map(AutoModelForCausalLM.from_pretrained, (run, int8))
    layer, dense = packed.get_submodule(LAYER), learned.get_submodule(LAYER)
    assert layer.kind == "int8"
    assert ((layer.weight - dense.weight).abs() <= layer.scales.amax() / 2 * 1.001).all()
    card = (int8 / "README.md").read_text()
    assert ROUNDED in card and "Found before values were rounded to int8." in card
    assert MASK_ALONE not in card and "is that of the base model, apart from the rounding to int8." in card
    assert "bits a weight, where dense takes 32" in card


def test_it_is_evaluated_like_any_other(int8, inputs, capsys):
    data = ["--data", str(inputs / "text.txt"), "--device", "cpu", "--eval-windows", "5", "--eval-length", "24"]
    assert main.main(["eval", str(int8), *data]) == 0
    assert "test perplexity" in capsys.readouterr().out


def test_validate_reads_it(int8, capsys):
    capsys.readouterr()
    assert main.main(["validate", str(int8)]) == 0
    out = capsys.readouterr().out
    assert out.count("(packed, int8)") == 14 and "14 of " in out


def assert_tells_as_much(card: str, other: str) -> None:
    """Of the base model, of perplexities, settings and versions, whatever the form of the weights."""
    assert card.split("\n\n")[2] == other.split("\n\n")[2] and "This is `model` with 2:4" in card
    for title in ("Perplexity", "Settings", "Versions"):
        assert section(title, card) == section(title, other) != ""


def section(title: str, card: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0].partition("\n<!--")[0].strip()


def test_import_gives_it_back_dense_and_packed(int8, tmp_path, capsys):
    expected = AutoModelForCausalLM.from_pretrained(int8).get_submodule(LAYER)
    for to, values in (("dense", []), ("packed", ["--values", "keep"])):
        output = tmp_path / to
        assert main.main(["import", str(int8), "--output", str(output), "--to", to, *values]) == 0
        layer = AutoModelForCausalLM.from_pretrained(output).get_submodule(LAYER)
        assert_same_bits(layer.weight.detach(), expected.weight)
        card = (output / "README.md").read_text()
        of = "Zeros and weights are those of the checkpoint `int8`, which held values that were rounded to int8."
        assert of in card and MASK_ALONE not in card and ROUNDED not in card
        assert_tells_as_much(card, (int8 / "README.md").read_text())
        assert f"{to} 2:4 checkpoint with 14 sparse layers written to" in capsys.readouterr().out
    # from either it is rounded
    for source in ("dense", "packed"):
        output = tmp_path / f"int8-of-{source}"
        assert main.main(["import", str(tmp_path / source), "--output", str(output), "--values", "int8"]) == 0
        assert load_file(output / "model.safetensors")[f"{LAYER}.values"].dtype == torch.int8
        card = (output / "README.md").read_text()
        assert ROUNDED in card and MASK_ALONE not in card
        assert_tells_as_much(card, (int8 / "README.md").read_text())


def test_import_of_what_is_stored_so_already_is_refused(int8, tmp_path, capsys):
    command = ["import", str(int8), "--output", str(tmp_path / "out")]
    for more in ([], ["--values", "int8"]):
        told = "which is packed already; `--to dense` unpacks it, and `--values keep` stores its values otherwise"
        refuses(capsys, tmp_path, [*command, *more], "source: expected weights with zeros in them", told)


@pytest.mark.parametrize("command", ["export", "import"])
def test_values_of_dense_weights_are_refused(command, run, tmp_path, capsys):
    output = [str(tmp_path / "out")] if command == "export" else ["--output", str(tmp_path / "out")]
    arguments = [command, str(run), *output, "--to", "dense", "--values", "int8"]
    refuses(capsys, tmp_path, arguments, "values: expected none without --to packed, got 'int8'; leave it out")
    refuses(capsys, tmp_path, [*arguments[:-3], "packed", "--values", "int4"], "--values: invalid choice: 'int4'")


DAMAGES = {
    "expected {}.values, .bitmask, .scales, got none of ['scales']": lambda t: t.pop(f"{LAYER}.scales"),
    "{}.scales: expected them beside int8 values and no others": (
        lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].float()})
    ),
    "{}.scales: expected [32, 1]": lambda t: t.update({f"{LAYER}.scales": torch.ones(32, 2)}),
    "{}.scales: expected a tensor of": lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].int()}),
    "{}.scales: expected finite numbers": lambda t: t[f"{LAYER}.scales"].fill_(float("nan")),
    "{}.bitmask: expected [31, 8]": lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"][1:].clone()}),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_validate_names_what_is_damaged(told, int8, tmp_path, capsys):
    rewrite(DAMAGES[told])(int8)
    refuses(capsys, tmp_path, ["validate", str(int8)], told.format(LAYER))
