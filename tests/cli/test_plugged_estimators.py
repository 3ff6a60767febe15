"""Estimators of other packages at the command: their options, what their runs leave, and that they go on."""

from __future__ import annotations

import argparse

import pytest
from helpers.bits import assert_same_bits
from helpers.command import learn, report

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import estimator_options, main, parser
from maskpro_kernels.cli.run_settings import NO_SETTINGS
from maskpro_kernels.learn import estimator as protocol
from maskpro_kernels.learn.estimator import RUN_OPTIONS, Estimator, Option, StepResult, estimators
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test defines is forgotten again."""
    estimator_options.load_estimators()
    monkeypatch.setattr(protocol, "_registered", dict(estimators()))


def plugged():
    """One without a learning rate, whose steps ask for initial losses and give no residual."""

    class Sinking(Estimator):
        name, needs_initial_losses = "sinking", True
        options = (Option("share", float, 0.5, "of itself that a logit loses", "S"),)

        def __init__(self, share):
            self.share = share

        def step(self, step):
            loss = step.losses()[0]
            step.initial_loss()
            step.begin_update()
            for layer in step.layers.values():
                with layer.moving_logits() as logits:
                    logits.mul_(1.0 - self.share / (step.index + 2))
            return StepResult(loss)

        def settings(self):
            return {"share": self.share}


def test_a_run_without_a_learning_rate_goes_on(inputs, tmp_path, monkeypatch, capsys):
    plugged()
    options = ["--estimator", "sinking", "--share", "0.25", "--steps", "4"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    take = MaskTrainer.step

    def broken(trainer):
        if trainer.steps_done == 2:
            raise KeyboardInterrupt
        return take(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", broken)
        assert main.main(learn(inputs, tmp_path / "part", *options)) == 130
    assert main.main(["learn", "--resume", str(tmp_path / "part")]) == 0
    assert "2 steps were taken before" in capsys.readouterr().err
    whole, part = (load_logits(tmp_path / of / "logits.safetensors")[0] for of in ("whole", "part"))
    assert_same_bits(part, whole)
    assert report(tmp_path / "part")["settings"]["share"] == 0.25
    # there is no residual to draw
    assert not (tmp_path / "part" / "residual.png").exists()
    assert (tmp_path / "part" / "perplexity.png").exists()


@pytest.mark.parametrize("own", ["gap", "run", "bars", "given", "resume", "help", "no-keyword", "_hidden", ""])
def test_an_option_that_would_break_the_command_is_refused(own):
    with pytest.raises(ValueError, match=f"^options: expected .* in breaking, got '{own}'"):

        class Breaking(Estimator):
            name, options = "breaking", (Option(own, float, 0.5, "breaks all", "B"),)

    assert "breaking" not in estimators()


def test_an_option_of_another_kind_or_twice_is_refused():
    with pytest.raises(ValueError, match="^options: expected the kind that reinforce gives .* got 'lr' of another"):

        class Other(Estimator):
            name, options = "other", (Option("lr", int, 1, "another kind", "L"),)

    with pytest.raises(ValueError, match="^options: expected names of keywords, each once, in twice, got 'share'"):

        class Twice(Estimator):
            name, options = "twice", (Option("share", float, 0.5, "one of two", "S"),) * 2

    assert not {"other", "twice"} & estimators().keys()


def test_a_package_with_such_an_option_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "breaks_gap.py").write_text(
        "from maskpro_kernels.learn.estimator import Option\n"
        "from maskpro_kernels import Reinforce\n"
        "class Offered(Reinforce):\n"
        "    name, options = 'breaks-gap', (Option('gap', float, 1.0, 'of its own', 'G'),)\n"
    )
    about = tmp_path / "breaks_gap-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: breaks_gap\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[maskpro_kernels.estimators]\nbreaks_gap = breaks_gap:Offered\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["validate", "--help"])
    assert end.value.code == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("maskpro: warning: the estimator 'breaks_gap' is left out: ") and "got 'gap'" in line


def test_no_option_of_all_runs_is_free():
    commands = (action for action in parser.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parsers = next(commands).choices
    options = {action.dest for name in ("learn", "plan") for action in parsers[name]._actions} | set(NO_SETTINGS)
    assert options - {option.name for of in estimators().values() for option in of.options} == RUN_OPTIONS
