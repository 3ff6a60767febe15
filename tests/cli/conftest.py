"""Fixtures of tests of the command, which import late as those of checkpoints do."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Only tests marked `pictures` have them drawn."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: open(path, "wb").close())


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Folder with a tiny model, `model`, and a text, `text.txt`."""
    from helpers.tiny_llama import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def run(inputs):
    """Folder of a finished run."""
    from helpers.command import learn
    from helpers.routes import route_to_the_eager_reference

    from maskpro_kernels.cli import main

    output = inputs / "runs" / "one"
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, output)) == 0
    return output
