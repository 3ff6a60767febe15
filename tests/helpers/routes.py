"""Choice of the code that runs the operations of a test."""

from __future__ import annotations

from maskpro_kernels.ops import dispatch


def take_route(monkeypatch, route):
    """CPU tensors go to the "kernels" in Triton's interpreter, to the "compiled" reference, or to the "eager" one."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: route == "kernels")
    monkeypatch.setattr(dispatch, "compiler_available", lambda: route == "compiled")


def route_to_the_eager_reference(monkeypatch):
    take_route(monkeypatch, "eager")
