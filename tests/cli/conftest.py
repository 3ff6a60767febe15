"""What most tests of the command run on."""

from __future__ import annotations

import pytest
from helpers.command import learn
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import write_inputs
from matplotlib.figure import Figure

from maskpro_kernels.cli import main

BLANK = {"svg": '<svg viewBox="0 0 1 1"><defs></defs></svg>', "png": "\x89PNG"}


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pictures take a third of a small run: only tests marked `pictures` have them drawn."""
    if request.node.get_closest_marker("pictures"):
        return

    def blank(figure, file, format="png", **_):
        if hasattr(file, "write"):
            file.write(BLANK[format])
        else:
            file.write_bytes(BLANK[format].encode("latin-1"))

    monkeypatch.setattr(Figure, "savefig", blank)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Folder with a tiny model, `model`, and a text, `text.txt`."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def run(inputs):
    """Folder of a finished run."""
    output = inputs / "runs" / "one"
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, output)) == 0
    return output
