"""The synchronous drop-in is a transformers model, and computes what that computes."""

import threading
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from support.leaks import nothing_left_behind
from support.models import inputs_for, save_model
from support.streaming import bits_equal

from layerstream.pipeline import (
    Budget,
    ClosedError,
    load_streamed,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def test_the_drop_in_is_the_transformers_class_and_computes_like_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    inputs = inputs_for("gpt2")
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(**inputs).logits
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model,
    ):
        assert isinstance(model, transformers.GPT2LMHeadModel)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert bits_equal(model(**inputs).logits, expected)
        tokens = model.generate(**inputs, **GREEDY)
        assert torch.equal(tokens, reference.generate(**inputs, **GREEDY))
    model.close()
    for call in (model, model.generate):
        with pytest.raises(ClosedError):
            call(**inputs)


def test_the_drop_in_serves_transformers_pipelines(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    words = ["?", *"abcdefghijklmnopqrstuvwxyz"]
    numbers = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=words[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0])
    options = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    reference = transformers.pipeline(
        "text-generation",
        model=transformers.LlamaForCausalLM.from_pretrained(folder),
        tokenizer=tokenizer,
    )
    expected = reference("a b c", **options)
    with load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model:
        generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert generate("a b c", **options) == expected


def test_threads_may_share_a_drop_in(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    results: list[torch.Tensor] = []
    with load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model:
        threads = [
            threading.Thread(target=lambda: results.append(model(**inputs).logits))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(results) == 4
    assert all(bits_equal(results[0], result) for result in results)
