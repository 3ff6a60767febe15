"""All that a run may learn by, together, with other patterns and another architecture than elsewhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import learn, report
from helpers.tiny_llama import WORDS, tiny_tokenizer, write_inputs
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.functional.masks import expand_mask, top_n_mask

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "--estimator straight-through --lr 1".split()
WAYS = {
    "weights learn": [*STRAIGHT, *"--init reconstruction --refit weights --train-weights 1e-3 --loss ce+kl".split()],
    "weights refitted": [*STRAIGHT, *"--init wanda --refit weights --loss kl --loss-temperature 2".split()],
    "rows scaled": [*STRAIGHT, *"--init reconstruction --refit scales".split()],
    "weights frozen": [*STRAIGHT, *"--init reconstruction --loss kl".split()],
    "reinforce": "--estimator reinforce --draws 2 --init wanda --refit weights --loss ce+kl".split(),
}
PATTERNS = ["1:4", "4:8", "8:16"]


def tiny_neox() -> GPTNeoXForCausalLM:
    """Biases, layer norms, attention beside the feed-forward part, and one product for queries, keys and values."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPTNeoXForCausalLM(config).eval()


@pytest.fixture(scope="module")
def by_architecture(tmp_path_factory):
    """Folders of a model and a text each."""
    found = {name: write_inputs(tmp_path_factory.mktemp(name)) for name in ("llama", "neox")}
    tiny_neox().save_pretrained(found["neox"] / "model")
    tiny_tokenizer().save_pretrained(found["neox"] / "model")
    return found


def cases():
    """All there are; by default one of the way and of the architecture with most in it."""
    usual = ("weights learn", "neox", "1:4")
    for case in itertools.product(WAYS, ("llama", "neox"), PATTERNS):
        yield pytest.param(*case, marks=[] if case == usual else [pytest.mark.slow])


@pytest.mark.parametrize(("way", "architecture", "pattern"), list(cases()))
def test_a_checkpoint_is_what_its_run_has_learned(by_architecture, tmp_path, way, architecture, pattern):
    inputs, run = by_architecture[architecture], tmp_path / "run"
    data = f"{inputs / 'text.txt'}:0.5,self:0.5"
    dtype = "float16" if way == "weights refitted" else "bfloat16"
    options = [*WAYS[way], "--pattern", pattern, "--data", data, "--dtype", dtype, "--init-batches", "4"]
    assert main.main(learn(inputs, run, *options)) == 0
    told = report(run)
    assert all(math.isfinite(row["perplexity"]) for row in told["table"])
    learned, dense = load_logits(run / "logits.safetensors"), AutoModelForCausalLM.from_pretrained(inputs / "model")
    changes = "--refit" in options or "--train-weights" in options
    assert set(learned.weights) == (set(told["converted"]) if changes else set()) and len(told["converted"]) >= 8
    sparse = AutoModelForCausalLM.from_pretrained(run, dtype="auto")
    for name, logits in learned.logits.items():
        # converted before it is cast: so a run loads its model
        weight = learned.weights.get(name, dense.get_submodule(name).weight.detach().to(sparse.dtype))
        expected = torch.where(expand_mask(top_n_mask(logits, pattern), pattern), weight, 0)
        layer = sparse.get_submodule(name)
        assert_same_bits(layer.weight.detach(), expected)
        if layer.bias is not None:
            assert_same_bits(layer.bias.detach(), dense.get_submodule(name).bias.detach().to(sparse.dtype))
    assert main.main(["export", str(run), str(tmp_path / "packed"), "--to", "packed"]) == 0
    tokens = torch.arange(24).view(2, 12) % len(WORDS)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, sparse(tokens).logits, rtol=2e-2, atol=2e-2)
