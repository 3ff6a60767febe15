"""Runs of Weights & Biases: offline, so that all that would be sent is on disk."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import wandb
from helpers.command import broken_off, learn, refuses, report
from helpers.tiny_llama import write_inputs
from wandb.proto import wandb_internal_pb2

from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "of-wandb" / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def records(file):
    """What a file of wandb holds, in the format of LevelDB's log: behind a header, blocks of 32 KiB of fragments."""
    content, at, pending = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        # 1: whole, 2: first, 3: middle, 4: last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def sent(folder):
    """(runs, settings, rows) of all that a run's folder has for the server."""
    runs, settings, rows = [], {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.run_id, record.run.project))
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({name: json.loads(value) for name, value in items.items() if not name.startswith("_")})
    return runs, settings, rows


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_in_its_run(inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    run, options = tmp_path / "run", ["--steps", "4", "--eval-every", "2", "--report-to", "wandb", "tensorboard"]
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, 3, options, kill)
    assert main.main(["learn", "--resume", str(run)]) == 0
    runs, settings, rows = sent(run)
    assert len({name for name, _ in runs}) == 1 and {project for _, project in runs} == {"huggingface"}
    told = report(run)
    assert settings["pattern"] == "2:4" and settings["estimator"] == "reinforce" and settings["seed"] == 0
    losses = [(row["train/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step["step"], pytest.approx(step["loss"])) for step in told["steps"]]
    found = [(row["train/global_step"], row["eval/perplexity"]) for row in rows if "eval/perplexity" in row]
    assert found == [(row["step"], pytest.approx(row["perplexity"])) for row in told["validation"]]
    names = {name for row in rows for name in row}
    assert {"train/residual", "train/tracker", "train/flip_rate", "train/tokens_per_second"} <= names
    assert (run / "tensorboard").is_dir()


def test_what_cannot_be_reported_is_told_before_anything_else(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "of-wandb").mkdir()
    arguments = learn(inputs, tmp_path / "run", "--report-to")
    refuses(capsys, tmp_path, [*arguments, "mlflow"], "argument --report-to: invalid choice: 'mlflow'")
    refuses(capsys, tmp_path, [*arguments, "none", "wandb"], "report_to: expected none alone")
    refuses(capsys, tmp_path, [*arguments, "wandb", "wandb"], "report_to: expected one or several of", "each once")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "wandb", None)
        lacking = "report_to: expected the package wandb, which is not installed (pip install 'maskpro-kernels[wandb]')"
        refuses(capsys, tmp_path, [*arguments, "wandb"], lacking)


def test_without_a_key_nothing_is_begun(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    told = "report_to: expected a key that Weights & Biases takes, got none"
    refuses(capsys, inputs, learn(inputs, tmp_path / "run", "--report-to", "wandb"), told, "set WANDB_MODE=offline")
    assert not (tmp_path / "run").exists()


def test_what_wandb_cannot_begin_is_told_with_how_to_go_on(inputs, tmp_path, capsys, monkeypatch):
    def unreachable(**_):
        raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(wandb, "init", unreachable)
        assert main.main(learn(inputs, run, "--report-to", "wandb")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "maskpro: error: report_to: expected Weights & Biases to begin a run, got: Run initialization"
    )
    assert line.endswith(f"continue with: maskpro learn --resume {run} --report-to none")
    assert main.main(["learn", "--resume", str(run), "--report-to", "none"]) == 0
