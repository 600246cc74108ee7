"""One class of transformers: built tiny, and compared as a drop-in with what from_pretrained loads."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import (
    AdmissionError,
    Budget,
    LayerstreamError,
    PlanError,
    StreamedModel,
    Workload,
    load_streamed,
)
from layerstream.tools.benchmarks.tiny_inputs import inputs_of
from layerstream.tools.benchmarks.tiny_models import tiny_models

__all__ = [
    "DTYPES",
    "built_model",
    "calls_of",
    "check",
    "computed",
    "equal_bits",
    "gap_of",
    "tensors_of",
    "twice_equal",
    "working_inputs",
]

DTYPES = (torch.float32, torch.bfloat16)
_WORKLOAD = Workload(prompt_tokens=8, new_tokens=8)
_GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
_MIB = 1 << 20


def check(name: str, folder: Path) -> dict[str, Any]:
    """The row of a class: what was compared, and how it came out."""
    import transformers

    torch.set_num_threads(1)
    kind = getattr(transformers, name, None)
    if kind is None:
        return {"outcome": "not built", "detail": "transformers does not export it"}
    model, why = built_model(kind)
    if model is None:
        return {"outcome": "not built", "detail": why[0], "others": list(dict.fromkeys(why[1:]))}
    compared: list[str] = []
    for dtype in DTYPES:
        label = str(dtype).removeprefix("torch.")
        path = folder / label
        try:
            model.to(dtype).save_pretrained(path)
            reference = kind.from_pretrained(path, dtype=dtype).eval()
        except Exception as error:  # noqa: BLE001
            return {
                "outcome": "not built",
                "detail": f"transformers does not load it: {error!r:.200}",
            }
        found = _compare(kind, path, reference, dtype)
        if isinstance(found, dict):
            return {**found, "dtype": label, "compared": compared}
        compared += [f"{label} {each}" for each in found]
    if not compared:
        return {"outcome": "not built", "detail": "no inputs that it takes"}
    return {"outcome": "equal", "compared": compared}


def built_model(
    kind: type[Any], *, preferred: Callable[[Any], bool] = lambda _: True
) -> tuple[Any, list[str]]:
    """A tiny model that computes, the first that is preferred or the first; or None, and why each that was tried does not."""
    why: list[str] = []
    first = None
    try:
        for build in tiny_models(kind):
            try:
                model = build()
            except Exception as error:  # noqa: BLE001 - the next one may keep the rule that this one breaks
                why.append(f"{error!r:.200}")
                continue
            inputs, error_of = working_inputs(model, torch.float32)
            if inputs is not None and preferred(model):
                return model, []
            if inputs is not None:
                first = model if first is None else first
                continue
            why.append(f"no inputs that it takes: {error_of}")
    except Exception as error:  # noqa: BLE001
        why.append(f"{error!r:.200}")
    return first, [] if first is not None else why


def working_inputs(model: Any, dtype: torch.dtype) -> tuple[dict[str, Any] | None, str]:
    """Inputs that the model takes; or None, and what it says to the first that were tried."""
    first = ""
    for inputs in inputs_of(model, dtype):
        try:
            computed(partial(model, **inputs))
        except Exception as error:  # noqa: BLE001
            first = first or f"{error!r:.200}"
        else:
            return dict(inputs), ""
    return None, first


def computed(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, with equal random numbers each time."""
    torch.manual_seed(3)
    with torch.no_grad():
        return work()


def _compare(
    kind: type[Any], path: Path, reference: Any, dtype: torch.dtype
) -> dict[str, Any] | list[str]:
    """The names of what is equal, or the row of what is not."""
    inputs, _ = working_inputs(reference, dtype)
    if inputs is None:
        return []  # transformers itself cannot compute it in this dtype
    works = calls_of(inputs)
    expected = {name: twice_equal(partial(work, reference)) for name, work in works.items()}
    expected = {name: tensors for name, tensors in expected.items() if tensors}
    threads = threading.active_count()
    for budget in _budgets(kind, path):
        if isinstance(budget, dict):
            return budget
        found = _compare_streamed(kind, path, works, expected, budget)
        if found is not None:
            break
    else:
        return {"outcome": "refused", "detail": "no budget up to 512 MiB is enough"}
    if isinstance(found, list) and threading.active_count() > threads:
        return {"outcome": "failed", "detail": "threads are left"}
    if isinstance(found, dict) and found["outcome"] == "different":
        name = found["call"]
        again = [twice_equal(partial(works[name], reference)) for _ in range(3)]
        if not all(equal_bits(expected[name], each) for each in again):  # by chance, then
            return []
    return found


def calls_of(inputs: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """What is compared, by its name: each takes a model."""
    return {
        "forward": lambda model: model(**_copied(inputs)),
        "steps": lambda model: _steps(model, _copied(inputs)),
        "generate": lambda model: model.generate(
            **_prompt(_copied(inputs)), **_GREEDY, **_start(model)
        ),
    }


def twice_equal(work: Callable[[], Any]) -> list[torch.Tensor]:
    """The tensors of what ``work`` returns; none if it fails, or returns others the second time."""
    try:
        first, second = (tensors_of(computed(work)) for _ in range(2))
    except Exception:  # noqa: BLE001 - then it cannot do that
        return []
    return first if equal_bits(first, second) else []


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Some models write to their inputs."""
    return {name: each.clone() for name, each in inputs.items()}


def _prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in inputs.items() if name != "decoder_input_ids"}


def _start(model: Any) -> dict[str, int]:
    """The token that a decoder begins with, where the default config names none."""
    needs = model.config.is_encoder_decoder
    return {"decoder_start_token_id": 1} if needs else {}


def _steps(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """The prompt's pass, and two that go on with its cache."""
    outputs = [model(**inputs, use_cache=True)]
    ids: Any = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    for _ in range(2):
        names = ("cache", "past_key_values", "cache_params")
        found = next(n for n in names if outputs[-1].get(n) is not None)
        step = {found: outputs[-1][found]}
        if "decoder_input_ids" in inputs:
            step["decoder_input_ids"] = ids[:, -1:]
            step["encoder_outputs"] = (outputs[0].encoder_last_hidden_state,)
        else:
            step["input_ids"] = ids[:, -1:]
        outputs.append(model(**step, use_cache=True))
    return [output.get("logits", output[0]) for output in outputs]


def _budgets(kind: type[Any], path: Path) -> Iterator[Any]:
    """Budgets from the least in which it streams; or the row that says why it does not open."""
    try:
        least = asyncio.run(_least_bytes(kind, path))
    except LayerstreamError as error:
        yield {"outcome": "refused", "detail": f"{type(error).__name__}: {error}"}
        return
    for more in (0, 32, 128, 512):
        yield Budget(host=least + more * _MIB)


async def _least_bytes(kind: type[Any], path: Path) -> int:
    """Memory in which two layer batches fit beside what has to be resident."""
    options: dict[str, Any] = {"device": "cpu", "workload": _WORKLOAD, "layer_batch_size": 1}
    async with StreamedModel.open(
        path, budget="2GiB", measure=False, model_class=kind, **options
    ) as model:
        plan = model.plan
    sizes = [batch.host_bytes + batch.device_bytes for batch in plan.batches]
    pinned = sum(
        size for size, batch in zip(sizes, plan.batches, strict=True) if "shared" in batch.layers
    )
    return plan.host_memory.reserved_bytes + pinned + 2 * max(sizes)


def _compare_streamed(
    kind: type[Any],
    path: Path,
    works: dict[str, Callable[[Any], Any]],
    expected: dict[str, list[torch.Tensor]],
    budget: Budget,
) -> dict[str, Any] | list[str] | None:
    """As ``_compare``; None if the budget is too small."""
    name = "open"
    try:
        with load_streamed(
            path,
            device="cpu",
            budget=budget,
            workload=_WORKLOAD,
            layer_batch_size=1,
            measure=False,
            model_class=kind,
        ) as model:
            for name, tensors in expected.items():
                found = tensors_of(computed(partial(works[name], model)))
                if not equal_bits(tensors, found):
                    detail = f"{name}: {gap_of(tensors, found)}"
                    return {"outcome": "different", "call": name, "detail": detail}
    except (AdmissionError, PlanError):
        return None
    except LayerstreamError as error:
        return {"outcome": "refused", "detail": f"{name}: {type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001
        import traceback

        trace = traceback.format_exc()[-3000:]
        return {"outcome": "failed", "detail": f"{name}: {error!r:.300}", "trace": trace}
    return list(expected)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in a model's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors_of(each)]
    return []


def equal_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two outputs have the same tensors, bit for bit."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
        for a, b in zip(one, other, strict=True)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def gap_of(one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    """How far two outputs are apart."""
    if [each.shape for each in one] != [each.shape for each in other]:
        return "other shapes"
    gaps = [
        float((a.double() - b.double()).abs().max())
        for a, b in zip(one, other, strict=True)
        if a.numel() and not a.is_complex()
    ]
    return f"by up to {max(gaps, default=0):.3g}"
