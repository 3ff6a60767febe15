"""Python code that a checkpoint brings along runs where --trust-remote-code says so, and nobody is asked."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from helpers.command import learn, refuses, reseal

from maskpro_kernels import hf
from maskpro_kernels.checkpoints.logits import Learned, load_learned, write_learned
from maskpro_kernels.cli import main

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
TRUST = "--trust-remote-code"
SHORT = "--eval-windows 2 --eval-length 24 --device cpu".split()


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Where transformers keeps code: one folder, as the package that it is in is imported once."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def marker(modules, tmp_path, monkeypatch):
    """A file that the code leaves where it runs; a "y" waits on standard input."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    return tmp_path / "has-run"


def add_to(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def foreign(inputs, tmp_path, marker):
    """A folder with a model and a text, whose config and model are classes in the folder."""
    folder = tmp_path / "foreign"
    model = shutil.copytree(inputs / "model", folder / "model")
    shutil.copy(inputs / "text.txt", folder)
    (model / "configuration_own.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (model / "modeling_own.py").write_text(MODELING)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    add_to(model / "config.json", auto_map=classes, model_type="own", architectures=["OwnModel"])
    return folder


def refused_with_its_code(capsys, folder, arguments, file):
    refuses(capsys, folder, arguments, "whose code is transformers' own", file, TRUST)


def test_every_command_that_loads_a_model_refuses_code_that_it_brings_along(foreign, tmp_path, marker, capsys):
    model, text, new = str(foreign / "model"), str(foreign / "text.txt"), str(tmp_path / "new")
    for command in (
        learn(foreign, new),
        ["eval", model, "--data", text, *SHORT],
        ["import", model, "--output", new],
        ["import", model, "--model", model, "--output", new],
    ):
        refused_with_its_code(capsys, tmp_path, command, "configuration_own.py and modeling_own.py")
    # behind a line about memory
    assert main.main(["speed", model, "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert "configuration_own.py and modeling_own.py" in told.err.splitlines()[-1] and told.out == ""
    assert not marker.exists()


def test_a_tokenizer_that_brings_code_along_is_refused(inputs, tmp_path, marker, capsys):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    (model / "tokenization_own.py").write_text(TOKENIZATION.format(marker=str(marker)))
    classes = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    add_to(model / "tokenizer_config.json", auto_map=classes, tokenizer_class="OwnTokenizer")
    command = ["eval", str(model), "--data", str(inputs / "text.txt"), *SHORT]
    refused_with_its_code(capsys, tmp_path, command, "tokenization_own.py")
    with pytest.raises(hf.ForeignCode) as caught:
        hf.load_model(str(model), torch.float32)
    assert caught.value.files == ("tokenization_own.py",) and not marker.exists()
    _, tokenizer = hf.load_model(str(model), torch.float32, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer" and marker.exists()


def test_code_of_another_repository_is_named_with_it(foreign, marker):
    add_to(foreign / "model" / "config.json", auto_map={"AutoConfig": "owner/name--configuration_own.OwnConfig"})
    with pytest.raises(hf.ForeignCode, match=r"configuration_own.py of owner/name.*trust_remote_code=True"):
        hf.load_model(str(foreign / "model"), torch.float32)
    with pytest.raises(TypeError, match="trust_remote_code: expected a bool, got 'yes'"):
        hf.load_model(str(foreign / "model"), torch.float32, trust_remote_code="yes")


def test_a_model_in_the_metadata_of_a_run_is_no_permission(foreign, run, tmp_path, marker, capsys):
    """Who hands on a run names the model that its export loads."""
    run, new = shutil.copytree(run, tmp_path / "run"), tmp_path / "new"
    learned = load_learned(run / "logits.safetensors")
    named = Learned(learned.logits, learned.weights, learned.metadata | {"model": str(foreign / "model")})
    # who hands it on writes the digests as well
    reseal(run / "report.json", lambda told: told.update(logits_file=write_learned(named, run / "logits.safetensors")))
    refused_with_its_code(capsys, tmp_path, ["export", str(run), str(new)], "modeling_own.py")
    assert not marker.exists()


def test_a_run_on_a_model_with_code_needs_the_option_each_time(foreign, tmp_path, marker, capsys, monkeypatch):
    run, text = tmp_path / "run", str(foreign / "text.txt")
    with monkeypatch.context() as patched:
        patched.setattr("maskpro_kernels.learn.trainer.MaskTrainer.step", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main.main(learn(foreign, run, TRUST))
    assert marker.exists()
    assert "trust_remote_code" not in json.loads((run / "settings.json").read_text())["settings"]
    # a settings file may come from anywhere
    reseal(run / "settings.json", lambda told: told["settings"].update(trust_remote_code=True))
    marker.unlink()
    refused_with_its_code(capsys, run, ["learn", "--resume", str(run)], "modeling_own.py")
    config = ["learn", "--config", str(run / "settings.json"), "--output", str(tmp_path / "new")]
    refuses(capsys, run, config, "expected names of options", "got 'trust_remote_code'")
    assert main.main(["learn", "--resume", str(run), TRUST]) == 0
    refused_with_its_code(capsys, run, ["export", str(run), str(tmp_path / "out")], "modeling_own.py")
    assert main.main(["export", str(run), str(tmp_path / "out"), TRUST]) == 0
    assert "trust_remote_code=True)" in (tmp_path / "out" / "README.md").read_text()
    refused_with_its_code(capsys, run, ["eval", str(run), "--data", text], "modeling_own.py")
    assert main.main(["eval", str(tmp_path / "out"), "--data", text, TRUST, *SHORT]) == 0


def test_code_is_fetched_from_the_hub_where_it_may_be_run(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(_, allow_patterns):
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr("maskpro_kernels.hf.hub.snapshot_download", snapshot_download)
    hf.fetch_checkpoint("owner/name")
    hf.fetch_checkpoint("owner/name", code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
