"""`maskpro sweep`: runs share samples and initial masks where these are the same, and find what each alone finds."""

from __future__ import annotations

import json
import shutil
import warnings
from argparse import Namespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import report
from helpers.routes import route_to_the_eager_reference
from helpers.sweeps import base, write_sweep
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from maskpro_kernels.checkpoints.logits import load_learned
from maskpro_kernels.cli import main, run_samples, shared_masks, shared_work
from maskpro_kernels.cli import sweep as sweep_command
from maskpro_kernels.cli.inputs import Inputs
from maskpro_kernels.cli.shared_work import Found, SharedWork
from maskpro_kernels.cli.versions import machine
from maskpro_kernels.digests import digest
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.reconstruction import Reconstruction
from maskpro_kernels.prune.selection import layers_to_convert
from maskpro_kernels.text import samples

pytestmark = pytest.mark.usefixtures("eager_reference")

# What takes long of one seed, of others besides
ONE = ["wanda", "reconstruction with scales", 2, 2, 1]
LIST = [{"lr": 20.0}, {"gap": 5.0}, {"seed": 1}]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def drawn_in_small_batches(monkeypatch):
    monkeypatch.setattr(run_samples, "TOGETHER", 2)


def watch(monkeypatch):
    """A list for each run that a sweep takes: the windows of each batch that is drawn, and the masks that are found."""
    made, draw, find, take = [[]], samples._draw, shared_masks.refitted_masks, sweep_command.take_run

    def drawn(model, start, rows, *others):
        made[-1].append(rows)
        return draw(model, start, rows, *others)

    def found(layers, pattern, init, refit, *others):
        if init != "magnitude":
            made[-1].append(init if refit == "none" else f"{init} with {refit}")
        return find(layers, pattern, init, refit, *others)

    def taken(*arguments):
        made.append([])
        return take(*arguments)

    monkeypatch.setattr(samples, "_draw", drawn)
    monkeypatch.setattr(shared_masks, "refitted_masks", found)
    monkeypatch.setattr(sweep_command, "take_run", taken)
    return made


def shared_base(inputs):
    return {
        "data": f"{inputs / 'text.txt'}:3,self:1",
        "samples": 5,
        "init": "reconstruction",
        "refit": "scales",
        "init_batches": 5,
        "steps": 2,
    }


@pytest.fixture(scope="module")
def shared(inputs, frozen, tmp_path_factory):
    """(FILE, folder of a sweep whose first two runs have the same to begin with, what each run has made)."""
    folder = tmp_path_factory.mktemp("shared")
    file = write_sweep(folder, inputs, base=shared_base(inputs), list=LIST)
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        monkeypatch.setattr(run_samples, "TOGETHER", 2)
        made = watch(monkeypatch)
        assert main.main(["sweep", str(file), "--output", str(folder / "all")]) == 0
    return file, folder / "all", made[1:]


def runs_of(folder):
    return [folder / run["name"] for run in json.loads((folder / "results.json").read_text())["runs"]]


def files_of(folder):
    """What the shared files hold but for seconds, and their digest, which covers these."""
    found = {}
    for path in (folder / "shared").iterdir():
        with safe_open(path, framework="pt") as file:
            found[path.name] = {name: digest([file.get_tensor(name)]) for name in file.keys()}, file.metadata()["of"]
    return found


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def assert_same_run(one, other):
    """But for seconds, and for what tells each run from others."""
    ours, theirs = (load_learned(folder / "logits.safetensors") for folder in (one, other))
    assert ours.weights
    assert_same_bits(ours.logits, theirs.logits)
    assert_same_bits(ours.weights, theirs.weights)
    assert_same_bits(*(load_file(folder / "progress/samples.safetensors") for folder in (one, other)))
    reports = [report(folder) for folder in (one, other)]
    for name in ("validation", "flipped_groups_by_layer", "eval_digest"):
        assert reports[0][name] == reports[1][name]
    tables = [[{**row, "seconds": None} for row in found["table"]] for found in reports]
    assert tables[0] == tables[1]


def test_what_takes_minutes_is_made_once_and_counted_in_each_run(shared):
    _, folder, made = shared
    first, second, other_seed = runs_of(folder)
    assert [sorted(map(str, run)) for run in made] == [sorted(map(str, ONE)), [], sorted(map(str, ONE))]
    seconds = [[row["seconds"] for row in report(run)["table"]] for run in (first, second, other_seed)]
    # of wanda and of the mask to begin with: found once
    assert seconds[0][2:4] == seconds[1][2:4] and seconds[2][2:4] != seconds[0][2:4] and min(seconds[0][2:4]) > 0
    assert seconds[1][-1] > seconds[1][-2]
    assert "initial mask from an earlier one counts the seconds" in (folder / "report.html").read_text()


def test_a_run_is_the_one_that_learn_gives_alone(shared, inputs, tmp_path):
    _, folder, _ = shared
    config = tmp_path / "config.json"
    config.write_text(json.dumps(base(inputs) | shared_base(inputs) | LIST[1]))
    assert main.main(["learn", "--config", str(config), "--output", str(tmp_path / "alone")]) == 0
    assert_same_run(tmp_path / "alone", runs_of(folder)[1])


def test_a_damaged_file_is_made_anew_and_a_run_goes_on_elsewhere(shared, tmp_path, capsys, monkeypatch):
    file, whole, _ = shared
    folder = shutil.copytree(whole, tmp_path / "all")
    (_, second, _), files = runs_of(folder), files_of(whole)
    shutil.rmtree(second)
    for path in (folder / "shared").iterdir():
        flip_a_byte(path)
    damaged = shutil.copytree(folder, tmp_path / "damaged")

    def killed(trainer):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MaskTrainer, "step", killed)
        made = watch(patched)
        main.main(["sweep", str(file), "--output", str(folder)])
    assert sorted(map(str, made[1])) == sorted(map(str, ONE))
    # both masks, and the first of the batches, behind which all are drawn
    assert capsys.readouterr().err.count("is damaged, and what it held is made anew") == 3
    # those of the other seed are damaged still
    again, old = files_of(folder), files_of(damaged)
    mended = [name for name in files if again[name] == files[name]]
    assert len(mended) == len(ONE) and all(again[name] == old[name] for name in files if name not in mended)
    elsewhere = shutil.copytree(second, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert main.main(["learn", "--resume", str(elsewhere)]) == 0
    assert_same_run(elsewhere, runs_of(whole)[1])


def test_nothing_is_shared_under_foreign_code(inputs, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(sweep_command, "take_run", lambda args, shared: bool(taken.append(shared)))
    file = write_sweep(tmp_path, inputs, grid={"seed": [0]})
    for more in ([], ["--trust-remote-code"]):
        main.main(["sweep", str(file), "--output", str(tmp_path / "all"), *more])
    assert taken == [tmp_path / "all" / "shared", None]


@pytest.fixture
def work(tmp_path):
    """(what runs on a model share, the model)."""
    model = tiny_model()
    return SharedWork(tmp_path / "shared", model), model


def test_another_model_shares_nothing(work, tmp_path, monkeypatch):
    shared, model = work
    made = Found({"tensor": torch.arange(3.0)}, 1.5)
    shared.write("kind", {"seed": 0}, made)
    found = SharedWork(tmp_path / "shared", model).read("kind", {"seed": 0})
    assert found.seconds == 1.5
    assert_same_bits(found.tensors, made.tensors)
    assert shared.read("kind", {"seed": 1}) is None and shared.read("other", {"seed": 0}) is None
    others = {"dtype": tiny_model().bfloat16(), "config": tiny_model(rope_theta=5e5), "weights": tiny_model()}
    others["weights"].model.norm.weight.data[0] += 1
    for name, other in others.items():
        assert SharedWork(tmp_path / "shared", other).read("kind", {"seed": 0}) is None, name
    here = machine(torch.device("cpu"))
    for name, value in (("versions", {}), *(("machine", here | {part: 99}) for part in ("device_name", "threads"))):
        with monkeypatch.context() as patched:
            patched.setattr(shared_work, name, lambda *_, value=value: value)
            assert SharedWork(tmp_path / "shared", model).read("kind", {"seed": 0}) is None, name


def test_what_was_warned_of_is_told_again(work, monkeypatch):
    shared, model = work

    def warning(*_):
        warnings.warn("few tokens", stacklevel=1)
        return Reconstruction({}, {})

    monkeypatch.setattr(shared_masks, "refitted_masks", warning)
    inputs = Inputs(model, None, {}, torch.empty(0), (), (), shared=shared)
    for _ in range(2):
        with pytest.warns(UserWarning, match="few tokens") as told:
            shared_masks.found_mask(Namespace(pattern="2:4", seed=0, bars=False), inputs, {}, "wanda", "wanda", "none")
        assert len(told) == 1
        monkeypatch.setattr(shared_masks, "refitted_masks", None)


def test_a_file_of_another_name_is_damaged(work, capsys):
    shared, _ = work
    for seed in (0, 1):
        shared.write("kind", {"seed": seed}, Found({"tensor": torch.tensor([seed])}))
    one, other = sorted(shared.folder.iterdir())
    shutil.copy(one, other)
    found = [shared.read("kind", {"seed": seed}) for seed in (0, 1)]
    assert found.count(None) == 1 and "is damaged" in capsys.readouterr().err


def test_a_disk_that_refuses_ends_no_run(work, capsys):
    shared, _ = work
    shared.folder.touch()
    shared.write("kind", {}, Found({"tensor": torch.zeros(1)}))
    assert "not kept for later runs, which make it anew" in capsys.readouterr().err


def test_more_windows_begin_with_those_of_fewer(work, tmp_path, monkeypatch):
    shared, model = work
    made = watch(monkeypatch)

    def drawn(name, windows, seed=0, length=6):
        made.append([])
        args = Namespace(output=str(tmp_path / name), seq_len=length, seed=seed, bars=False)
        found = run_samples.run_samples(args, model, tiny_tokenizer(), windows, shared)
        assert_same_bits(found, run_samples.run_samples(args, model, tiny_tokenizer(), windows, None))
        return found

    few, many = drawn("few", 3), drawn("many", 5)
    assert made[1:] == [[2, 1], [2, 1]]
    assert_same_bits(few[:2], many[:2])
    drawn("another seed", 2, seed=1)
    drawn("another length", 2, length=7)
    assert made[3:] == [[2], [2]]


def test_a_mask_follows_from_all_that_shapes_it():
    batches = [torch.arange(8).view(2, 4)]

    def known(init="wanda", refit="none", pattern="2:4", seed=0, batches=batches):
        inputs = Inputs(None, None, {}, torch.empty(0), batches, batches)
        return shared_masks.follows_from(Namespace(pattern=pattern, seed=seed), inputs, init, refit)

    others = [
        {"init": "sparsegpt"},
        {"refit": "scales"},
        {"pattern": "1:4"},
        {"seed": 1},
        {"batches": [batches[0] + 1]},
        {"batches": batches * 2},
    ]
    found = [known(), *(known(**other) for other in others), known("magnitude", "scales"), known("random", "scales")]
    for codes in (torch.zeros(1), torch.ones(1)):
        found.append(known({"layer": codes}, "weights"))
    assert all(found) and len({json.dumps(of) for of in found}) == len(found)
    # these take no time; and a mask of a user's own may follow from anything
    assert not any((known("magnitude"), known("random"), known({"layer": codes}), known("mine", "scales")))


@pytest.mark.parametrize("init", ["wanda", "reconstruction", "sparsegpt", "magnitude"])
def test_a_mask_is_found_again_bit_for_bit(work, init, capsys):
    shared, model = work
    model.bfloat16()
    layers, _ = layers_to_convert(model, "2:4")
    batches = [torch.arange(24).view(2, 12)]
    inputs = Inputs(model, None, {}, torch.empty(0), batches, batches, shared=shared)
    args = Namespace(pattern="2:4", seed=0, bars=False)
    made, again = (shared_masks.found_mask(args, inputs, layers, init, init, "weights") for _ in range(2))
    assert made[1] == again[1] and capsys.readouterr().err.count("found by an earlier run of the sweep") == 1
    for name in ("codes", "weights"):
        assert_same_bits(getattr(made[0], name), getattr(again[0], name))
