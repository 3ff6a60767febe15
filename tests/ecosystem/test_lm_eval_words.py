"""The protocol `word` against lm-eval's own task wikitext, on a local text of the same form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.lm_eval_task import leave_own_tasks_aside, write_models
from helpers.pages import write_pages

from maskpro_kernels.cli import main

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


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_word_is_what_lm_eval_finds(tmp_path, monkeypatch, kind):
    leave_own_tasks_aside(monkeypatch)
    write_models(tmp_path)
    pages = write_pages(tmp_path / "pages.jsonl")
    tasks = ["--tasks", "local_wikitext", "--include-path", str(write_task(tmp_path / "tasks", pages))]
    arguments = ["eval", str(tmp_path / kind), "--protocol", "word", "--data", str(pages), *tasks]
    output = tmp_path / "out.json"
    assert main.main([*arguments, "--device", "cpu", "--dtype", "float32", "--output", str(output)]) == 0
    ours = json.loads(output.read_text(encoding="utf-8"))
    theirs = ours["tasks"]["results"]["local_wikitext"]
    # several windows a document, by the model's 64 positions
    assert ours["window"] == 64 and ours["tokens"] > 64 * 12
    assert ours["perplexity"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-5)
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-5)
