"""Estimators on the command line: their defaults, whose an option is, and those that other packages offer."""

from __future__ import annotations

import re

import pytest
from helpers.command import SIZES, report
from helpers.tiny_llama import write_inputs

from maskpro_kernels import learn as learn_package
from maskpro_kernels.cli import main, parser
from maskpro_kernels.cli.run_settings import complete
from maskpro_kernels.learn import estimator as protocol
from maskpro_kernels.learn.estimator import Estimator, Option
from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.straight_through import StraightThrough

REQUIRED = ["--model", "m", "--data", "d", "--output", "o"]


def settings_of(*options):
    args = parser.build_parser().parse_args(["learn", *REQUIRED, *options])
    return complete(args), vars(args)


def test_without_options_a_run_is_the_one_that_is_recommended():
    estimator, settings = settings_of()
    assert estimator.settings() == StraightThrough(lr=0.3, steps=200).settings()
    expected = {"estimator": "straight-through", "init": "reconstruction", "gap": 15.0, "calibration_batches": None}
    assert expected.items() <= settings.items() and "draws" not in settings


def test_the_papers_way_is_one_option_away():
    estimator, settings = settings_of("--estimator", "reinforce")
    assert estimator.settings() == Reinforce().settings()
    expected = {"init": "wanda", "gap": 10.0, "calibration_batches": 16, "steps": 1000, "eval_every": 200}
    assert expected.items() <= settings.items() and "max_update" not in settings
    _, settings = settings_of("--estimator", "reinforce", "--draws", "2", "--init", "magnitude", "--steps", "7")
    assert "alpha" not in settings and (settings["init"], settings["steps"]) == ("magnitude", 7)


@pytest.mark.slow
def test_a_run_without_options_tells_the_layers_of_its_reconstruction(tmp_path, capsys, eager_reference):
    inputs = write_inputs(tmp_path)
    sources = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt"), "--output", str(tmp_path / "run")]
    assert main.main(["learn", *sources, *SIZES.split(), "--device", "cpu", "--dtype", "float32"]) == 0
    assert report(tmp_path / "run")["table"][-1]["method"] == "straight-through"
    lines = re.findall(r"^reconstruction: layer (\d+) of 14, [\d:]+ left$", capsys.readouterr().err, re.MULTILINE)
    assert lines == [str(layer) for layer in range(1, 15)]


def test_weights_learn_where_the_command_says_so(capsys):
    estimator, settings = settings_of("--train-weights", "1e-4", "--steps", "4")
    assert estimator.settings() == StraightThrough(steps=4, train_weights=1e-4).settings()
    assert settings["train_weights"] == 1e-4
    _, settings = settings_of()
    assert settings["train_weights"] is None
    with pytest.raises(ValueError, match="^train_weights: expected a float above 0, got 0.0"):
        settings_of("--train-weights", "0")
    with pytest.raises(ValueError, match="^train_weights: expected none, for it is of straight-through alone"):
        settings_of("--estimator", "reinforce", "--train-weights", "1e-4")
    with pytest.raises(SystemExit):
        parser.build_parser().parse_args(["learn", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "straight-through: let the kept weights learn too, at this rate, falling as --lr does --" in told


def test_an_option_tells_whose_it_is(capsys):
    class Slow(StraightThrough):
        name = "slow"
        options = (Option("max_update", float, 0.5, "most that a step moves a logit, in 100% of all steps", "L"),)

    with pytest.raises(ValueError, match="^max_update: expected none, for it is of straight-through and slow alone"):
        settings_of("--estimator", "reinforce", "--max-update", "1")
    estimator, _ = settings_of("--estimator", "slow", "--steps", "3")
    assert (type(estimator), estimator.max_update, estimator.steps) == (Slow, 0.5, 3)
    with pytest.raises(SystemExit):
        parser.build_parser().parse_args(["learn", "--help"])
    assert "slow: most that a step moves a logit, in 100% of all steps (default: 0.5)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_two_estimators_of_one_name_are_refused():
    def defined():
        class Twice(Reinforce):
            name = "twice"

    defined()
    # as where a cell of a notebook runs again
    defined()
    with pytest.raises(ValueError, match="^name: expected one that no other estimator has, got 'twice'"):

        class Other(Reinforce):
            name = "twice"

    class Nameless(Reinforce):
        """Registered under no name."""

    assert list(protocol.estimators()) == ["reinforce", "straight-through", "twice"]


def offer(folder, package, source):
    """Put a package that offers an estimator into a folder, as an installer does."""
    (folder / f"{package}.py").write_text(source)
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[maskpro_kernels.estimators]\n{package} = {package}:Offered\n")


def test_other_packages_offer_estimators(tmp_path, capsys, monkeypatch):
    """One that cannot be imported keeps the command from nothing."""
    offer(
        tmp_path,
        "one_that_works",
        "from maskpro_kernels import Reinforce\n"
        "class Offered(Reinforce):\n    name, summary = 'offered', 'of a package'\n",
    )
    offer(tmp_path, "one_that_does_not", "raise RuntimeError('its own\\nfault')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main.main(["learn", "--help"])
    captured = capsys.readouterr()
    assert "{reinforce,straight-through,offered}" in captured.out and "offered: of a package" in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("maskpro: warning: the estimator 'one_that_does_not' is left out: one_that_does_not:Offered")
    with pytest.raises(
        ValueError, match="^estimator: expected one of reinforce, straight-through, offered, got 'gone'"
    ):
        args = parser.build_parser().parse_args(["learn", *REQUIRED])
        args.estimator = "gone"
        complete(args)


def test_a_file_beside_the_others_is_enough(tmp_path, capsys, monkeypatch):
    (tmp_path / "one_more.py").write_text(
        "from .reinforce import Reinforce\nclass OneMore(Reinforce):\n    name = 'one-more'\n"
    )
    monkeypatch.setattr(learn_package, "__path__", [*learn_package.__path__, str(tmp_path)])
    with pytest.raises(SystemExit):
        main.main(["learn", "--help"])
    assert "{reinforce,straight-through,one-more}" in capsys.readouterr().out


def test_an_estimator_says_what_it_lacks():
    with pytest.raises(TypeError, match="^Journaled: expected a method recall, since its runs have a journal"):

        class Journaled(Estimator):
            journaled = True

    with pytest.raises(TypeError, match="abstract"):
        Estimator()
