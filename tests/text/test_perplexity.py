"""Loss and perplexity against computations that follow their definitions token by token."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.pages import pages
from helpers.tiny_llama import WORDS, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from maskpro_kernels.text.perplexity import (
    causal_lm_loss,
    context_length,
    detokenized,
    perplexity,
    rolling_windows,
    word_perplexity,
)

pytestmark = pytest.mark.usefixtures("eager_reference")


def ids(rows, length, seed=0):
    return torch.randint(len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def test_loss_is_that_of_transformers():
    model, batch = tiny_model(), ids(5, 17)
    loss = causal_lm_loss(model, batch)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(batch, labels=batch).loss)


def test_loss_is_differentiable():
    model, batch = tiny_model(), ids(2, 9)
    (ours,) = torch.autograd.grad(causal_lm_loss(model, batch), model.model.norm.weight)
    (theirs,) = torch.autograd.grad(model(batch, labels=batch).loss, model.model.norm.weight)
    torch.testing.assert_close(ours, theirs)


def test_loss_of_16_bit_logits_is_taken_in_float32():
    model, batch = tiny_model().to(torch.bfloat16), ids(3, 33)
    logits = model(batch).logits
    assert logits.dtype == torch.bfloat16
    expected = -logits.double().log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None]).mean()
    assert abs(causal_lm_loss(model, batch).item() - expected.item()) < 1e-6


ENCODERS = {
    "bert": lambda: BertLMHeadModel(BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, **SMALL)),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=16, d_inner=16, n_layer=1, n_head=2)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16)),
}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", ENCODERS)
def test_models_that_see_later_tokens_have_no_perplexity(name):
    model = ENCODERS[name]()
    for measure in (
        lambda: perplexity(model, ids(3, 12)),
        lambda: word_perplexity(model, tiny_tokenizer_with_end(), ["w1 w2 w3 w4 w5 w6"], 8),
    ):
        with pytest.raises(ValueError, match="^model: expected a causal language model, got (Bert|XLNet|Bart)"):
            measure()


def tiny_tokenizer_with_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    return tokenizer


def test_experts_of_a_causal_model_are_no_encoder():
    """Their products have other shapes if later tokens use them, and may be rounded otherwise."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, **sizes, **SMALL)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        assert perplexity(model.to(dtype), ids(3, 40)) > 1


def test_perplexity_reports_its_windows():
    done = []
    perplexity(tiny_model(), ids(5, 12), batch_size=2, progress=lambda *numbers: done.append(numbers))
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_perplexity_weighs_tokens_alike_and_leaves_the_mode():
    model, cut = tiny_model().train(), ids(7, 12)
    with torch.no_grad():
        expected = math.exp(sum(causal_lm_loss(model, row[None]).item() for row in cut) / 7)
    assert perplexity(model, cut, batch_size=4) == pytest.approx(expected, rel=1e-6)
    assert model.training and model.model.layers[0].training
    assert perplexity(model.eval(), cut, batch_size=7) == pytest.approx(expected, rel=1e-6)
    assert not model.training
    model.train().model.layers[1].eval()
    perplexity(model, cut)
    assert model.training and not model.model.layers[1].training


def test_perplexity_evaluates_in_eval_mode_without_gradients():
    class Model(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            assert not self.training and torch.is_inference_mode_enabled() and use_cache is False
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    assert perplexity(Model(1, 1).train(), ids(2, 5) % 4) == pytest.approx(4)


def test_perplexity_beyond_float_is_infinite():
    class Model(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.tensor([1e4, 0.0]).expand(*input_ids.shape, 2))

    assert perplexity(Model(1, 1), torch.ones(1, 3, dtype=torch.int64)) == math.inf


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 1), (1, 2, 3)])
def test_bad_shapes(shape):
    model, wrong = tiny_model(), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids: expected .*got"):
        causal_lm_loss(model, wrong)
    with pytest.raises(ValueError, match="windows: expected .*got"):
        perplexity(model, wrong)


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        perplexity(tiny_model(), ids(2, 5), batch_size=0)


def log_probability(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        return model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()


def ending_tokenizer(begins: bool = False):
    """With a token that text ends with; or with one that the tokenizer puts in front of each text as well."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    if begins:
        tokenizer.bos_token = "[UNK]"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[UNK] $A", special_tokens=[("[UNK]", tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.mark.parametrize(("begins", "length"), [(False, 9), (True, 9), (False, None)])
def test_word_predicts_every_token_once_and_counts_the_original_words(begins, length):
    model, tokenizer, found = tiny_model(), ending_tokenizer(begins), pages(2)
    limit, nats, count, words, size = length or 64, 0.0, 0, 0, 0
    for document in found:
        ids = tokenizer(detokenized(document))["input_ids"]
        inputs = [tokenizer.bos_token_id if begins else tokenizer.eos_token_id, *ids]
        for index in range(len(ids)):
            begin = index // limit * limit
            # the last window reaches back as far as the model sees
            begin = max(min(begin, len(ids) - limit), 0)
            nats -= log_probability(model, inputs[begin : index + 1], ids[index])
        count += len(ids)
        words += len(re.split(r"\s+", document))
        size += len(document.encode())
    measured = word_perplexity(model.train(), tokenizer, found, length)
    assert model.training and measured == (
        pytest.approx(math.exp(nats / words), rel=1e-5),
        limit,
        count,
        words,
        size,
        pytest.approx(math.exp(nats / count), rel=1e-5),
        pytest.approx(nats / size / math.log(2), rel=1e-5),
    )


def test_a_text_that_begins_with_the_token_in_front_gets_no_other():
    model, tokenizer = tiny_model(), ending_tokenizer(begins=True)
    for text in ("[UNK] w1 w2", "w1 w2"):
        assert word_perplexity(model, tokenizer, [text]).tokens == 3


def test_windows_roll():
    assert list(rolling_windows([1, 2, 3, 4, 5], 0, 2)) == [([0, 1], [1, 2]), ([2, 3], [3, 4]), ([3, 4], [5])]
    assert list(rolling_windows([1, 2], 0, 4)) == [([0, 1], [1, 2])]
    assert list(rolling_windows([], 0, 4)) == []


def test_marks_of_wikitext_become_text():
    before = ' = = Bob = = \n 1 @,@ 000 @.@ 5 ( well @-@ known ) , he " says " : Bob \'s N 20 ° C ; what ? no ! \n'
    after = ' == Bob ==\n1,000.5 (well-known), he "says": Bob\'s 1 20°C; what? no!\n'
    assert detokenized(before) == after


def test_how_far_a_model_sees():
    assert context_length(tiny_model(), tiny_tokenizer()) == 64
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config = SimpleNamespace(max_position_embeddings=None, text_config=None)
    assert context_length(model, tokenizer) == 2048
    tokenizer.model_max_length = 99
    assert context_length(model, tokenizer) == 99
    model.config.text_config = SimpleNamespace(n_positions=7)
    assert context_length(model, tokenizer) == 7


def test_what_word_does_not_take():
    with pytest.raises(ValueError, match="tokenizer: expected a token for the beginning or end of text"):
        word_perplexity(tiny_model(), tiny_tokenizer(), ["w1 w2"])
    for model, documents, message in (
        (tiny_model(), ["", ""], "text: expected at least 1 token, got none"),
        (tiny_model(vocab_size=8), ["w1 w29"], "model: expected tokens below 8, the size of its vocabulary, got 31"),
    ):
        with pytest.raises(ValueError, match=message):
            word_perplexity(model, ending_tokenizer(), documents)
    with pytest.raises(ValueError, match="length: expected at least 2 tokens, got 1"):
        word_perplexity(tiny_model(), ending_tokenizer(), ["w1"], 1)
