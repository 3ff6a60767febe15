"""Kernels run under Triton's interpreter where there is no GPU, or compiled on an emulator that executes them."""

from __future__ import annotations

import importlib
import os
import pkgutil

import hypothesis
import pytest
import torch

from gpu_emulators.plugin import TARGET

# helpers are imported below that alone
pytest.register_assert_rewrite("helpers")

# read by huggingface_hub when it is imported: no test asks the hub
os.environ["HF_HUB_OFFLINE"] = "1"

# read by triton when it is imported
if TARGET not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """Adapt to Triton, which interprets, compiles for a GPU, or compiles for an emulator."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        # xdist's first process runs no test
        return
    from maskpro_kernels.ops.triton import tiles

    target = config.getoption("compiled")
    if tiles.INTERPRETED:
        from helpers.interpreter import launch_in_a_thread, patch_the_language_once, widen_bfloat16_exactly

        widen_bfloat16_exactly()
        patch_the_language_once()
        launch_in_a_thread()
    if target is not None:
        tiles.ON_CPU = tiles.TARGET_OF[target]


hypothesis.settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def poisoned(emulator, monkeypatch):
    """Poison memory that ops allocate, which shows missing writes, and writes beyond the end.

    The emulator sees both by itself, to the byte, in what its own torch has allocated. Of a GPU's memory only missing
    writes show, for tests measure how much is held.
    """
    from helpers.poison import PoisonedTorch

    from maskpro_kernels.ops import triton as kernel_files
    from maskpro_kernels.ops.cpu import kernels
    from maskpro_kernels.ops.cpu.packed_gemm import products

    poisoned_torch = PoisonedTorch()
    for module in (kernels, products):
        monkeypatch.setattr(module, "torch", poisoned_torch)
    for file in pkgutil.iter_modules(kernel_files.__path__):
        module = importlib.import_module(f"{kernel_files.__name__}.{file.name}")
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", emulator.torch if emulator else poisoned_torch)
    if emulator:
        from maskpro_kernels.ops.triton import grouped

        launch = grouped.launch_on_group

        def launch_on_group(kernel, name, group, *args, **how):
            with emulator.reaching("table", [*(layer.logits for layer in group.layers), *(group.codes or ())]):
                launch(kernel, name, group, *args, **how)

        monkeypatch.setattr(grouped, "launch_on_group", launch_on_group)
    yield poisoned_torch
    poisoned_torch.check_margins()


@pytest.fixture
def launched():
    """The launch counter, cleared: proof that a kernel ran."""
    from maskpro_kernels.ops.triton.launch import launches

    launches.clear()
    return launches


@pytest.fixture
def eager_reference(monkeypatch):
    """CPU tensors go to the eager reference: for tests of what is built on the operations."""
    from helpers.routes import route_to_the_eager_reference

    route_to_the_eager_reference(monkeypatch)


@pytest.fixture
def compiled_reference(monkeypatch):
    """CPU tensors go to the reference as emulator code, as users have it: for tests of many steps."""
    from helpers.routes import take_route

    take_route(monkeypatch, "compiled")


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch):
    """Let the library ``datasets`` cache files in folders of tests, without the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # after each stream of parquet files, where the library has it
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
