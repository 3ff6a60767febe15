"""The comparison with llama.cpp, without it, on a tiny model."""

from __future__ import annotations

import pytest

llama_cpp = pytest.importorskip("beside_llama_cpp")
gguf = pytest.importorskip("gguf")

SHAPES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 64}  # fmt: skip


class Peer:
    """A pool of processes whose jobs return rates of llama.cpp."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job, path, prompt, new_tokens, threads):
        assert job is llama_cpp.served and (len(prompt), new_tokens) == (4, 3)
        tensors = {tensor.name: (*map(int, tensor.shape),) for tensor in gguf.GGUFReader(path).tensors}
        assert len(tensors) == 3 + 2 * 9 and tensors["blk.1.attn_k.weight"] == (128, 64)
        return self

    def result(self):
        return 7.0, 5.0


@pytest.mark.usefixtures("compiled_reference")
def test_it_prints_a_row_a_model(monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "SHAPES", SHAPES)
    monkeypatch.setattr(llama_cpp, "ProcessPoolExecutor", Peer)
    assert 1e8 < llama_cpp.memory_rate(size=1 << 20) < 1e13
    monkeypatch.setattr(llama_cpp, "memory_rate", lambda: 1e8)
    monkeypatch.setattr("sys.argv", "beside_llama_cpp random-1b --prompt-tokens 4 --new-tokens 3 --rounds 1".split())
    llama_cpp.main()
    _, *rows, bound = capsys.readouterr().out.splitlines()
    names = [row[:20].strip() for row in rows]
    assert names == [
        "dense",
        "dense, float32",
        *(f"packed 2:4, {kind}" for kind in llama_cpp.VALUE_KINDS),
        "no products",
        "llama.cpp, Q4_0",
    ]
    assert rows[-1].split()[-3:] == ["7.0", "decode", "5.0"]
    decoded = {name: float(row.split()[-1]) for name, row in zip(names, rows, strict=True)}
    assert all(rate > 0 for rate in decoded.values())
    # 96 KB of 245,760 weights, and the output layer's 131
    assert bound.startswith("int4, at most") and bound.endswith("for 0.2 MB at 0.1 GB a second")
    most = float(bound.split()[4].rstrip(","))
    assert most == pytest.approx(1 / (1 / decoded["no products"] + 2.27e-3), rel=0.02)
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["beside_llama_cpp", "another"])
        llama_cpp.main()
