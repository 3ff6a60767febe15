"""`maskpro plan`: what it tells of a config is what a run takes, and each number follows from its formula."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.allocated import allocated
from helpers.cases import slow
from helpers.command import contents, learn, refuses
from helpers.routes import take_route
from helpers.tiny_llama import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.cli import main, memory, planned
from maskpro_kernels.cli.parser import build_parser
from maskpro_kernels.cli.planned import Mesh
from maskpro_kernels.cli.run_settings import complete
from maskpro_kernels.hf import checkpoint_activations
from maskpro_kernels.learn.amounts import NOTHING, Amount
from maskpro_kernels.learn.memory import Activations
from maskpro_kernels.learn.snapshots import save_snapshot
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.text.losses import distillation_loss
from maskpro_kernels.unfuse import as_linears

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Its layers are no nn.Linear before they are taken apart
GPT2 = {"model_type": "gpt2", "vocab_size": 640, "n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 64}
MIXTURE = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LENGTH, ROWS = 64, 8
SIZES = f"--seq-len {LENGTH} --batch-size {ROWS} --eval-windows 1 --eval-length 8"


@pytest.fixture
def planning(tmp_path):
    """What the command tells of a config, as it is printed and as its file holds it."""

    def plan(config: dict, options: str = SIZES, room: str = "80GiB") -> dict:
        folder, output = tmp_path / config["model_type"], tmp_path / "plan.json"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        output.unlink(missing_ok=True)
        arguments = ["plan", str(folder), "--device-memory", room, "--output", str(output), *options.split()]
        assert main.main(arguments) == 0
        return json.loads(output.read_text())

    return plan


@pytest.fixture
def without_forwards(monkeypatch):
    """Of models that are too large for it: activations are not computed."""
    none = memory.OfBatches(Activations(ROWS, 0, 0), NOTHING, NOTHING, 0)
    monkeypatch.setattr(planned.Planned, "_batches", lambda planned, checkpointing: none)


def value_of(formula: str) -> float:
    """What comes out where one reckons it: words, and what parts thousands, are left out."""

    def sign(word: str) -> str:
        return {"x": "*"}.get(word, word if word in "+-/" else re.sub(r"[^\d.()]", "", word))

    return eval(" ".join(map(sign, formula.split())))


def check_formulas(told: dict) -> None:
    amounts = {**told["needed"], **told["main_memory"], "snapshots": told["snapshots_on_disk"]}
    for name, amount in amounts.items():
        assert value_of(amount["formula"]) == amount["bytes"], name
    for name, each in told.get("derived_seconds", {"parts": {}})["parts"].items():
        assert value_of(each["formula"]) == pytest.approx(each["seconds"], rel=1e-9), name


def bytes_of(told: dict) -> dict[str, int]:
    return {name: amount["bytes"] for name, amount in told["needed"].items()}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, "--dtype bfloat16"),
        slow(LLAMA, "--dtype float32 --gradient-checkpointing"),
        slow(LLAMA, "--dtype bfloat16 --estimator reinforce"),
        slow(LLAMA, "--dtype bfloat16 --train-weights 1e-3 --accumulate 2"),
        slow(GPT2, "--dtype float32 --loss kl"),
        slow(GPT2, "--dtype bfloat16 --logits-dtype bfloat16"),
    ],
)
def test_a_run_holds_what_was_told(planning, tmp_path, monkeypatch, config, options):
    told = planning(config, f"{SIZES} {options}")
    # the interpreter, the eager reference and poisoned allocations hold more than what users run
    take_route(monkeypatch, "compiled")
    monkeypatch.setattr(kernels, "torch", torch)
    args = build_parser().parse_args(["plan", "none", "--device-memory", "1GB", *options.split()])
    estimator = {"reinforce": mk.Reinforce, "straight-through": mk.StraightThrough}[args.estimator]
    kept = {}

    def begin():
        dtype, draw = memory.DTYPES[args.dtype], torch.Generator().manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tmp_path / config["model_type"]), dtype=dtype
        )
        as_linears(model)
        if args.gradient_checkpointing:
            checkpoint_activations(model)
        mk.convert(model, "2:4", gap=15.0, logits_dtype=memory.DTYPES[args.logits_dtype])
        batches = [torch.randint(0, config["vocab_size"], (ROWS, LENGTH), generator=draw) for _ in range(2)]
        own = estimator(train_weights=args.train_weights) if hasattr(args, "train_weights") else estimator()
        loss = distillation_loss(args.loss)
        kept["trainer"] = mk.MaskTrainer(model, loss, batches, own, seed=0, accumulate=args.accumulate)
        kept["trainer"].step()

    held = allocated(begin).left
    measured = held + allocated(kept["trainer"].step).peak
    assert told["on_device"] == pytest.approx(measured, rel=0.1)


def test_it_tells_what_learn_tells(planning, inputs):
    """By one arithmetic: of the parts that are no activations to the byte."""
    options = "--seq-len 48 --batch-size 6 --dtype float32 --eval-windows 2 --eval-length 24 --train-weights 1e-3"
    model = tiny_model()
    told = bytes_of(planning(model.config.to_dict(), options))
    args = build_parser().parse_args(learn(inputs, "none", "--estimator", "straight-through", *options.split()))
    need = vars(memory.needed_memory(args, complete(args), 1, model))
    activations = told.pop("activations")
    assert told == {name: size for name, size in need.items() if name != "activations"}
    # of so narrow a model
    assert activations == pytest.approx(need["activations"], rel=0.08)


def test_llama_2_7b_has_the_sizes_that_its_arithmetic_gives(planning, without_forwards, capsys):
    told = planning(LLAMA_2_7B, f"{SIZES} --logits-device cpu --gpu h100", "24GiB")
    assert told["masked_weights"] == 6_476_005_376 and told["masked_layers"] == 224
    assert bytes_of(told)["logits"] == 4 * 6_476_005_376
    assert bytes_of(told)["weights"] == pytest.approx(2 * 6_738_415_616, abs=4096)
    assert bytes_of(told)["copies"] == 3 * 4 * 4096 * 11008
    # torch rounds page-locked memory up, see docs/large-models.md
    assert told["main_memory"]["logits"]["bytes"] == 32 << 30
    assert told["on_device"] == sum(bytes_of(told).values()) - bytes_of(told)["logits"]
    check_formulas(told)
    out = capsys.readouterr().out
    assert "without a mask: lm_head, output head" in out
    assert "weights               13.48  6,738,415,616 weights x 2 bytes" in out
    assert "derived, not measured" in out


def test_llama_2_70b_is_shared_out_over_a_mesh(planning, without_forwards, capsys):
    one, eight = (bytes_of(planning(LLAMA_2_70B, f"{SIZES} --mesh {mesh}", "640GiB")) for mesh in (1, 8))
    assert "8 devices stand for sharding by torch's FSDP2" in capsys.readouterr().out
    assert one["logits"] == 4 * 68_451_041_280 and one["gathered"] == 0
    for part in ("weights", "logits", "masks", "optimizer"):
        assert eight[part] == pytest.approx(one[part] / 8, rel=1e-6), part
    block = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672 + 2 * 8192
    assert eight["gathered"] == 2 * (2 * block + 2 * 32000 * 8192 + 8192)
    # a replica of each: nothing is shared out further
    twice = planning(LLAMA_2_70B, f"{SIZES} --mesh 2x8 --gpu b200", "640GiB")
    assert bytes_of(twice) == eight and twice["settings"]["mesh"] == "2x8"
    check_formulas(twice)


@pytest.mark.slow
def test_llama_2_70b_with_its_forwards(planning):
    told = planning(LLAMA_2_70B, "--mesh 8")
    check_formulas(told)
    assert told["tried"][-1]["fits"] and bytes_of(told)["activations"] > 100e9


@pytest.mark.parametrize(
    "options",
    [
        "--mesh 3 --accumulate 2 --gpu a100",
        "--loss ce+kl --train-weights 1e-4 --dtype float32 --mesh 2x1",
        "--loss kl --gpu a100",
        "--estimator reinforce --draws 3 --gpu h100 --logits-device cpu --logits-dtype bfloat16",
        "--pattern 8:16 --gradient-checkpointing --batch-size 2 --eval-windows 9 --eval-length 200",
    ],
)
def test_each_number_follows_from_its_formula(planning, options):
    told = planning(LLAMA, f"{SIZES} {options}", "1MiB")
    check_formulas(told)
    held = bytes_of(told)
    on_cpu = held["logits"] if told["settings"]["logits_on_cpu"] else 0
    assert told["on_device"] == sum(held.values()) - on_cpu
    assert told["device_memory"] == 1 << 20
    # those of the estimator, too, with what was left out
    for option, value in (("--train-weights", 1e-4), ("--draws", 3)):
        assert (told["settings"].get(option[2:].replace("-", "_")) == value) == (option in options)
    assert told["settings"]["lr"] == (50 if "reinforce" in options else 0.3)
    if "derived_seconds" in told:
        parts = {name: each["seconds"] for name, each in told["derived_seconds"]["parts"].items()}
        computed = parts.pop("products") + parts.pop("masks")
        assert told["derived_seconds"]["step"] == max([computed, *parts.values()])


def test_the_forward_of_the_teacher_takes_seconds_as_well(planning, without_forwards):
    """One more in each forward of a step, but where what it says was written down before."""

    def multiplied(options):
        told = planning(LLAMA, f"{SIZES} --gpu h100 {options}")["derived_seconds"]["parts"]["products"]["formula"]
        return [int(times) for times in re.findall(r"[(+] ?(\d+) x", told)]

    assert multiplied("") == multiplied("--loss kl --train-weights 1e-4") == [6, 4]
    assert multiplied("--loss kl") == [8, 6] and multiplied("--loss ce+kl --gradient-checkpointing") == [10, 6]
    assert multiplied("--loss kl --estimator reinforce") == [4, 4]


def test_ranks_of_learn_hold_all_of_it_each(planning, without_forwards, capsys):
    one, ranks, shards = (bytes_of(planning(LLAMA, f"{SIZES} --mesh {mesh}")) for mesh in ("1", "8x1", "8"))
    out = capsys.readouterr().out
    assert "8 devices hold all of it each, as the ranks of `maskpro learn` under torchrun do\n" in out
    assert "held for them; `maskpro learn` itself shards nothing\n" in out and shards["gathered"] > 0
    # the slopes of all layers wait for the other ranks
    assert ranks["gradients"] - one["gradients"] == 4 * 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 256)
    assert ranks == one | {"gradients": ranks["gradients"]}


def test_uneven_rows_are_padded_as_fsdp2_does(planning):
    """The shards of torch's own fully_shard, of a group of which only one process is there."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = LLAMA | {"hidden_size": 36, "intermediate_size": 44, "vocab_size": 101, "num_attention_heads": 2}
    told = bytes_of(planning(config, f"{SIZES} --mesh 5 --dtype float32"))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (5,))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        own = sum(parameter.to_local().nbytes for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert told["weights"] == own + buffers


def test_a_snapshot_takes_what_was_told(planning, tmp_path):
    told = planning(LLAMA, f"{SIZES} --train-weights 1e-3 --dtype float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    mk.convert(model, "2:4", gap=15.0)
    estimator, layers = mk.StraightThrough(train_weights=1e-3), masked_layers(model)
    estimator.begin(layers)
    tensors = {f"logits/{name}": layer.logits.detach() for name, layer in layers.items()} | estimator.tensors()
    for step in range(4):
        path = save_snapshot(tmp_path, step, tensors, {})
    assert told["snapshots_on_disk"]["bytes"] == pytest.approx(4 * path.stat().st_size, rel=0.02)
    assert len(list(tmp_path.glob("snapshot-*"))) == 3


@pytest.mark.slow
def test_the_ways_that_are_told_fit(planning, capsys):
    """Each with the bytes that it has when it is given."""
    sizes, room = "--seq-len 16 --batch-size 3 --eval-windows 1 --eval-length 8", 1_400_000
    plain = planning(LLAMA, sizes)
    assert capsys.readouterr().out.endswith("options        GB\nas given     0.00  fits\n")
    told = planning(LLAMA, sizes, f"{room / 1000}KB")
    assert "the sum, which does not fit into 0.00 GB" in (out := capsys.readouterr().out)
    given, *others = told["tried"]
    assert given == {"options": [], "on_device": plain["on_device"], "fits": False}
    ways = [["--gradient-checkpointing"], ["--logits-device cpu"], ["--gradient-checkpointing", "--logits-device cpu"]]
    assert [way["options"] for way in others] == [*ways, ["--mesh 16"]]
    assert [way["fits"] for way in others] == [False, False, True, True]
    assert "take --gradient-checkpointing --logits-device cpu, or --mesh 16\n" in out
    for way in others:
        again = planning(LLAMA, " ".join([sizes, *way["options"]]))
        assert again["on_device"] == pytest.approx(way["on_device"], rel=0.01)


def test_devices_are_of_use_where_activations_are_computed_anew(planning):
    """Of one device neither weights nor activations fit; more devices share out weights alone."""
    sizes = "--seq-len 64 --batch-size 2 --eval-windows 1 --eval-length 8"
    *_, last = planning(LLAMA, sizes, "1250KB")["tried"]
    assert last["fits"] and last["options"][0].startswith("--mesh ")
    assert last["options"][1:] == ["--gradient-checkpointing"]


def test_where_nothing_fits_it_says_so(planning, capsys):
    told = planning(LLAMA, f"{SIZES} --estimator reinforce", "1KB")
    assert not any(way["fits"] for way in told["tried"])
    windows = ["--batch-size 1", f"--accumulate {ROWS}"]
    assert told["tried"][-1]["options"] == [*windows, "--logits-dtype bfloat16", "--logits-device cpu"]
    # sharded logits lie with their weights
    sharded = planning(LLAMA, f"{SIZES} --estimator reinforce --mesh 2", "1KB")["tried"]
    assert [*windows, "--logits-dtype bfloat16"] in [way["options"] for way in sharded]
    assert not any("--logits-device cpu" in way["options"] for way in sharded)
    # no forward is taken back by blocks that are computed anew
    assert not any("--gradient-checkpointing" in way["options"] for way in told["tried"])
    assert "nothing fits: take devices with more memory" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_model_is_read_from_its_package(capsys):
    assert main.main(["plan", "smollm2-135m", "--device-memory", "8GiB"]) == 0
    assert "2:4 masks on 210 nn.Linear layers with 106,168,320 weights" in capsys.readouterr().out


def test_experts_count_one_by_one(planning):
    told = planning(MIXTURE, f"{SIZES} --dtype bfloat16")
    # the routers are no nn.Linear
    assert told["masked_layers"] == 3 * (4 + 4 * 3)
    assert told["masked_weights"] == 3 * (64 * (64 + 32 + 32 + 64) + 4 * 3 * 64 * 256)
    check_formulas(told)


def test_a_mesh_and_a_size_are_read():
    parser = build_parser()

    def parsed(*options):
        return parser.parse_args(["plan", "model", "--device-memory", "1.5GiB", *options])

    assert parsed().device_memory == 3 << 29 and parsed().mesh == Mesh(1, 1)
    assert parsed("--mesh", "8").mesh == Mesh(8, 1)
    assert parsed("--mesh", "2x4").mesh == Mesh(4, 2) and parsed("--mesh", "2x4").mesh.devices == 8
    assert parser.parse_args(["plan", "model", "--device-memory", "80GB"]).device_memory == 80_000_000_000


def test_amounts_tell_how_they_came_about():
    two = Amount.of(3, "rows", 4) + Amount.of(1, "groups", 1)
    assert two == 13 and two.formula == "3 rows x 4 bytes + 1 groups x 1 byte"
    assert (two + NOTHING).formula == two.formula and (NOTHING + 7).formula == "7 bytes"
    assert sum([two, two]).formula == f"{two.formula} + {two.formula}"


UNFIT = {
    "no config": ({}, "", "model: expected a folder with a config.json", "which has none"),
    "no JSON": ("{", "", "model: expected the config of a causal language model", "not a valid JSON file"),
    "unknown architecture": ({"model_type": "none"}, "", "model: expected the config of", "model type `none`"),
    "no causal model": ({"model_type": "t5"}, "", "model: expected the config of a causal language model", "T5Config"),
    "sizes that do not fit": (LLAMA | {"hidden_size": -4}, "", "model: expected the config of", "negative dimension"),
    "packed or quantized": (
        LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "",
        "model: expected one whose weights are dense",
        "'gptq'; give the model that it is made of",
    ),
    "no layer that the pattern divides": (
        LLAMA | {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 2},
        "--pattern 2:8",
        "model: expected an nn.Linear that 2:8 fits",
        "in_features 36 not divisible by 8",
    ),
    "no pattern": (LLAMA, "--pattern 4:2", "pattern: expected N:M", "got 4:2"),
    "no unit": (LLAMA, "--device-memory 80", "--device-memory: expected a size above 0 in KB, KiB", "got '80'"),
    "unknown unit": (LLAMA, "--device-memory 80GX", "--device-memory: expected a size", "got '80GX'"),
    "no memory": (LLAMA, "--device-memory 0GB", "--device-memory: expected a size above 0", "got '0GB'"),
    "no size of a memory": (
        LLAMA,
        f"--device-memory {'9' * 400}GB",
        "--device-memory: expected a size above 0",
        "such as 80GiB",
    ),
    "no devices": (LLAMA, "--mesh 0", "--mesh: expected a number of devices, such as 8", "got '0'"),
    "a mesh with nothing in it": (
        LLAMA,
        "--mesh 2x0",
        "--mesh: expected a number of devices",
        "such as 2x4, got '2x0'",
    ),
    "a mesh of three": (LLAMA, "--mesh 2x2x2", "--mesh: expected", "got '2x2x2'"),
    "shards of weights that learn": (
        LLAMA,
        "--mesh 2x4 --train-weights 1e-4",
        "mesh: expected no shards beside --train-weights 0.0001",
        "got 2x4; take 8x1",
    ),
    "shards beside a teacher": (
        LLAMA,
        "--mesh 4 --loss kl",
        "mesh: expected no shards beside --loss kl",
        "got 4; take",
    ),
    "shards beside logits elsewhere": (
        LLAMA,
        "--mesh 4 --logits-device cpu",
        "mesh: expected no shards beside --logits-device cpu",
        "got 4; take",
    ),
    "no windows": (LLAMA, "--batch-size 0", "batch_size: expected at least 1", "got 0"),
    "more tokens than positions": (GPT2, "--seq-len 65", "seq_len: expected at most 64", "got 65"),
    "an option of another estimator": (LLAMA, "--draws 2", "draws: expected none", "of reinforce alone"),
    "no backward": (
        LLAMA,
        "--estimator reinforce --gradient-checkpointing",
        "gradient_checkpointing: expected an estimator with a backward pass",
        "leave it out",
    ),
    "an unknown card": (LLAMA, "--gpu v100", "--gpu: invalid choice: 'v100'", "choose from"),
    "costs that are not known": (LLAMA, "--gpu h100 --pattern 1:4", "gpu: expected --pattern 2:4", "leave it out"),
    "rates that are not known": (LLAMA, "--gpu h100 --dtype float32", "gpu: expected --dtype bfloat16", "leave it out"),
    "seconds of a mixture": (
        MIXTURE,
        "--gpu h100",
        "gpu: expected a model whose tokens pass all layers",
        "leave it out",
    ),
    "experts in another dtype": (
        MIXTURE,
        "--dtype float32",
        "model: expected one whose forward runs on shapes alone, got MixtralForCausalLM",
        "take another --dtype",
    ),
    "a file that is there": (LLAMA, "--output config.json", "output: expected a new file", "give another name"),
    "no memory at all": (LLAMA, None, "are required: --device-memory", "`maskpro plan --help` tells"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_unfit_is_told_in_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    config, options, *messages = UNFIT[name]
    if config:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", str(tmp_path)]
    if options is not None:
        # what stands last counts
        arguments += ["--device-memory", "1GB", "--output", "plan.json", *options.split()]
    refuses(capsys, tmp_path, arguments, *messages)
    assert "plan.json" not in {path.name for path in contents(tmp_path)}
