"""The protocol `word` against lm-eval's own task wikitext, on a local text of the same form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.pages import write_pages
from helpers.tiny_llama import tiny_model, tiny_tokenizer

from maskpro_kernels import convert, finalize
from maskpro_kernels.cli import main
from maskpro_kernels.hf import save_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference", "datasets_cache")]


def write_task(folder: Path, pages: Path) -> Path:
    """Write lm-eval's own task with another data set, beside its own code of documents and words."""
    own = Path(lm_eval.__file__).parent / "tasks" / "wikitext"
    folder.mkdir()
    shutil.copy(own / "preprocess_wikitext.py", folder)
    text = (own / "wikitext.yaml").read_text(encoding="utf-8")
    for line, other in (
        ("task: wikitext", "task: local_wikitext"),
        ("dataset_path: EleutherAI/wikitext_document_level", "dataset_path: json"),
        ("dataset_name: wikitext-2-raw-v1", f"dataset_kwargs:\n  data_files:\n    test: {pages}"),
        ("training_split: train\n", ""),
        ("validation_split: validation\n", ""),
    ):
        assert line in text
        text = text.replace(line, other)
    (folder / "local.yaml").write_text(text, encoding="utf-8")
    return folder


def write_model(kind: str, folder: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.eos_token = "[PAD]"
    convert(model, "2:4")
    save_model(model if kind == "masked" else finalize(model, to=kind), tokenizer, folder)


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_word_is_what_lm_eval_finds(tmp_path, kind):
    write_model(kind, tmp_path / kind)
    pages, output = write_pages(tmp_path / "pages.jsonl"), tmp_path / "out.json"
    arguments = ["eval", str(tmp_path / kind), "--protocol", "word", "--data", str(pages), "--output", str(output)]
    assert main.main([*arguments, "--text-column", "page", "--device", "cpu", "--dtype", "float32"]) == 0
    ours = json.loads(output.read_text(encoding="utf-8"))
    tasks = lm_eval.tasks.TaskManager(include_path=str(write_task(tmp_path / "tasks", pages)), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / kind), "dtype": "float32"},
        tasks=["local_wikitext"],
        task_manager=tasks,
        device="cpu",
    )["results"]["local_wikitext"]
    # several windows a document, by the model's 64 positions
    assert ours["window"] == 64 and ours["tokens"] > 64 * 12
    assert ours["perplexity"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-5)
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-5)
