from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from maskpro_kernels.hf import next_logits, preallocated_cache
from maskpro_kernels.text import batches
from maskpro_kernels.text.batches import BLOCK, drawn_indices, sample_windows, start_token


def test_a_window_begins_with_the_start_and_is_in_the_vocabulary():
    model = tiny_model()
    found = sample_windows(model, 3, 7, 9, batch_size=4)
    assert found.dtype == torch.int64 and found.shape == (7, 9) and found.device.type == "cpu"
    assert (found[:, 0] == 3).all() and 0 <= found.min() and found.max() < 32
    starts = sample_windows(model, None, 64, 2, batch_size=64)[:, 0]
    assert len(starts.unique()) > 16 and starts.max() < 32


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def sliding():
    config = MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, sliding_window=6, head_dim=16,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize("made", [tiny_model, gpt2, sliding])
def test_logits_by_the_cache_are_those_of_a_whole_forward(made):
    torch.manual_seed(0)
    model = made().eval()
    tokens = torch.randint(32, (5, 17))
    with torch.inference_mode():
        whole = model(tokens, use_cache=False).logits
        cache = preallocated_cache(model, 17)
        by_token = torch.stack([next_logits(model, tokens[:, at : at + 1], cache) for at in range(17)], dim=1)
    torch.testing.assert_close(by_token, whole, rtol=1e-4, atol=1e-5)


def test_the_cache_is_not_copied_as_it_fills():
    model = tiny_model()
    cache, places = preallocated_cache(model, 8), set()
    with torch.inference_mode():
        for _ in range(8):
            next_logits(model, torch.zeros(3, 1, dtype=torch.int64), cache)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1 and cache.layers[1].values.shape == (3, 1, 8, 16)


def test_second_tokens_follow_the_model():
    model = tiny_model()
    # a random model is nearly indifferent
    model.model.norm.weight.data *= 12
    drawn = sample_windows(model, 5, 20000, 2, batch_size=5000)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits[0, -1].softmax(0) * len(drawn)
    counts = torch.bincount(drawn, minlength=32)
    assert expected.max() > 2 * expected.min()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_those_of_their_seed(dtype, monkeypatch):
    model, seen = tiny_model().to(dtype), []
    whole = sample_windows(
        model, 1, 11, 6, batch_size=4, seed=3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 15) for done in range(1, 16)]
    # each batch by itself: of fewer windows the first are the same
    assert_same_bits(sample_windows(model, 1, 8, 6, batch_size=4, seed=3), whole[:8])
    assert not torch.equal(sample_windows(model, 1, 11, 6, batch_size=4, seed=4), whole)
    assert len(whole.unique(dim=0)) > 9
    for most in ((4, 1 << 16), (256, 27)):
        monkeypatch.setattr(batches, "TOGETHER", most[0])
        monkeypatch.setattr(batches, "TOKENS_TOGETHER", most[1])
        assert_same_bits(sample_windows(model, 1, 11, 6, seed=3), whole)
    monkeypatch.setattr(batches, "TOKENS_TOGETHER", 5)
    alone = sample_windows(model, 1, 2, 6, batch_size=1, seed=3)
    assert_same_bits(sample_windows(model, 1, 2, 6, seed=3), alone)


def test_the_mode_stays_and_nothing_keeps_a_gradient():
    model = tiny_model().train()
    assert not sample_windows(model, 1, 2, 3).requires_grad
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_logits_that_are_not_finite():
    model = tiny_model()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="model: expected finite logits"):
        sample_windows(model, 1, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 32}, "start: expected a token below 32, the size of the vocabulary, got 32"),
        ({"windows": 0}, "windows: expected an int of at least 1, got 0"),
        ({"length": 1}, "length: expected an int of at least 2, got 1"),
    ],
)
def test_arguments_that_are_refused(change, message):
    arguments = {"start": 1, "windows": 5, "length": 4, "batch_size": 2} | change
    with pytest.raises(ValueError, match=message):
        sample_windows(tiny_model(), **arguments)


def test_the_start_is_the_beginning_of_text_else_its_end():
    tokenizer = tiny_tokenizer()
    assert start_token(tokenizer) is None
    tokenizer.eos_token = "w3"
    assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids("w3")
    tokenizer.bos_token = "w0"
    assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids("w0")


@pytest.mark.parametrize("count", [7, BLOCK, BLOCK + 44])
def test_indices_are_as_frequent_as_likely(count):
    """With a part of a block of sums, one block, or more."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(1, count, generator=generator)
    logits[0, count // 2] = -torch.inf
    probabilities = logits.softmax(-1)
    uniform = torch.rand(1 << 17, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    drawn = torch.cat([drawn_indices(probabilities.expand(len(part), -1), part) for part in uniform.split(1 << 14)])
    assert drawn[:2].tolist() == [0, count - 1]
    expected = probabilities[0].double() * len(drawn)
    counts = torch.bincount(drawn, minlength=count)
    assert counts[count // 2] == 0
    assert ((counts - expected).abs() < 6 * expected.sqrt() + 6).all()
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    assert chi_square < count + 6 * (2 * count) ** 0.5


def test_weights_need_not_sum_to_one():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.74, 0.75, 0.99], dtype=torch.float64)
    assert drawn_indices(weights, uniform).tolist() == [1, 1, 3, 3]
