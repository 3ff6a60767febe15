"""Masks to begin with, out of each kind of what is stored; another base, pattern or set of layers is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.checkpoints import layers, masked, random_masks
from helpers.tiny_llama import tiny_model, tiny_tokenizer

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints.logits import LOGITS_FILE, save_logits
from maskpro_kernels.checkpoints.mask_file import save_masks
from maskpro_kernels.cli.inputs import digest_of_weights
from maskpro_kernels.files import digest
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune.finalize import finalize
from maskpro_kernels.prune.initial_masks import initial_codes, stored_mask

pytestmark = pytest.mark.usefixtures("eager_reference")

FIRST = "model.layers.0.self_attn.q_proj"


def dense_layers(model=None):
    return {name: layer for name, layer in layers(model or tiny_model()).items() if name != "lm_head"}


def random_codes(pattern="2:4"):
    return {name: mk.pack_mask(mask, pattern) for name, mask in random_masks(tiny_model(), pattern).items()}


def converted(pattern="2:4"):
    model = tiny_model()
    mk.convert(model, pattern, init=random_codes(pattern))
    return model


def save(model, folder):
    hf.save_model(model, tiny_tokenizer(), folder)
    return folder


def mask_file(folder, pattern="2:4"):
    codes, path = random_codes(pattern), folder / "mine.mask"
    triples = [(name, codes[name], layer.weight.detach()) for name, layer in dense_layers().items()]
    save_masks(path, triples, pattern, model="tiny")
    return path


def run(folder, pattern="2:4", model=None, **more):
    model = model or converted(pattern)
    weights = digest_of_weights(model)
    reported = {"pattern": pattern, "dtype": "float32", "dense_weights": weights, "weights": weights}
    folder.mkdir()
    (folder / LOGITS_FILE).parent.mkdir(parents=True)
    save_logits(model, folder / LOGITS_FILE, reported | more)
    return folder


STORED = {
    "mask file": mask_file,
    "run": lambda folder, pattern="2:4": run(folder / "run", pattern),
    "zeros": lambda folder, pattern="2:4": save(
        masked(tiny_model(), random_masks(tiny_model(), pattern)), folder / "m"
    ),
    "packed": lambda folder, pattern="2:4": save(finalize(converted(pattern), to="packed"), folder / "m"),
    "masked": lambda folder, pattern="2:4": save(converted(pattern), folder / "m"),
}


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.filterwarnings("error")
def test_each_kind_gives_its_mask(tmp_path, kind, pattern):
    path = STORED[kind](tmp_path, pattern)
    expected = random_codes(pattern)
    found = stored_mask(path, dense_layers(), pattern)
    assert_same_bits(found, expected)
    # by its path, too
    model = tiny_model()
    mk.convert(model, pattern, init=str(path))
    for name, layer in masked_layers(model).items():
        assert_same_bits(mk.top_n_mask(layer.logits.detach(), pattern), expected[name])
    assert_same_bits(initial_codes(dense_layers(), pattern, path), expected)


@pytest.mark.parametrize("kind", STORED)
def test_another_pattern_is_refused(tmp_path, kind):
    path = STORED[kind](tmp_path, "4:8")
    reported = "init: expected weights that follow 2:4, got more in" if kind == "zeros" else "of 2:4, got one of 4:8 in"
    with pytest.raises(ValueError, match=reported) as refusal:
        stored_mask(path, dense_layers(), "2:4")
    assert str(refusal.value).startswith("init: ")


@pytest.mark.parametrize("kind", STORED)
def test_another_set_of_layers_is_refused(tmp_path, kind):
    path, own = STORED[kind](tmp_path), dense_layers()
    fewer = {name: layer for name, layer in own.items() if name != FIRST}
    other = fewer | {FIRST: torch.nn.Linear(64, 32)}
    more = own | {"model.more": torch.nn.Linear(32, 32)}
    for wanted, named in ((fewer, FIRST), (other, FIRST), (more, "model.more")):
        if kind == "zeros" and wanted is fewer:
            # others may have zeros as well
            continue
        with pytest.raises(ValueError, match=f"(1[345] masked layers|masks' base model).* {named}"):
            stored_mask(path, wanted, "2:4")


@pytest.mark.parametrize("kind", ["mask file", "run", "masked"])
def test_another_base_is_refused(tmp_path, kind):
    model = tiny_model()
    model.get_submodule(FIRST).weight.data[3, 5] += 1
    reported = {
        "mask file": "with fingerprint .* in float32, got float32 weights with fingerprint [0-9a-f]{32}$",
        "run": "whose weights have the digest .* in float32, got weights of digest [0-9a-f]{32}$",
        "masked": f"got other weights in {FIRST}: another model, or this one in another dtype$",
    }[kind]
    with pytest.raises(ValueError, match=f"^model: expected the .*base .*{reported}"):
        stored_mask(STORED[kind](tmp_path), dense_layers(model), "2:4")


def test_logits_that_the_report_of_their_run_does_not_have_are_refused(tmp_path):
    path, own = run(tmp_path / "run"), masked_layers(converted())
    for logits, matches in (([own[name].logits for name in sorted(own)], True), ([own[FIRST].logits], False)):
        (path / "report.json").write_text(json.dumps({"logits": digest(logits)}))
        with (
            nullcontext() if matches else pytest.raises(ValueError, match="^init: expected the logits that report.json")
        ):
            assert_same_bits(stored_mask(path, dense_layers(), "2:4"), random_codes())


@pytest.mark.parametrize("kind", ["zeros", "packed"])
def test_other_kept_weights_are_reported(tmp_path, kind):
    """As of a checkpoint that SparseGPT has pruned, whose mask alone is of use here."""
    model = tiny_model()
    model.get_submodule(FIRST).weight.data *= 2
    with pytest.warns(UserWarning, match=f"kept weights of 1 layers, such as {FIRST}, differ from the model"):
        found = stored_mask(STORED[kind](tmp_path), dense_layers(model), "2:4")
    assert_same_bits(found, random_codes())


@pytest.mark.parametrize("kind", ["masked", "run"])
def test_masks_over_changed_weights_are_reported(tmp_path, kind):
    model, codes = converted(), random_codes()
    dense = digest_of_weights(model)
    layer = model.get_submodule(FIRST)
    layer.weight.data = layer.weight.data * 2
    layer.weight_changed = True
    reported = "differ from the model" if kind == "masked" else "its mask over changed weights; only the mask is used"
    path = save(model, tmp_path / "m") if kind == "masked" else run(tmp_path / "run", model=model, dense_weights=dense)
    with pytest.warns(UserWarning, match=reported):
        assert_same_bits(stored_mask(path, dense_layers(), "2:4"), codes)


def test_values_rounded_to_int8_are_reported(tmp_path):
    path = save(finalize(converted(), to="packed", values="int8"), tmp_path / "m")
    with pytest.warns(UserWarning, match="values of 14 layers are rounded to int8"):
        assert_same_bits(stored_mask(path, dense_layers(), "2:4"), random_codes())


def test_zeros_of_the_model_count_as_kept_and_what_is_filled_up_is_reported(tmp_path):
    model, sparse = tiny_model(), tiny_model()
    weight = torch.tensor([0.0, 4.0, -3.0, 2.0, 1.0, 4.0, -3.0, 2.0])
    for each in (model, sparse):
        each.get_submodule(FIRST).weight.data[0, :8] = weight
    masked(sparse, random_masks(tiny_model()))
    sparse.get_submodule(FIRST).weight.data[0, :8] = torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    path = save(sparse, tmp_path / "m")
    with pytest.warns(UserWarning, match="1 groups keep fewer weights than 2:4; the largest") as reported:
        codes = stored_mask(path, dense_layers(model), "2:4")[FIRST]
    assert [one.filename for one in reported] == [__file__] and codes[0, :2].tolist() == [0b0011, 0b1010]


@pytest.mark.parametrize("architecture", ["GPT-2", "Mixtral"])
@pytest.mark.parametrize("to", ["dense", "packed", None])
@pytest.mark.filterwarnings("error:.*kept weights of")
def test_weights_that_are_stored_otherwise_than_as_layers(tmp_path, architecture, to):
    """Transposed ones, and those of all experts in one: a name is that of the layer that they are unfused into."""
    (model, _), (other, _) = tiny(architecture), tiny(architecture)
    other.load_state_dict(model.state_dict())
    mk.convert(model, "2:4", init="random", seed=2)
    expected = {name: mk.top_n_mask(layer.logits.detach(), "2:4") for name, layer in masked_layers(model).items()}
    path = save(model if to is None else finalize(model, to=to), tmp_path / "m")
    mk.convert(other, "2:4", init=path)
    found = {name: mk.top_n_mask(layer.logits.detach(), "2:4") for name, layer in masked_layers(other).items()}
    assert len(found) > 4
    assert_same_bits(found, expected)


def test_what_is_no_mask_is_refused(tmp_path):
    (tmp_path / "text").write_text("no mask")
    (tmp_path / "empty").mkdir()
    cut = mask_file(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-3])
    foreign = run(tmp_path / "foreign")
    save_logits(converted(), foreign / LOGITS_FILE, {})
    infinite = converted()
    infinite.get_submodule(FIRST).logits.data[0, 0] = torch.inf
    dense = save(tiny_model(), tmp_path / "dense")
    broken = masked(tiny_model(), random_masks(tiny_model()))
    broken.get_submodule(FIRST).weight.data[0, 0] = torch.nan
    for path, reported in {
        tmp_path / "text": "expected a mask file, got",
        cut: "expected a mask file, got",
        tmp_path / "empty": "expected a folder with a config.json, got",
        foreign: "expected the logits of a run in",
        run(tmp_path / "infinite", model=infinite): f"expected finite logits in .* got others in {FIRST}",
        save(infinite, tmp_path / "masked"): f"expected finite logits in .* got others in {FIRST}",
        save(broken, tmp_path / "broken"): f"expected finite weights in .* got others in {FIRST}",
        dense: "expected weights that follow 2:4, got more in 100.0% of the groups of",
    }.items():
        with pytest.raises(ValueError, match=f"^init: {reported}"):
            stored_mask(path, dense_layers(), "2:4")
    shutil.rmtree(tmp_path / "empty")
    for nothing in (tmp_path / "empty", "", "randm", "x" * 5000):
        with pytest.raises(ValueError, match="^init: expected one of magnitude, wanda, .*, the path of a mask file"):
            mk.convert(tiny_model(), "2:4", init=nothing)
