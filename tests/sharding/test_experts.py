"""Experts of a mixture that ranks share: each matrix learns as on one process, however its parameter was cut."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from helpers import cut_models
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.moe_jobs import EXPERTS, PLANS, converted, learn, of_transformers, shard_blocks, write_checkpoint
from helpers.refusals import assert_lines, lines_of
from helpers.sharded_jobs import whole_logits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.digests import digest
from maskpro_kernels.files import discard
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.shards import whole
from maskpro_kernels.unfuse import experts, taken_apart

STEPS = 20
# Of four ranks those that have "and" in their names, else of two
COPIES = "copies and shards"
CUTS = ["plan", "fsdp", "fully_shard", "fsdp and plan", "data and plan", COPIES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"))


def in_its_ranks(cut_by: str | None, **of) -> list[dict]:
    if cut_by is None:
        return [learn(0, **of)]
    return all_in_ranks(4 if "and" in cut_by else 2, learn, cut_by=cut_by, **of)


def assert_as_one_process(theirs: dict, alone: dict) -> None:
    for name in ("converted", "losses", "digest", "built"):
        assert theirs[name] == alone[name], name
    torch.testing.assert_close(theirs["outputs"], alone["outputs"], rtol=1e-4, atol=1e-5)
    if theirs["tokens"] is not None:
        assert_same_bits(theirs["tokens"], alone["tokens"])


def outputs_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 14)[None], use_cache=False).logits


def unchanged_by_a_refusal(path: str, rank: int, cut_by: str, pattern: str, targets: list[str] | None = None) -> None:
    """``convert``, which raises, and leaves what it was given."""
    model = of_transformers(path, rank, **PLANS[cut_by])
    before, parameters = outputs_of(model), dict(model.named_parameters())
    try:
        mk.convert(model, pattern, targets=targets)
    finally:
        after = dict(model.named_parameters())
        assert after.keys() == parameters.keys() and not taken_apart(model)
        if cut_by == "plan":
            assert all(after[name] is parameters[name] for name in after)
        assert_same_bits(outputs_of(model), before)


def loaded_by_shards(path: str) -> torch.nn.Module:
    config = Qwen3MoeConfig.from_pretrained(path)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    # a buffer that is computed
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    shard_blocks(model, init_device_mesh("cpu", (2,)))
    mk.load_checkpoint_shards(model, path)
    return model


def refused(path: str, rank: int) -> dict:
    """What is refused, and how the line begins."""
    down = f"{EXPERTS}.linears.down_proj.0"
    return {
        "columns that cut groups": (
            lambda: unchanged_by_a_refusal(path, rank, "plan", "8:16"),
            "model: expected a weight that a tensor-parallel plan has cut into rows or columns, got columns in "
            f"{down}: 16 over 2 ranks are 8 each, which cuts groups of 16",
        ),
        "no layer of that name": (
            lambda: unchanged_by_a_refusal(path, rank, "fsdp", "2:4", [f"{EXPERTS}.linears.gate_up_proj.0"]),
            "targets: expected each to match an nn.Linear",
        ),
        "names of another format": (
            lambda: loaded_by_shards(path),
            "checkpoint: expected values for all of the model that is on meta or stored, got none for "
            f"{EXPERTS}.gate_up_proj",
        ),
    }


def several(rank: int, path: str) -> dict:
    found = {cut_by: learn(rank, path, 2, cut_by) for cut_by in ("plan", "fsdp")}
    return found | {"refused": lines_of(refused(path, rank))}


def test_experts_under_a_plan_and_fsdp2_learn_by_the_bits_of_one_process(checkpoint, eager_reference):
    alone = learn(0, checkpoint, 2)
    # 4 experts with 3 matrices each, and 4 of attention, twice
    assert len(alone["converted"]) == 32
    for results in all_in_ranks(2, several, path=checkpoint):
        assert_lines(results.pop("refused"), refused(checkpoint, 0))
        for theirs in results.values():
            assert_as_one_process(theirs, alone)


def where_rows_lie(rank: int, path: str) -> dict[str, tuple]:
    model, _ = converted(path, "plan", rank)
    return {name: (layer.place, layer.own_logits.shape) for name, layer in masked_layers(model).items()}


@pytest.mark.slow
def test_each_matrix_has_the_counter_of_its_placement(checkpoint):
    first, second = all_in_ranks(2, where_rows_lie, path=checkpoint)
    for expert in range(4):
        for name in ("gate_proj", "up_proj"):
            # 8 of 16 rows, with 8 groups each
            assert first[f"{EXPERTS}.linears.{name}.{expert}"] == ((0, 8), (8, 32))
            assert second[f"{EXPERTS}.linears.{name}.{expert}"] == ((64, 8), (8, 32))
        assert first[f"{EXPERTS}.linears.down_proj.{expert}"] == ((0, 4), (32, 8))
        assert second[f"{EXPERTS}.linears.down_proj.{expert}"] == ((2, 4), (32, 8))


@pytest.mark.slow
@pytest.mark.parametrize("cut_by", CUTS)
def test_meshes_learn_by_the_bits_of_one_process(cut_by, checkpoint, eager_reference):
    of = {"path": checkpoint, "steps": STEPS, "accumulate": 4 if cut_by == COPIES else 2}
    alone = learn(0, **of)
    # they have moved from 2 where a weight is kept, and 0
    assert all((one % 2 != 0).any() for one in alone["logits"])
    for theirs in in_its_ranks(cut_by, **of):
        assert_as_one_process(theirs, alone)


@pytest.mark.slow
def test_copies_of_shards_of_a_llama_learn_by_the_bits_of_one_process(tmp_path, eager_reference):
    of = {"path": cut_models.write_checkpoint("llama", tmp_path), "steps": STEPS, "accumulate": 4}
    alone = learn(0, **of)
    for theirs in in_its_ranks(COPIES, **of):
        assert_as_one_process(theirs, alone)


@pytest.mark.slow
@pytest.mark.parametrize("cut_by", CUTS)
def test_straight_through_learns_the_masks_of_one_process(cut_by, checkpoint, eager_reference):
    accumulate = 4 if cut_by == COPIES else 2
    of = {"path": checkpoint, "steps": STEPS, "how": "straight-through", "accumulate": accumulate}
    alone = learn(0, **of)
    results = in_its_ranks(cut_by, **of)
    assert len({theirs["digest"] for theirs in results}) == 1
    theirs = results[0]
    assert theirs["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for one, other in zip(theirs["logits"], alone["logits"], strict=True):
        assert ((one - other).abs() < 1e-3).float().mean() > 0.99
        assert (mk.top_n_mask(one, "2:4") == mk.top_n_mask(other, "2:4")).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [("plan", "fsdp"), ("fsdp", "plan"), ("plan", None), (None, "plan"), ("fsdp and plan", "plan"), ("fsdp", None)],
)
def test_runs_go_on_with_other_meshes(meshes, checkpoint, tmp_path, eager_reference):
    """By the journal too: the second part takes the last steps of the first one again."""
    folder = str(tmp_path / "run")
    for cut_by, steps in zip(meshes, (3, 6), strict=True):
        results = in_its_ranks(cut_by, path=checkpoint, steps=steps, folder=folder)
        discard(max(Path(folder).glob("snapshot-*")))
    assert {theirs["digest"] for theirs in results} == {learn(0, checkpoint, 6)["digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("cut_by", ["plan", "fsdp", "fsdp and plan"])
def test_what_ranks_have_saved_is_read_by_one_process(cut_by, checkpoint, tmp_path, eager_reference):
    alone = learn(0, checkpoint, 2)
    in_its_ranks(cut_by, path=checkpoint, steps=2, save=str(tmp_path))
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    assert_same_bits(whole_logits(masked), alone["logits"])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    mk.finalize(masked)
    for one, other in zip(dense.parameters(), masked.parameters(), strict=True):
        assert_same_bits(one, other)


def of_uneven_shares(rank: int, path: str, mesh: list[int]) -> tuple[str, list[str]]:
    """Digests of logits after two steps, and of the parameters of the finished model, that fully_shard has cut."""
    model = AutoModelForCausalLM.from_pretrained(path)
    shard_blocks(model, init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("replicate", "fsdp")[-len(mesh) :]))
    mk.convert(model, "2:4", gap=2.0)
    logits = digest(whole_logits(model))
    mk.finalize(model)
    return logits, [digest([whole(parameter.detach())]) for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[3], [2, 2]], ids=str)
def test_shares_of_experts_may_be_uneven_or_copied(mesh, checkpoint):
    """Of three ranks one has no expert, and others have more rows of each."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    mk.convert(model, "2:4", gap=2.0)
    logits = digest(whole_logits(model))
    mk.finalize(model)
    expected = sorted(digest([parameter.detach()]) for parameter in model.parameters())
    world = torch.Size(mesh).numel()
    for theirs, parameters in all_in_ranks(world, of_uneven_shares, path=checkpoint, mesh=mesh):
        assert theirs == logits and sorted(parameters) == expected


def still_held(rank: int, path: str, cut_by: str) -> list[str]:
    """What experts had as weights before ``convert``, or before ``finalize``, and is there behind it."""
    model = of_transformers(path, rank, **PLANS[cut_by])

    def own_parts() -> dict[str, weakref.ref]:
        named = model.named_parameters()
        own = {name: x._local_tensor for name, x in named if "experts" in name and "logits" not in name}
        return {name: weakref.ref(part) for name, part in own.items()}

    parts = own_parts()
    assert len(parts) == 4 and all(part() is not None for part in parts.values())
    mk.convert(model, "2:4")
    # FSDP2's accounts of parameters refer to themselves
    gc.collect()
    # what a plan has cut lies where it lay
    held = [name for name, part in parts.items() if part() is not None]
    parts = own_parts()
    assert len(parts) == 24 and all(part() is not None for part in parts.values())
    mk.finalize(model)
    gc.collect()
    return held + [name for name, part in parts.items() if part() is not None]


@pytest.mark.slow
@pytest.mark.parametrize("cut_by", ["plan", "fsdp"])
def test_weights_are_held_once_behind_each_change(cut_by, checkpoint):
    assert all_in_ranks(2, still_held, path=checkpoint, cut_by=cut_by) == [[], []]


def unfit(rank: int, path: str) -> list[str]:
    """Experts of one rank that another rank cannot see, and an error once a parameter has been taken apart."""
    model = of_transformers(path, rank, **PLANS["fsdp"])
    before = outputs_of(model)
    layers_of_shards, calls = experts.layers_of_shards, []

    def fails(*of):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError("too large")
        return layers_of_shards(*of)

    experts.layers_of_shards = fails
    with pytest.raises(MemoryError, match="too large"):
        mk.convert(model, "2:4")
    experts.layers_of_shards = layers_of_shards
    assert_same_bits(outputs_of(model), before)
    parameter = model.get_submodule(EXPERTS).down_proj
    if rank == 1:
        with torch.no_grad():
            parameter._local_tensor[0] = math.nan
    return mk.convert(model, "2:4", targets=["*.self_attn.*"]).skipped[EXPERTS]


def test_ranks_agree_on_what_is_taken_apart(checkpoint):
    told = "its forward does more with the matrices than multiply"
    assert all_in_ranks(2, unfit, path=checkpoint) == [told, told]


def left_out(rank: int, path: str) -> dict[str, str]:
    """Why ``convert`` has left experts out, by how they were cut."""
    spread = of_transformers(path, rank, tp_size=2, ep_size=2)
    by_columns = AutoModelForCausalLM.from_pretrained(path)
    experts = by_columns.get_submodule(EXPERTS)
    fully_shard(experts, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda _: Shard(1))
    targets = ["*.self_attn.*"]
    told = {"by experts": mk.convert(spread, "2:4", targets=targets).skipped[EXPERTS]}
    return told | {"by rows": mk.convert(by_columns, "2:4", targets=targets).skipped[EXPERTS]}


@pytest.mark.slow
def test_experts_that_are_cut_otherwise_are_left_out_by_name(checkpoint):
    for told in all_in_ranks(2, left_out, path=checkpoint):
        assert told == {
            "by experts": "its experts are spread over devices",
            "by rows": "fully_shard has cut its parameter otherwise than by experts, or other modules share it",
        }


def of_a_few_layers(rank: int, path: str, cut_by: str | None) -> tuple[torch.Tensor | None, ...]:
    """Outputs under masks of some matrices of experts, of the dense model meanwhile, and of the finished one."""
    model = (
        AutoModelForCausalLM.from_pretrained(path) if cut_by is None else of_transformers(path, rank, **PLANS[cut_by])
    )
    mk.convert(model, "2:4", targets=[f"{EXPERTS}.linears.up_proj.[12]", f"{EXPERTS}.linears.down_proj.0"])
    masked = outputs_of(model.eval())
    if cut_by in (None, "plan"):
        with mk.dense(model):
            dense = outputs_of(model)
    else:
        # ranks are sent kept values alone
        dense = None
    return masked, dense, outputs_of(mk.finalize(model))


@pytest.mark.slow
@pytest.mark.parametrize("cut_by", ["plan", "fsdp", "fsdp and plan"])
def test_a_part_of_the_matrices_may_be_masked(cut_by, checkpoint):
    expected = of_a_few_layers(0, checkpoint, None)
    for found in all_in_ranks(4 if "and" in cut_by else 2, of_a_few_layers, path=checkpoint, cut_by=cut_by):
        for outputs, others in zip(found, expected, strict=True):
            if outputs is not None:
                torch.testing.assert_close(outputs, others, rtol=1e-4, atol=1e-5)


def logits_of_shards(rank: int, path: str) -> str:
    model = loaded_by_shards(path)
    mk.convert(model, "2:4", gap=2.0)
    return digest(whole_logits(model))


@pytest.mark.slow
def test_checkpoints_of_fused_experts_are_read_by_shards(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    mk.convert(model, "2:4", gap=2.0)
    expected = digest(whole_logits(model))
    assert all_in_ranks(2, logits_of_shards, path=str(tmp_path / "fused")) == [expected, expected]
