"""The model card of a saved model, and what `save_pretrained` takes beside it."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import LAYER
from helpers.command import learn, report
from helpers.tiny_llama import tiny_model, tiny_tokenizer, write_inputs
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints.mask_file import save_masks
from maskpro_kernels.cli import main
from maskpro_kernels.cli.origins import origin_of_run
from maskpro_kernels.hf import saving
from maskpro_kernels.hf.model_card import CARD, is_own
from maskpro_kernels.hf.output_head import has_dense_head

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def masked():
    model = tiny_model()
    mk.convert(model, "2:4")
    return model


@pytest.fixture
def by_form(masked):
    def made(form):
        model = copy.deepcopy(masked)
        return model if form == "masked" else mk.finalize(model, to=form)

    return made


ORIGIN = hf.Origin(
    base_model="owner/base",
    on_hub=True,
    pattern="2:4",
    changed=hf.MASK_ALONE,
    table=[
        {"method": "dense", "perplexity": 10.0, "other_perplexity": 7.0},
        {"method": "straight-through", "perplexity": 12.345, "other_perplexity": 8.0},
    ],
    texts=("pydoc", "stdlib"),
    settings={"steps": 3, "data": "a|b"},
    versions={"torch": "2"},
)


@pytest.mark.parametrize("form", ["dense", "masked", "packed"])
def test_a_card_tells_what_the_model_is_and_how_to_load_it(by_form, tmp_path, form, monkeypatch):
    hf.save_model(by_form(form), tiny_tokenizer(), tmp_path / "sparse", origin=ORIGIN)
    card = ModelCard.load(tmp_path / "sparse" / CARD)
    assert card.data.base_model == "owner/base" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and {"maskpro", "2:4"} <= set(card.data.tags)
    text = card.text
    assert "# sparse" in text and "[owner/base](https://huggingface.co/owner/base) with 2:4 sparsity" in text
    assert "2 of every 4 are kept" in text and hf.MASK_ALONE in text
    assert "| mask | pydoc | stdlib |" in text and "| none (dense) | 10.00 | 7.00 |" in text
    assert "| straight-through | 12.35 | 8.00 |" in text or "| straight-through | 12.34 | 8.00 |" in text
    assert "| steps | 3 |" in text and "| data | a\\|b |" in text and "| torch | 2 |" in text
    assert ("import maskpro_kernels.hf" in text) == (form != "dense")
    assert ("finalize(model)" in text) == (form == "masked")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    tokens = torch.arange(8).view(1, 8)
    torch.testing.assert_close(names["model"](tokens).logits, by_form(form).eval()(tokens).logits)
    assert names["tokenizer"]("w1 w2")["input_ids"] == tiny_tokenizer()("w1 w2")["input_ids"]


def with_a_head_of_its_own(mask: bool, form: str = "dense"):
    """A model whose output head shares no weight, with a mask on it or on other layers."""
    model = tiny_model(tie_word_embeddings=False)
    mk.convert(model, "2:4", targets=["lm_head"] if mask else None)
    return model if form == "masked" else mk.finalize(model, to=form)


@pytest.mark.parametrize("form", ["dense", "masked", "packed"])
def test_a_card_calls_the_output_head_dense_where_it_is(tmp_path, form):
    for mask, told in ((False, "Embeddings and the output head are dense."), (True, "zero. Embeddings are dense.")):
        hf.save_model(with_a_head_of_its_own(mask, form), tiny_tokenizer(), tmp_path / str(mask), origin=ORIGIN)
        assert told in (tmp_path / str(mask) / CARD).read_text()


def test_a_card_does_not_call_a_head_dense_that_it_cannot_find(tmp_path):
    """In a checkpoint whose tensors have other names than the model's."""
    model = tiny_model(tie_word_embeddings=False)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for prefix, known in (("", True), ("other.", False)):
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        assert has_dense_head(model.to("meta"), ["2:4"], tmp_path) == known


@pytest.mark.parametrize("how", [[], ["--max-shard-size", "5GB"]], ids=["copied", "loaded"])
def test_a_card_of_a_mask_on_the_output_head(tmp_path, how):
    base = tiny_model(tie_word_embeddings=False)
    hf.save_model(base, tiny_tokenizer(), tmp_path / "base")
    for name, told in (("lm_head", "Embeddings are dense."), (LAYER, "Embeddings and the output head are dense.")):
        weight = base.get_submodule(name).weight.detach()
        triples = [(name, mk.top_n_mask(weight.abs(), "2:4"), weight)]
        save_masks(tmp_path / f"{name}.mask", triples, "2:4", model="base").close()
        arguments = ["apply", str(tmp_path / f"{name}.mask"), str(tmp_path / "base"), str(tmp_path / name), *how]
        assert main.main(arguments) == 0
        assert f"are zero. {told}" in (tmp_path / name / CARD).read_text()


def test_the_column_of_a_card_is_named_by_its_test_texts(inputs, tmp_path):
    for data, told in ((f"{inputs / 'text.txt'}:0.5,pydoc:0.5", "text.txt, pydoc"), ("self", "samples of the model")):
        origin = origin_of_run({"model": "model", "pattern": "2:4", "data": data}, "weights frozen", [], {})
        assert origin.texts == (told, "another text")


@pytest.mark.parametrize("values", ["keep", "int8"])
@pytest.mark.parametrize("origin", [ORIGIN, hf.Origin(), replace(ORIGIN, on_hub=False, changed="A.\n\nB.", table=[])])
def test_an_origin_is_read_from_its_card(masked, tmp_path, origin, values):
    model = mk.finalize(copy.deepcopy(masked), to="packed", values=values)
    hf.save_model(model, tiny_tokenizer(), tmp_path, origin=origin)
    found = hf.known_origin(tmp_path)
    # as the table rounds them
    rows = [
        {name: of if name == "method" else pytest.approx(of, abs=0.006) for name, of in row.items()}
        for row in origin.table
    ]
    told = {"steps": "3", "data": "a|b"} if origin.settings else {}
    texts = origin.texts if origin.table else hf.Origin().texts
    rounded = values == "int8" and (bool(origin.table) or origin.changed == hf.MASK_ALONE)
    assert found == replace(origin, pattern=None, table=rows, settings=told, texts=texts, rounded=rounded)


def test_of_another_card_the_base_model_is_taken(tmp_path):
    card = tmp_path / CARD
    assert hf.known_origin(tmp_path) is None
    for text, expected in (
        ("mine", None),
        ("---\nbase_model: owner/base\n---\nmine", "owner/base"),
        ("---\nbase_model:\n- owner/base\n---\nmine", "owner/base"),
        ("---\nbase_model: [a/b, c/d]\n---\nmine", None),
        ("---\n: : [\n---\nmine", None),
    ):
        card.write_text(text)
        assert hf.known_origin(tmp_path) == (None if expected is None else hf.Origin(base_model=expected, on_hub=True))


def test_a_card_of_a_model_that_nothing_is_known_of(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.base_model is None and "a dense model, saved by `maskpro_kernels`" in card.text
    assert "## Perplexity" not in card.text and "## Settings" not in card.text


def test_a_folder_of_this_machine_is_no_base_model_of_the_hub(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path, origin=hf.Origin(base_model="model"))
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.base_model is None and "`model`" in card.text


@pytest.mark.parametrize("content", ["mine\n", "changed"])
def test_a_card_of_someone_else_is_kept_and_told(tmp_path, content):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    own = (tmp_path / CARD).read_text()
    theirs = content if content == "mine\n" else own.replace("saved by", "saved, with care, by")
    (tmp_path / CARD).write_text(theirs)
    with pytest.warns(UserWarning, match=rf"{CARD} is kept, .*: the model card is left out; move it away"):
        hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path, origin=ORIGIN)
    assert (tmp_path / CARD).read_text() == theirs


def test_a_card_of_its_own_is_written_anew(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    with warnings.catch_warnings(action="error"):
        hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path, origin=ORIGIN)
    assert "owner/base" in (tmp_path / CARD).read_text() and is_own((tmp_path / CARD).read_text())


def test_options_of_save_pretrained(tmp_path):
    model = tiny_model()
    hf.save_model(model, tiny_tokenizer(), tmp_path, max_shard_size="20KB", variant="small")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and all("small" in file.name for file in files)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert_same_bits(stored["model.norm.weight"], model.model.norm.weight.detach())
    assert_same_bits(
        list(LlamaForCausalLM.from_pretrained(tmp_path, variant="small").parameters()), list(model.parameters())
    )


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"shard_size": "5GB"}, TypeError, r"options: expected those of save_pretrained, .*got \['shard_size'\]"),
        ({"max_shard_size": "5"}, ValueError, "max_shard_size: expected bytes, or a whole number"),
        ({"max_shard_size": "0GB"}, ValueError, "max_shard_size"),
        ({"max_shard_size": None}, ValueError, "max_shard_size"),
        (
            {"push_to_hub": "owner/name"},
            TypeError,
            "push_to_hub: expected a bool, got 'owner/name'; name the repository",
        ),
        ({"repo_id": "owner/name"}, ValueError, "push_to_hub: expected True beside repo_id, got False"),
        ({"push_to_hub": True, "repo_id": "a/b/c"}, ValueError, "repo_id: expected a name such as owner/name"),
    ],
)
def test_a_bad_option_is_refused_and_nothing_is_written(tmp_path, options, error, told):
    with pytest.raises(error, match=told):
        hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """What an emulated hub was given: its calls, in order; `there` is the README.md that it has."""
    calls, there = [], tmp_path / "there"

    def create_repo(api, repo_id, **how):
        calls.append(("create", repo_id, how))
        return type("Url", (), {"repo_id": repo_id})

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda api, repo_id, **how: calls.append(("branch", repo_id, how)))
    monkeypatch.setattr(HfApi, "file_exists", lambda api, repo_id, name, revision: there.exists())
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda api, repo_id, name, revision: str(there))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **how: calls.append(("upload", api.token, how)))
    return calls, there


def test_a_push_uploads_what_was_written(tmp_path, pushed):
    calls, _ = pushed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    push = {"push_to_hub": True, "repo_id": "owner/name", "private": True, "token": "t", "revision": "new"}
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "out", max_shard_size="1GB", **push)
    (create, branch, (_, token, upload)) = calls
    assert create == ("create", "owner/name", {"private": True, "exist_ok": True})
    assert branch == ("branch", "owner/name", {"branch": "new", "exist_ok": True})
    assert token == "t" and upload["repo_id"] == "owner/name" and upload["revision"] == "new"
    files = set(upload["allow_patterns"])
    assert {CARD, "config.json", "model.safetensors", "tokenizer.json"} <= files and "notes.txt" not in files
    assert '"owner/name"' in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize("of", ["someone else", "this package"])
def test_a_card_that_the_hub_has_of_someone_else_is_kept(tmp_path, pushed, of):
    calls, there = pushed
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "before")
    there.write_text("mine" if of == "someone else" else (tmp_path / "before" / CARD).read_text())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "name", push_to_hub=True)
    kept = [str(warning.message) for warning in told if "is kept" in str(warning.message)]
    assert (CARD in calls[-1][2]["allow_patterns"]) == (of == "this package") == (not kept)


def test_a_push_that_fails_leaves_what_was_written(tmp_path, pushed, monkeypatch):
    def refused(*_, **__):
        raise OSError("403 Forbidden: you may not.\nRequest ID: 7")

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    told = (
        "the model is in .*out', but could not be pushed to owner/name: 403 Forbidden: you may not.; push it by `hf up"
    )
    with pytest.raises(OSError, match=told):
        hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "out", push_to_hub=True, repo_id="owner/name")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--refit", "weights"], marks=pytest.mark.slow)], ids=["frozen", "refitted"]
)
def test_the_card_of_a_run_and_of_its_export(inputs, tmp_path, options, pushed, monkeypatch):
    monkeypatch.setattr(saving.HfApi, "whoami", lambda *_: {})
    run = tmp_path / "run"
    data = f"{inputs / 'text.txt'}:0.5,self:0.5"
    assert main.main(learn(inputs, run, "--data", data, *options)) == 0
    export = ["export", str(run), str(tmp_path / "packed"), "--to", "packed", "--max-shard-size", "20KB"]
    assert main.main([*export, "--push-to-hub", "owner/name", "--private"]) == 0
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    calls, _ = pushed
    assert calls[0] == ("create", "owner/name", {"private": True, "exist_ok": True})
    for folder in ("run", "packed"):
        text = (tmp_path / folder / CARD).read_text()
        assert str(tmp_path) not in text and str(inputs) not in text
        assert "`model` with 2:4 sparsity" in text and ("import maskpro_kernels.hf" in text) == (folder == "packed")
        assert ("(weights refitted)" in text) == bool(options) == (hf.MASK_ALONE not in text)
        assert (
            "| mask | text.txt | pydoc |" in text
            and "| data | text.txt:0.5,self:0.5 |" in text
            and "| estimator | reinforce |" in text
        )
        for row in report(run)["table"][1:]:
            assert f"| {row['method']} | {row['perplexity']:.2f} | {row['other_perplexity']:.2f} |" in text


def test_the_card_of_an_imported_run_tells_what_its_report_does(inputs, tmp_path):
    run = tmp_path / "run"
    assert main.main(learn(inputs, run)) == 0
    before = hf.known_origin(run)
    (run / CARD).unlink()
    assert main.main(["import", str(run), "--output", str(tmp_path / "packed")]) == 0
    found = hf.known_origin(tmp_path / "packed")
    assert found.base_model == before.base_model == "model" and found.table == before.table != []
    assert found.settings == before.settings and found.versions == before.versions
    of = "Zeros and weights are those of the checkpoint `run`."
    assert found.changed == f"{before.changed}\n\n{of}" == f"{hf.MASK_ALONE}\n\n{of}"


def test_a_run_keeps_a_card_that_came_while_it_learned(inputs, tmp_path, monkeypatch, capsys):
    from maskpro_kernels.learn.trainer import MaskTrainer

    step, run = MaskTrainer.step, tmp_path / "run"

    def written(trainer):
        (run / CARD).write_text("mine")
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", written)
    assert main.main(learn(inputs, run)) == 0
    assert (run / CARD).read_text() == "mine" and (run / "report.json").exists()
    assert f"maskpro: warning: {run / CARD} is kept" in capsys.readouterr().err
