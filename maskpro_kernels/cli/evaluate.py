"""`maskpro eval`: perplexities of runs and models in one table, and their continuations of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_whole
from ..text.batches import check_vocabulary, parse_sources, texts_of
from ..text.perplexity import EVALUATED_TOGETHER, perplexity, word_perplexity
from ..text.sources import load_documents, load_text
from .config import EVAL_LENGTH, EVAL_WINDOWS, NEW_TOKENS, Evaluate
from .inputs import (
    REPORT,
    Progress,
    check_context,
    check_ended,
    check_least,
    check_new_file,
    default_dtype,
    device_of,
    load,
    naming,
    positions_of,
    print_table,
    read_report,
    report,
    report_as,
    report_damaged_settings,
    report_device,
    windows_of,
)

# Returns figures of a model on a text, by suffix of their name, "" for the perplexity
Measure = Callable[[nn.Module, object], dict[str, float]]


def evaluate(options: Evaluate, models: list[str]) -> None:
    """Print a row for each model, with the dense model of a run above it, then the continuations of each prompt.

    With --output also write both. Prompts need no text: without one rows have no figures, and are not printed. After an
    error it prints the models before, and writes nothing.
    """
    check_least(options, eval_windows=1, eval_length=2, documents=1, new_tokens=1)
    if options.protocol != "held-out":
        for name in ("documents", "eval_windows"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name}: expected none with --protocol {options.protocol}, got {value}")
    prompts = _checked_prompts(options)
    for name in models:
        check_ended(name)
    device = device_of(options.device)
    if options.output is not None:
        check_new_file(options.output)
    runs = {name: read_report(Path(name)) for name in models if (Path(name) / REPORT).is_file()}
    for name in runs:
        report_damaged_settings(Path(name))
    settings = next(iter(runs.values()))["settings"] if runs else {}
    dtype = options.dtype or settings.get("dtype") or default_dtype(options.device)
    data = options.data or settings.get("data")
    measures = {}
    if prompts and (data is None or (options.data is None and not texts_of(data))):
        _check_no_text_options(options)
        report("no perplexities, since no text is given: name one with --data")
    else:
        measures = _measures_of(options, models, data, settings)
    bases = dict.fromkeys(run["settings"]["model"] for run in runs.values())
    for base in [name for name in bases if Path(name).is_absolute() and not Path(name).exists()]:
        report_as("warning", f"the dense model {base} has moved: it is left out; name its new place beside the run")
        del bases[base]
    report_device(options.device)
    new_tokens = options.new_tokens or NEW_TOKENS
    rows = []
    continuations = {}
    try:
        for name in dict.fromkeys([*bases, *models]):
            model, tokenizer = load(name, dtype, device)
            method = f"dense {name}" if name in bases else name
            row = {"method": method}
            # before the perplexities, which take longer: a prompt may be too long for this model
            texts = _continuations(name, model, tokenizer, prompts, new_tokens) if prompts else {}
            for text, measure in measures.items():
                row |= {f"{text}{end}": figure for end, figure in measure(model, tokenizer).items()}
            rows.append(row)
            if prompts:
                continuations[method] = texts
            # before the next one
            del model
        if options.output is not None:
            content = {"data": data, "protocol": options.protocol, "dtype": dtype, "rows": rows}
            if prompts:
                content |= {"new_tokens": new_tokens, "continuations": continuations}
            write_whole(Path(options.output), (json.dumps(content, indent=1) + "\n").encode())
    finally:
        # also after an error: the models before it may have taken hours
        if rows and measures:
            titles = {name: (name, 4 if name.endswith("bits a byte") else 2) for name in rows[0] if name != "method"}
            print_table(rows, titles, f"{options.protocol} perplexity, {dtype}")
        if continuations:
            print(f"greedy continuations, {new_tokens} tokens, {dtype}")
            _print_continuations(prompts, continuations)


def _checked_prompts(options: Evaluate) -> list[str]:
    """Each prompt once; ValueError if one is blank, or there are new tokens without a prompt."""
    prompts = list(dict.fromkeys(options.prompt or []))
    if options.new_tokens is not None and not prompts:
        raise ValueError(f"new_tokens: expected none without --prompt, got {options.new_tokens}")
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompt: expected a text to continue, got {prompt!r}")
    return prompts


def _check_no_text_options(options: Evaluate) -> None:
    """Raise ValueError for an option of perplexities, which there are none of without a text."""
    for name in ("protocol", "documents", "eval_windows", "eval_length"):
        if (value := getattr(options, name)) != getattr(Evaluate, name):
            raise ValueError(f"{name}: expected none without a text, which --data names, got {value}")


def _measures_of(options: Evaluate, models: Sequence[str], data: str | None, settings: Mapping) -> dict[str, Measure]:
    """Read the texts and return the function that evaluates a model on each, by its name."""
    if data is None:
        if absent := [name for name in models if not Path(name).exists()]:
            raise ValueError(
                f"models: expected the folder of a run or of a model, got {absent[0]!r}, which is no folder; an id on "
                "the hub needs --data"
            )
        raise ValueError("data: expected --data, since only runs have texts, got none")
    names = [name for name, _ in texts_of(data)]
    if not names:
        raise ValueError(f"data: expected a text, got {data!r}, and samples are no test of a mask")
    if len(names) < len(parse_sources(data)) and options.data is not None:
        raise ValueError(f"data: expected texts alone, got {data!r}, and samples are no test of a mask")
    with naming("data"):
        return {name: _measure_of(options, name, settings) for name in names}


def _measure_of(options: Evaluate, name: str, settings: dict) -> Measure:
    """Read a text and return the function that evaluates a model on it."""
    work = f"evaluation on {name}"
    if options.protocol == "word":
        documents = load_documents(name, options.text_column)

        def measure(model: nn.Module, tokenizer) -> dict[str, float]:
            check_context(model, options.eval_length or 0, "eval_length")
            result = word_perplexity(model, tokenizer, documents, options.eval_length, Progress(work, "window"))
            return {"": result.perplexity, ", bits a byte": result.bits_per_byte}

        return measure
    if options.protocol == "held-out":
        documents = options.documents or (settings.get("documents") if options.data is None else None)
        text = load_text(name, options.text_column, documents)["test"]
        count = options.eval_windows or settings.get("eval_windows", EVAL_WINDOWS)
        batch_size = EVALUATED_TOGETHER
    else:
        text = "\n\n".join(load_documents(name, options.text_column))
        count = None
        batch_size = 1

    def measure(model: nn.Module, tokenizer) -> dict[str, float]:
        length = options.eval_length or _default_length(model)
        windows = windows_of(text, model, tokenizer, length, "data", "--eval-length")[:count]
        return {"": perplexity(model, windows, batch_size=batch_size, progress=Progress(work, "window"))}

    return measure


def _default_length(model: nn.Module) -> int:
    return min(EVAL_LENGTH, positions_of(model) or EVAL_LENGTH)


def _continuations(name: str, model: nn.Module, tokenizer, prompts: Sequence[str], new_tokens: int) -> dict[str, str]:
    """The tokens that a model adds greedily to each prompt, as text, by the prompt; an end of text does not end it.

    Raises:
        ValueError: if a prompt has no tokens, or too many for the context of the model, or the tokenizer has others.
    """
    # it imports transformers
    from ..hf.timing import greedy, plain_generation

    embeddings = model.get_input_embeddings()
    prompts_tokens = [_tokens_of(prompt, model, tokenizer, new_tokens, name) for prompt in prompts]
    texts = {}
    progress = Progress(f"continuations of {name}", "prompt")
    with plain_generation(model):
        for prompt, tokens in zip(prompts, prompts_tokens, strict=True):
            added = greedy(model, tokens.to(embeddings.weight.device), new_tokens)[0]
            texts[prompt] = tokenizer.decode(added, clean_up_tokenization_spaces=False)
            progress(len(texts), len(prompts))
    return texts


def _tokens_of(prompt: str, model: nn.Module, tokenizer, new_tokens: int, name: str) -> Tensor:
    """Tokens of a prompt, int64 [1, tokens]."""
    tokens = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], dtype=torch.int64)
    if not tokens.numel():
        raise ValueError(f"prompt: expected a text with tokens of {name!r}, got {prompt!r}")
    check_vocabulary(tokens, model.get_input_embeddings().num_embeddings)
    positions = positions_of(model)
    if positions is not None and tokens.shape[1] + new_tokens > positions:
        raise ValueError(
            f"new_tokens: expected at most {positions} tokens together with those of the prompt, the context of "
            f"{name!r}, got {new_tokens} and {tokens.shape[1]}"
        )
    return tokens


def _print_continuations(prompts: Sequence[str], continuations: Mapping[str, Mapping[str, str]]) -> None:
    """Print the continuations of each prompt below it, a line for each model."""
    width = max(map(len, continuations))
    for prompt in prompts:
        print(f"\n{_in_a_line(prompt)}")
        for method, texts in continuations.items():
            print(f"  {method:<{width}}  {_in_a_line(texts[prompt])}")


def _in_a_line(text: str) -> str:
    """A text with escapes for ends of lines and other characters that are not printed."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
