"""Caches that the caller brings: taken under any name, whatever their kind, and in the price of the request."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import CASES, inputs_for, save_model

from layerstream.pipeline import AdmissionError, Budget, load_streamed
from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES, input_shape

IDS = torch.arange(3, 12)[None]
OPTIONS = {"device": "cpu", "measure": False, "budget": Budget(host="48MiB"), "layer_batch_size": 1}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def loaded(folder: Path, case: str) -> Any:
    return getattr(transformers, CASES[case].model).from_pretrained(folder)


def dynamic(config: Any) -> Any:
    return transformers.DynamicCache(config=config)


def static(config: Any) -> Any:
    return transformers.StaticCache(config=config, max_cache_len=40)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for the older names
@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("case", ["llama", "mamba", "mamba2", "jamba", "qwen3-next", "gemma3"])
def test_a_cache_of_the_callers_own_is_continued_under_each_of_its_names(
    case: str, make: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", case)
    reference = loaded(folder, case)

    def conversation(model: Any, name: str) -> torch.Tensor:
        cache = {name: make(reference.config)}
        first = model.generate(IDS, **cache, **GREEDY)
        more = torch.cat([first, IDS[:, :2]], dim=1)
        return model.generate(more, **cache, **GREEDY)

    with load_streamed(folder, **OPTIONS) as model:
        for name in CACHE_NAMES:
            assert torch.equal(conversation(model, name), conversation(reference, name))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_of_a_fixed_size_is_priced_by_that_size_before_it_is_filled(
    name: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    reference = loaded(folder, "llama")
    with load_streamed(folder, **OPTIONS) as model:
        streamed = vars(model)["_layerstream_close"].model
        plain = streamed.check(IDS, **GREEDY)
        cache = transformers.StaticCache(config=reference.config, max_cache_len=4000)
        empty = streamed.check(IDS, **{name: cache}, **GREEDY)
        model.generate(IDS, **{name: cache}, **GREEDY)
        filled = streamed.check(IDS, **{name: cache}, **GREEDY)
        held = 4000 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, width, float32
        assert input_shape(model, "generate", {name: cache}).held_bytes >= held
        assert min(empty, filled) >= plain + held * 0.9
        too_large = transformers.StaticCache(config=reference.config, max_cache_len=400_000)
        with pytest.raises(AdmissionError, match="KV cache"):
            model.generate(IDS, **{name: too_large}, **GREEDY)
        assert not any(layer.is_initialized for layer in too_large.layers)


# Numbers of float32: layers x ((keys and values) x heads x width x tokens), or x channels x (convolution + state).
HELD = {"llama": 2 * 2 * 2 * 8 * 7, "t5": 2 * 2 * 4 * 8 * (4 + 7), "mamba": 2 * 64 * (4 + 16)}


@pytest.mark.parametrize("case", HELD)
def test_what_a_cache_holds_is_known_for_every_kind(case: str, tmp_path: Path) -> None:
    reference = loaded(save_model(tmp_path / "model", case), case)
    with torch.no_grad():
        output = reference(**inputs_for(case), use_cache=True)
    cache = next(output[name] for name in CACHE_NAMES if output.get(name) is not None)
    assert HELD[case] * 4 <= input_shape(reference, "forward", {"cache": cache}).held_bytes


# Whether the state after a piece of a prompt is taken up by the next one: never by recurrent layers alone.
IN_PIECES = {"llama": True, "jamba": True, "qwen3-next": True, "mamba": False, "mamba2": False}


@pytest.mark.parametrize("case", IN_PIECES)
def test_a_prompt_is_read_in_pieces_only_where_the_model_can(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case)
    generator = torch.Generator().manual_seed(1)
    with load_streamed(folder, **OPTIONS) as model:
        estimate = vars(model)["_layerstream_close"].model.engine._estimator.generation
        tokens = 256
        try:
            while estimate((IDS.new_ones(1, tokens),), GREEDY).chunk_tokens is None:
                tokens *= 2
        except AdmissionError:
            assert not IN_PIECES[case]
        ids = torch.randint(3, 100, (1, tokens), generator=generator)
        if not IN_PIECES[case]:
            with pytest.raises(AdmissionError, match="KV cache and activations"):
                model.generate(ids, **GREEDY)
            return
        expected = loaded(folder, case).generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **GREEDY), expected)
