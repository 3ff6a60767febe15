"""`maskpro eval`: one table of runs and models, by each protocol."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.command import learn, refuses, report
from helpers.pages import pages, write_pages
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from maskpro_kernels import convert, hf
from maskpro_kernels.cli import main
from maskpro_kernels.cli.inputs import print_table
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity, word_perplexity
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference")

CPU = ["--device", "cpu", "--dtype", "float32"]


def rows_of(printed: str) -> dict[str, list[float]]:
    """Figures by the name of their row."""
    rows = [line.rsplit("  ", line.count("  ")) for line in printed.splitlines()[1:]]
    return {row[0].strip(): [float(word) for word in row[1:] if word.strip()] for row in rows}


def test_runs_are_below_their_dense_model_with_the_figures_of_their_tables(inputs, run, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path / "other", "--pattern", "1:4")) == 0
    packed = tmp_path / "packed"
    assert main.main(["export", str(run), str(packed), "--to", "packed"]) == 0
    capsys.readouterr()
    output = tmp_path / "figures.json"
    arguments = ["eval", str(run), str(tmp_path / "other"), str(packed), "--device", "cpu", "--output", str(output)]
    assert main.main(arguments) == 0
    found = json.loads(output.read_text())
    assert found["dtype"] == "float32" and found["data"] == str(inputs / "text.txt")
    text = str(inputs / "text.txt")
    figures = {row["method"]: row[text] for row in found["rows"]}
    tables = [report(folder)["table"] for folder in (run, tmp_path / "other")]
    assert figures[f"dense {inputs / 'model'}"] == tables[0][0]["perplexity"]
    assert figures[str(run)] == pytest.approx(tables[0][-1]["perplexity"], rel=1e-6) == figures[str(packed)]
    assert figures[str(tmp_path / "other")] == pytest.approx(tables[1][-1]["perplexity"], rel=1e-6)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["held-out", "perplexity,", "float32", text]
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["dense", *map(str, arguments[1:4])]


def test_any_texts_of_any_model(inputs, tmp_path, capsys):
    (tmp_path / "two.txt").write_text(tiny_text(seed=1), encoding="utf-8")
    one, two = str(inputs / "text.txt"), str(tmp_path / "two.txt")
    sizes = ["--eval-windows", "2", "--eval-length", "24"]
    output = tmp_path / "out.json"
    arguments = ["eval", str(inputs / "model"), "--data", f"{one},{two}", *sizes, *CPU, "--output", str(output)]
    assert main.main(arguments) == 0
    (row,) = json.loads(output.read_text())["rows"]
    for text in (one, two):
        expected = perplexity(tiny_model(), windows(load_text(text)["test"], tiny_tokenizer(), 24)[:2])
        assert row[text] == pytest.approx(expected, rel=1e-6)


def test_protocols_take_whole_texts(inputs, run, tmp_path, capsys, datasets_cache):
    path = str(write_pages(tmp_path / "pages.jsonl"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), tiny_tokenizer()
    found = {}
    for name, more in {"tokens": ["--eval-length", "24"], "word": []}.items():
        output = tmp_path / f"{name}.json"
        arguments = ["eval", str(inputs / "model"), "--protocol", name, "--data", path, "--text-column", "page"]
        code = main.main([*arguments, *more, *CPU, "--output", str(output)])
        if name == "word":
            # a tokenizer without a token that text begins with
            assert code == 2 and "tokenizer: expected a token for the beginning" in capsys.readouterr().err
            continue
        assert code == 0
        (found[name],) = json.loads(output.read_text())["rows"]
    expected = perplexity(tiny_model(), windows("\n\n".join(pages()), tokenizer, 24), batch_size=1)
    assert found["tokens"][path] == pytest.approx(expected, rel=1e-6)
    tokenizer.eos_token = "[PAD]"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "words.json"
    arguments = ["eval", str(tmp_path / "model"), "--protocol", "word", "--data", path, "--text-column", "page"]
    assert main.main([*arguments, *CPU, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    measured = word_perplexity(model, tokenizer, pages())
    assert row[path] == pytest.approx(measured.perplexity, rel=1e-6)
    assert row[f"{path}, bits a byte"] == pytest.approx(measured.bits_per_byte, rel=1e-6)


def test_a_run_whose_base_has_moved_is_evaluated_without_it(run, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    content = report(moved)
    content["settings"]["model"] = str(tmp_path / "gone")
    (moved / "report.json").write_text(json.dumps(content))
    assert main.main(["eval", str(moved), *CPU]) == 0
    captured = capsys.readouterr()
    assert f"the dense model {tmp_path / 'gone'} has moved: it is left out" in captured.err
    assert len(captured.out.splitlines()) == 2


@torch.no_grad()
def continued(model, prompt: str, new_tokens: int) -> str:
    """What a model adds to a prompt: the most probable token, again and again."""
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    for _ in range(new_tokens):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(tokens[0, -new_tokens:])


def test_prompts_are_continued_by_models_of_every_kind(inputs, run, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main.main(["export", str(run), str(packed), "--to", "packed"]) == 0
    # without tied embeddings, which repeat the last word
    masked_model = tiny_model(tie_word_embeddings=False)
    convert(masked_model, "2:4")
    # that a checkpoint ends texts at a token, or would sample, changes nothing
    masked_model.generation_config = GenerationConfig(eos_token_id=list(range(32)), do_sample=True)
    masked = tmp_path / "masked"
    hf.save_model(masked_model, tiny_tokenizer(), masked)
    output = tmp_path / "out.json"
    capsys.readouterr()
    models = [str(run), str(packed), str(masked)]
    prompts = ["--prompt", "w1 w2 w3", "--prompt", "w4\n w5", "--prompt", "w1 w2 w3"]
    assert main.main(["eval", *prompts, "--new-tokens", "6", *models, *CPU, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["new_tokens"] == 6
    loaded = {f"dense {inputs / 'model'}": tiny_model()}
    loaded |= {name: AutoModelForCausalLM.from_pretrained(name).eval() for name in models}
    expected = {
        name: {prompt: continued(model, prompt, 6) for prompt in ("w1 w2 w3", "w4\n w5")}
        for name, model in loaded.items()
    }
    assert found["continuations"] == expected
    assert len({texts["w1 w2 w3"] for texts in expected.values()}) > 1
    # after the table and the title; each prompt once
    first, second = printed.partition("greedy continuations, 6 tokens, float32\n\n")[2].split("\n\n")
    for block, line, prompt in ((first, "w1 w2 w3", "w1 w2 w3"), (second, r"w4\n w5", "w4\n w5")):
        printed_prompt, *continuations = block.splitlines()
        assert printed_prompt == line
        texts = dict(continuation.strip().rsplit("  ", 1) for continuation in continuations)
        assert {name.strip(): text for name, text in texts.items()} == {
            name: texts[prompt] for name, texts in expected.items()
        }
    assert [row["method"] for row in found["rows"]] == list(expected)
    assert all(row[str(inputs / "text.txt")] > 1 for row in found["rows"])


def test_a_run_on_samples_alone_has_no_text_to_evaluate(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main.main(learn(inputs, run, "--data", "self", "--steps", "1")) == 0
    capsys.readouterr()
    assert main.main(["eval", str(run), "--prompt", "w1 w2", "--new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "no perplexities, since no text is given" in captured.err and "w1 w2" in captured.out


def test_prompts_need_no_text(inputs, tmp_path, capsys):
    model = str(inputs / "model")
    output = tmp_path / "out.json"
    assert main.main(["eval", model, "--prompt", "w1 w2", *CPU, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert "no perplexities, since no text is given: name one with --data" in captured.err
    # 32 tokens by default
    expected = continued(tiny_model(), "w1 w2", 32)
    assert captured.out == f"greedy continuations, 32 tokens, float32\n\nw1 w2\n  {model}  {expected}\n"
    assert json.loads(output.read_text())["rows"] == [{"method": model}]


def test_prompts_in_a_file_of_options(inputs, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("prompt: [w1 w2, w3]\nnew_tokens: 2\n", encoding="utf-8")
    (tmp_path / "one.json").write_text('{"prompt": "w4"}', encoding="utf-8")
    for file, prompts in {"options.yaml": ["w1 w2", "w3"], "one.json": ["w4"]}.items():
        assert main.main(["eval", str(tmp_path / file), str(inputs / "model"), *CPU]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed[1:] if line and not line.startswith(" ")] == prompts
    refused = ["eval", str(tmp_path / "options.json"), str(inputs / "model")]
    for content, message in {
        '{"prompt": ["w1", null]}': "prompt: expected texts in",
        '{"prompt": ""}': "prompt: expected a text to continue, got ''",
    }.items():
        (tmp_path / "options.json").write_text(content, encoding="utf-8")
        refuses(capsys, tmp_path, refused, message)


def test_prompts_that_cannot_be_continued_are_refused(inputs, tmp_path, capsys):
    model = str(inputs / "model")
    eval_prompt = ["eval", model, *CPU, "--prompt"]
    refuses(capsys, tmp_path, [*eval_prompt, ""], "prompt: expected a text to continue, got ''")
    refuses(
        capsys, tmp_path, [*eval_prompt, "w1", "--prompt", " \n"], r"prompt: expected a text to continue, got ' \n'"
    )
    refuses(capsys, tmp_path, [*eval_prompt, "w1", "--new-tokens", "0"], "--new-tokens: expected at least 1, got 0")
    words = ["eval", model, "--data", str(inputs / "text.txt"), "--new-tokens", "2"]
    refuses(capsys, tmp_path, words, "--new-tokens: expected none without --prompt, got 2")
    message = "--new-tokens: expected at most 64 tokens together with those of the prompt, the context of"
    refuses(capsys, tmp_path, [*eval_prompt, "w1 w2", "--new-tokens", "63"], message, "got 63 and 2")
    refuses(capsys, tmp_path, [*eval_prompt, "w1", "--prompt"], "argument --prompt: expected one argument")
    for option, value in {"protocol": "word", "eval-windows": "3", "eval-length": "8"}.items():
        message = f"{option}: expected none without a text, which --data names, got {value}"
        refuses(capsys, tmp_path, [*eval_prompt, "w1", f"--{option}", value], message)


def test_models_before_a_refused_one_are_printed(inputs, tmp_path, capsys):
    model = str(inputs / "model")
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    text = str(inputs / "text.txt")
    for length, new_tokens, message in (
        ("8", 7, "--new-tokens: expected at most 8 tokens together with those of the prompt"),
        # after the continuation of its prompt
        ("16", 2, "--eval-length: expected windows of at most 8 tokens"),
    ):
        arguments = ["--data", text, "--eval-length", length, "--prompt", "w1 w2", "--new-tokens", str(new_tokens)]
        assert main.main(["eval", model, str(short), *arguments, *CPU]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        title, figures, _, _, prompt, continuation = captured.out.splitlines()
        assert title.split() == ["held-out", "perplexity,", "float32", text] and figures.startswith(model)
        assert prompt == "w1 w2" and continuation == f"  {model}  {continued(tiny_model(), 'w1 w2', new_tokens)}"


def test_columns_are_as_wide_as_their_figures(capsys):
    rows = [{"method": "a", "x": 123456.789}, {"method": "a much longer name", "x": 1.0}]
    print_table(rows, {"x": ("x", 2)}, "of")
    assert capsys.readouterr().out.splitlines() == [
        "of                          x",
        "a                   123456.79",
        "a much longer name       1.00",
    ]


def test_what_cannot_be_evaluated_is_refused(inputs, run, tmp_path, capsys):
    model = str(inputs / "model")
    refuses(capsys, tmp_path, ["eval", model], "data: expected --data, since only runs have texts")
    neither = "models: expected the folder of a run or of a model, got 'runs/none', which is no folder; an id"
    refuses(capsys, tmp_path, ["eval", "runs/none"], neither)
    refuses(capsys, tmp_path, ["eval", str(run), "--data", "self"], "samples are no test of a mask")
    refuses(capsys, tmp_path, ["eval", str(run), "--output", str(run / "report.json")], "output: expected a new file")
    refuses(capsys, tmp_path, ["eval", str(run), "--output", "/none/file"], "output: expected a new file")
    arguments = ["eval", model, "--data", str(inputs / "text.txt"), "--eval-length", "9999", *CPU]
    for option in ("documents", "eval-windows"):
        more = [f"--{option}", "2", "--protocol", "tokens"]
        refuses(capsys, tmp_path, [*arguments, *more], f"{option}: expected none with --protocol tokens, got 2")
    refuses(
        capsys, tmp_path, arguments, "--eval-length: expected windows of at most 64 tokens, the context of the model"
    )
