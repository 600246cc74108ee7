"""Memory of a workload besides the weights: the same on the meta device as on a real one, and the estimate near it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU
from support.models import CACHE, CASES, save_model
from support.selection import covering

from layerstream.pipeline import Checkpoint, Workload
from layerstream.pipeline.modeling.activation_memory import PromptPass, measure_memory
from layerstream.pipeline.modeling.assembly import Assembly
from layerstream.pipeline.modeling.config import load_config, resolve_model_class
from layerstream.pipeline.modeling.execution_trace import trace_execution
from layerstream.pipeline.modeling.live_bytes import LiveBytes
from layerstream.pipeline.modeling.tracing import trace_model
from layerstream.pipeline.planning.assumptions import rates_of
from layerstream.pipeline.planning.compute_cost import ComputeCost
from layerstream.pipeline.planning.workload_memory import estimate_memory, has_sinks
from layerstream.tools.synthetic.families import FAMILIES, scaled

PROMPT = 24
GENERATING = [
    "llama", "qwen3", "qwen3-moe", "mixtral", "phimoe", "gpt-oss", "deepseek-v3", "jamba", "gemma3", "gpt2",
    "falcon", "bloom", "opt", "mamba", "mamba2", "qwen3-next",
]  # fmt: skip
ROUTING = ["qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3"]
CACHING = [
    "llama", "qwen3", "mixtral", "deepseek-v3", "gemma3", "gpt2", "falcon", "falcon-new", "mpt", "bloom", "opt",
]  # fmt: skip


def built(case: str, *, on_meta: bool, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """The tiny model of ``case``."""
    name, config, defaults = CASES[case]
    made = getattr(transformers, config)(**{**defaults, **settings})
    with torch.device("meta" if on_meta else "cpu"):
        model = getattr(transformers, name)._from_config(made, dtype=dtype)
    return model.eval()


def inputs(batch: int, tokens: int, seen: int, *, padded: bool) -> dict[str, Any]:
    mask = torch.ones((batch, seen), dtype=torch.long)
    if padded:
        mask[0, 0] = 0
    ids = torch.ones((batch, tokens), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": True, "logits_to_keep": 1}


def sampled(logits: torch.Tensor) -> None:
    """What transformers does with the logits of a step when it samples by top-p."""
    scores = logits[:, -1].to(copy=True, dtype=torch.float32)
    sorted_scores, _order = torch.sort(scores)
    sorted_scores.softmax(dim=-1).cumsum(dim=-1)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers keeps alive."""
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    return sum(state.untyped_storage().nbytes() for state in states)


@covering(
    model={
        f"{case}-{dtype}": (case, dtype)
        for cases, dtypes in (
            (GENERATING, [torch.bfloat16]),
            (ROUTING, [torch.float32, torch.float16]),
        )
        for case in cases
        for dtype in dtypes
    },
    batch=[1, 3],
)
@torch.no_grad()
def test_a_pass_on_the_meta_device_counts_what_a_real_one_takes(
    model: tuple[str, torch.dtype], batch: int
) -> None:
    case, dtype = model
    memory = measure_memory(
        built(case, on_meta=True, dtype=dtype),
        Workload(batch_size=batch, prompt_tokens=PROMPT, new_tokens=1),
    )
    assert memory is not None
    assert memory.measured
    real = built(case, on_meta=False, dtype=dtype)
    prompt = inputs(batch, PROMPT, PROMPT, padded=batch > 1)
    step = inputs(batch, 1, PROMPT + 1, padded=batch > 1)
    with LiveBytes() as live:
        output = real(**prompt)
        sampled(output.logits)
    name = CACHE if CACHE in output else "cache_params"
    cache = output[name]
    del output
    prefill, cache_bytes_now = live.peak_bytes, live.now_bytes
    live.peak_bytes = live.now_bytes
    with live:
        output = real(**step, **{name: cache})
        sampled(output.logits)
    del output
    counters = 8 * len(cache.layers)  # a sliding window keeps its size in a tensor
    assert 0 <= live.now_bytes - memory.kv_bytes <= counters
    assert 0 <= live.peak_bytes - memory.kv_bytes - memory.decode_bytes <= counters
    assert 0 <= prefill - min(cache_bytes_now, memory.kv_bytes) - memory.prefill_bytes <= counters


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", ["t5", "marian"])
@torch.no_grad()
def test_an_encoder_and_its_decoder_are_counted_as_a_real_generation_takes_them(
    case: str, batch: int
) -> None:
    workload = Workload(batch_size=batch, prompt_tokens=PROMPT, new_tokens=1)
    memory = measure_memory(built(case, on_meta=True), workload)
    assert memory is not None
    model = built(case, on_meta=False)
    named = inputs(batch, PROMPT, PROMPT, padded=batch > 1)
    given = {name: named[name] for name in ("input_ids", "attention_mask", "use_cache")}
    first = torch.ones((batch, 1), dtype=torch.long)
    with LiveBytes() as live:
        output = model(**given, decoder_input_ids=first)
        sampled(output.logits)
    kept = output[CACHE], output.encoder_last_hidden_state
    del output
    prefill, live.peak_bytes = live.peak_bytes, live.now_bytes
    with live:
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=kept[1])
        step = {"attention_mask": given["attention_mask"], "encoder_outputs": encoded}
        output = model(**step, decoder_input_ids=first, use_cache=True, **{CACHE: kept[0]})
        sampled(output.logits)
    assert live.peak_bytes <= memory.kv_bytes + memory.decode_bytes <= live.peak_bytes + 1024
    assert prefill <= memory.peak_bytes <= max(prefill, live.peak_bytes) + 1024


@torch.no_grad()
def test_a_model_without_a_cache_is_counted_with_all_of_its_tokens() -> None:
    memory = measure_memory(
        built("bert", on_meta=True), Workload(batch_size=3, prompt_tokens=PROMPT)
    )
    assert memory is not None
    model = built("bert", on_meta=False)
    named = inputs(3, PROMPT, PROMPT, padded=True)
    with LiveBytes() as live:
        output = model(input_ids=named["input_ids"], attention_mask=named["attention_mask"])
    assert output.logits.shape[1] == PROMPT
    assert memory.kv_bytes == 0
    assert live.peak_bytes <= memory.prefill_bytes <= live.peak_bytes + 1024


def test_what_the_c_library_maps_one_by_one_counts_once() -> None:
    def memory(mapped_from_bytes: int | None) -> Any:
        workload = Workload(prompt_tokens=64, new_tokens=1)
        model = built("gpt2", on_meta=True)
        return measure_memory(model, workload, mapped_from_bytes=mapped_from_bytes)

    kept, mixed, mapped = (memory(nbytes) for nbytes in (None, 8 << 10, 1))
    assert kept.reserved_bytes == kept.kv_bytes + 2 * kept.prefill_bytes
    assert mapped.reserved_bytes == mapped.peak_bytes == kept.peak_bytes
    assert mapped.reserved_bytes < mixed.reserved_bytes < kept.reserved_bytes
    assert kept.spare_bytes == 2 * (kept.prefill_bytes - kept.decode_bytes)


def test_a_model_whose_step_cannot_run_without_values_is_measured_by_its_prompt() -> None:
    def refuse_one(_: Any, _inputs: Any, named: Any) -> None:
        if named["input_ids"].shape[1] == 1:
            raise RuntimeError("no values")

    workload = Workload(batch_size=2, prompt_tokens=PROMPT, new_tokens=6)
    exact = measure_memory(built("llama", on_meta=True), workload)
    model = built("llama", on_meta=True)
    model.register_forward_pre_hook(refuse_one, with_kwargs=True)
    memory = measure_memory(model, workload)
    assert memory is not None
    assert exact is not None
    assert memory.kv_bytes == exact.kv_bytes
    assert memory.prefill_bytes == memory.decode_bytes >= exact.prefill_bytes


def test_experts_of_odd_widths_are_measured() -> None:
    model = built("qwen3-moe", on_meta=True, moe_intermediate_size=9)
    assert measure_memory(model, Workload(prompt_tokens=PROMPT)) is not None


def test_tensors_that_are_plain_attributes_do_not_end_the_measurement() -> None:
    model = built("llama", on_meta=True)
    model.model.layers[0].table = torch.zeros(32, dtype=torch.bfloat16)
    model.model.layers[0].register_forward_hook(lambda layer, _, output: output + layer.table)
    prompt_pass = PromptPass.of(model, Workload(prompt_tokens=PROMPT))
    assert prompt_pass is not None
    assert trace_execution(model, prompt_pass)[0].complete
    assert prompt_pass.memory() is not None


def test_layers_are_counted_by_their_kinds_where_the_config_has_no_number_of_them() -> None:
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    config = {"hidden_size": 64, "num_attention_heads": 4, "layers_block_type": kinds}
    workload = Workload(prompt_tokens=64)
    one = estimate_memory(config, workload)
    two = estimate_memory({**config, "layers_block_type": 2 * kinds}, workload)
    assert one is not None
    assert two is not None
    assert two.kv_bytes == 2 * one.kv_bytes > 0


@pytest.mark.parametrize("case", CACHING)
@torch.no_grad()
def test_the_cache_is_estimated_to_the_byte(case: str, tmp_path: Path) -> None:
    settings = {"sliding_window": 8} if case in {"mixtral", "gemma3"} else {}
    folder = save_model(tmp_path, case, torch.bfloat16, **settings)
    config = json.loads((folder / "config.json").read_text())
    workload = Workload(batch_size=2, prompt_tokens=PROMPT, new_tokens=6)
    memory = measure_memory(built(case, on_meta=True, **settings), workload)
    model = built(case, on_meta=False, **settings)
    cache = model(**inputs(2, PROMPT, PROMPT, padded=False))[CACHE]
    for step in range(6):
        more = inputs(2, 1, PROMPT + step + 1, padded=False)
        cache = model(**more, **{CACHE: cache})[CACHE]
    assert memory is not None
    assert memory.kv_bytes == cache_bytes(cache)
    estimated = estimate_memory(config, workload)
    assert estimated is not None
    assert estimated.kv_bytes == cache_bytes(cache)


@pytest.mark.parametrize("case", GENERATING)
def test_the_estimated_cache_is_never_below_the_measured_one(case: str, tmp_path: Path) -> None:
    config = json.loads((save_model(tmp_path, case, torch.bfloat16) / "config.json").read_text())
    workload = Workload(batch_size=2, prompt_tokens=40, new_tokens=9)
    measured = measure_memory(built(case, on_meta=True), workload)
    estimated = estimate_memory(config, workload)
    assert measured is not None
    assert estimated is not None
    assert not estimated.measured
    assert estimated.kv_bytes >= measured.kv_bytes


@covering(family=list(FAMILIES), tokens=[(1, 16), (1, 512), (1, 4096), (8, 128)])
def test_the_estimate_is_near_what_is_measured(family: str, tokens: tuple[int, int]) -> None:
    six_layers = scaled(FAMILIES[family].config, layers=6, hidden=None, vocab=None)
    config = transformers.AutoConfig.for_model(**(settings := {**six_layers, "dtype": "bfloat16"}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    workload = Workload(batch_size=tokens[0], prompt_tokens=tokens[1], new_tokens=16)
    measured = measure_memory(model, workload)
    sinks = has_sinks(name for name, _ in model.named_parameters())
    assert sinks == (family == "gpt-oss-120b")
    estimated = estimate_memory(settings, workload, sinks=sinks)
    assert measured is not None
    assert estimated is not None
    assert 0.9 <= estimated.peak_bytes / measured.peak_bytes <= 2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_bias_on_relative_positions_is_estimated_for_every_pair(
    dtype: torch.dtype, batch: int
) -> None:
    model = built("t5", on_meta=False, dtype=dtype, num_heads=12)
    named = inputs(batch, 512, 512, padded=batch > 1)
    with LiveBytes() as live:
        model.encoder(input_ids=named["input_ids"], attention_mask=named["attention_mask"])
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    estimated = estimate_memory(config, Workload(batch_size=batch, prompt_tokens=512, new_tokens=1))
    assert estimated is not None
    assert 1 <= estimated.prefill_bytes / live.peak_bytes <= 1.5
    # Blockwise attention has a bias for near positions only.
    near = estimate_memory(config | {"local_radius": 7}, Workload(prompt_tokens=512, new_tokens=1))
    assert near is not None
    assert near.prefill_bytes < estimated.prefill_bytes / 4


@given(st.sampled_from(sorted(FAMILIES)), st.tuples(*[st.integers(1, 5000)] * 3), st.integers(0, 2))
def test_more_of_anything_takes_no_less_memory(
    family: str, sizes: tuple[int, ...], grown: int
) -> None:
    names = ("batch_size", "prompt_tokens", "new_tokens")
    less = dict(zip(names, sizes, strict=True))
    more = {**less, names[grown]: less[names[grown]] + 1}
    one, other = (
        estimate_memory(FAMILIES[family].config, Workload(**each)) for each in (less, more)
    )
    assert one is not None
    assert other is not None
    assert one.kv_bytes <= other.kv_bytes
    assert one.peak_bytes <= other.peak_bytes
    assert one.decode_bytes <= other.decode_bytes


def test_a_model_that_loops_over_its_tokens_is_given_up_early() -> None:
    assert measure_memory(built("mamba", on_meta=True), Workload(prompt_tokens=100_000)) is None


def test_a_config_without_sizes_gives_no_estimate() -> None:
    assert estimate_memory({}, Workload()) is None
    assert estimate_memory(None, Workload()) is None


@pytest.mark.parametrize("case", [*GENERATING, "t5", "vit", "clip", "llava"])
def test_opening_a_model_for_a_workload_measures_it_and_finds_the_same_layers(
    case: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, case, torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    config, _ = load_config(folder)
    workload = Workload(batch_size=2, prompt_tokens=40, new_tokens=9)

    def assembled(workload: Workload | None) -> Assembly:
        model_class = resolve_model_class(config)
        traced = trace_model(checkpoint, config=config, model_class=model_class)
        return Assembly(traced, checkpoint, workload)

    assert assembled(workload).layers == assembled(None).layers
    assert assembled(None).memory is None
    measured = measure_memory(
        trace_model(checkpoint, config=config, model_class=resolve_model_class(config)).module,
        workload,
    )
    assert measured is not None
    assert assembled(workload).memory == measured


@pytest.mark.parametrize(
    "odd",
    [
        {"text_config": [1]},
        {"text_config": "gpt"},
        {"layer_types": [["full_attention"], {}, None]},
        {"num_hidden_layers": 10**9},
        {"hidden_size": -64},
        {"vocab_size": -9},
    ],
    ids=json.dumps,
)
def test_a_config_of_nonsense_is_estimated_or_ignored(odd: dict[str, Any]) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **odd}
    memory = estimate_memory(config, Workload())
    assert memory is None or memory.reserved_bytes > 0
    ComputeCost(config, rates_of(CPU))
