"""The comparison with vLLM and llama.cpp, without them, on tiny models."""

from __future__ import annotations

import json

import pytest

vllm = pytest.importorskip("beside_vllm")
llama_cpp = pytest.importorskip("beside_llama_cpp")
pytest.importorskip("gguf")

SHAPES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip


class Here:
    """A pool of one process, that of the test."""

    def __init__(self, function, arguments):
        self.function = function
        self.arguments = arguments
        function(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job, *arguments):
        if self.function is vllm.load:
            self.function(*self.arguments)
        self.value = job(*arguments)
        return self

    def result(self):
        return self.value


@pytest.mark.usefixtures("compiled_reference")
def test_it_writes_a_row_an_engine_and_a_number_of_requests(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "SHAPES", SHAPES)
    monkeypatch.setattr(vllm, "process_of", lambda function, *arguments: Here(function, arguments))
    monkeypatch.setattr(vllm, "prompts_of", lambda requests, round_number: [[3 + round_number] * 4] * requests)
    monkeypatch.setattr(vllm, "NEW_TOKENS", 3)
    calls = []
    monkeypatch.setattr(vllm, "llama_cpp_engine", lambda path: lambda prompts, new_tokens: calls.append(path.exists()))
    arguments = f"random-1b --folder {tmp_path / 'models'} --engines transformers llama.cpp --requests 1 2 --rounds 1"
    vllm.main([*arguments.split(), "--kinds", "dense", "int8 output", "--output", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = [("transformers", "dense"), ("transformers", "int8 output"), ("llama.cpp", "4 bits")]
    assert [(row["engine"], row["kind"], row["requests"]) for row in rows] == [
        (*key, requests) for key in expected for requests in (1, 2)
    ]
    assert all(row["prefill"] > 0 and row["threads"] and row["commit"] for row in rows)
    assert calls and all(calls)
    title, *printed = capsys.readouterr().out.splitlines()[-7:]
    assert title == "random-1b: tokens a second, medians of 1 rounds" and len(printed) == 6


def test_no_two_rounds_share_a_prompt():
    prompts = [tuple(prompt) for number in range(3) for count in (1, 8) for prompt in vllm.prompts_of(count, number)]
    assert len(set(prompts)) == len(prompts) == 27
