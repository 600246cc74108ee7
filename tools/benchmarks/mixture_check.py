"""One mixture of experts of transformers: built tiny, read on demand in least memory and in much, and compared bit for bit."""

import asyncio
import functools
import itertools
import threading
import traceback
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
from layerstream.pipeline.modeling.experts import expert_store
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.experts.usage import ExpertRoute
from layerstream.tools.benchmarks.architecture_check import (
    DTYPES,
    built_model,
    calls_of,
    computed,
    equal_bits,
    gap_of,
    tensors_of,
    twice_equal,
    working_inputs,
)

__all__ = ["check_mixture", "expert_classes", "has_expert_class"]

_IMPLEMENTATIONS = (None, "eager")
_WORKLOAD = Workload(prompt_tokens=16, new_tokens=8)
_MUCH = Budget(host="2GiB")
_ALIGNED = 8  # numbers of bfloat16
_MIB = 1 << 20
_MOST_DEMANDS = 100_000
_DECORATOR = "\n@use_experts_implementation"
_CLASS = "\nclass "


@functools.cache
def expert_classes() -> frozenset[str]:
    """The names of all classes that transformers' registry of implementations computes for."""
    import transformers

    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for part in file.read_text().split(_DECORATOR)[1:]:
            found.add(part.partition(_CLASS)[2].partition("(")[0])
    return frozenset(found)


def has_expert_class(name: str) -> bool:
    """Whether the package of the model class ``name`` has one of them."""
    import transformers

    kind = getattr(transformers, name, None)
    package = "" if kind is None else str(kind.__module__).rpartition(".")[0]
    folder = Path(transformers.__file__).parent.joinpath(*package.split(".")[1:])
    return bool(package) and any(
        _DECORATOR in file.read_text() for file in folder.glob("modeling_*.py")
    )


def check_mixture(name: str, folder: Path) -> dict[str, Any]:
    """The row of a model class: what was compared, how it came out, and which experts were read on demand."""
    import transformers

    torch.set_num_threads(1)
    kind = getattr(transformers, name)
    model, why = built_model(kind, preferred=_is_aligned)
    if model is None:
        return {"outcome": "not built", "detail": why[0], "others": list(dict.fromkeys(why[1:]))}
    modules = _expert_modules(model)
    kinds = sorted({type(each).__name__ for each in modules.values()})
    if not modules:
        return {"outcome": "no experts", "detail": "none in its tiny model"}
    row = {"kinds": kinds, "modules": len(modules), **_compared(model, list(modules), folder)}
    for outcome, key in (("streamed whole", "whole"), ("equal, but shows less", "not_shown")):
        if row["outcome"] == "equal" and row[key]:
            row |= {"outcome": outcome, "detail": row[key][0]}
    return row


def _compared(model: Any, modules: list[str], folder: Path) -> dict[str, Any]:
    """What was compared in each dtype with each implementation, until something was not equal."""
    kind = type(model)
    row: dict[str, Any] = {"compared": [], "whole": [], "not_shown": []}
    for dtype, implementation in itertools.product(DTYPES, _IMPLEMENTATIONS):
        label = str(dtype).removeprefix("torch.")
        path = folder / label
        try:
            model.to(dtype).save_pretrained(path)
            kind.from_pretrained(path, dtype=dtype)
        except Exception as error:  # noqa: BLE001
            return {**row, "outcome": "not built", "detail": f"not loaded: {error!r:.200}"}
        case = f"{label} {implementation or 'default'}"
        found = _compare(kind, path, dtype, implementation, modules)
        for key in ("compared", "whole", "not_shown"):
            row[key] += [f"{case} {each}" for each in found.pop(key, [])]
        if found:
            return {**row, **found, "case": case}
    if not row["compared"]:
        return {**row, "outcome": "not built", "detail": "no inputs that it takes"}
    return {**row, "outcome": "equal"}


def _expert_modules(model: Any) -> dict[str, Any]:
    named = model.named_modules()
    return {path: each for path, each in named if type(each).__name__ in expert_classes()}


def _is_aligned(model: Any) -> bool:
    """Whether torch's grouped product takes the experts in bfloat16, as those of any real size."""
    return all(
        parameter.shape[-1] % _ALIGNED == 0
        for module in _expert_modules(model).values()
        for parameter in module.parameters()
        if parameter.dim() == 3  # noqa: PLR2004 - matrices of experts
    )


def _compare(
    kind: type[Any], path: Path, dtype: torch.dtype, implementation: str | None, modules: list[str]
) -> dict[str, Any]:
    """What was compared, and what was streamed whole; with an outcome if something is not equal."""
    options = {} if implementation is None else {"experts_implementation": implementation}
    reference = kind.from_pretrained(path, dtype=dtype, **options).eval()
    inputs, _ = working_inputs(reference, dtype)
    if inputs is None:
        return {}  # transformers itself cannot compute it in this dtype
    works = calls_of(inputs)
    expected = {name: twice_equal(partial(work, reference)) for name, work in works.items()}
    expected = {name: tensors for name, tensors in expected.items() if tensors}
    del reference
    threads = threading.active_count()
    result: dict[str, Any] = {"compared": [], "whole": [], "not_shown": []}
    for amount, budgets in (("least", _least_budgets(kind, path, options)), ("all", [_MUCH])):
        for budget in budgets:
            found = _streamed(kind, path, budget, options, works=works, expected=expected)
            if found is not None:
                break
        else:
            return {**result, "outcome": "refused", "detail": f"{amount}: no budget is enough"}
        if "outcome" in found:
            return {**result, **found}
        missing = set(modules) - set(found["on_demand"])
        result["whole"] += [f"{amount}: {each}" for each in sorted(missing)]
        if found["on_demand"] and (wrong := _not_shown(amount, found)):
            result["not_shown"].append(f"{amount}: {wrong}")
        result["compared"] += [f"{amount} {each}" for each in expected]
    if threading.active_count() > threads:
        return {**result, "outcome": "failed", "detail": "threads are left"}
    return result


def _not_shown(amount: str, found: dict[str, Any]) -> str:
    """What a run has not shown though it was meant to."""
    if not found["misses"]:
        return "no expert was read"
    if amount == "least" and found["demand"] <= found["cells"]:
        return f"{found['cells']} cells, and passes need {found['demand']} experts"
    if amount == "all" and found["cells"] < found["all"]:
        return f"{found['cells']} cells for {found['all']} experts"
    return ""


def _least_budgets(kind: type[Any], path: Path, options: dict[str, Any]) -> Iterator[Budget]:
    """The least in which it opens, and more, if a call needs it."""

    async def opened() -> None:
        async with StreamedModel.open(path, budget=Budget(host=_MIB), **_settings(kind, options)):
            pass

    try:
        asyncio.run(opened())
    except PlanError as error:
        for more in (0, 1, 4, 16, 64, 256):
            yield Budget(host=(error.needed_bytes or _MIB) + more * _MIB)


def _settings(kind: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        **options,
        "device": "cpu",
        "workload": _WORKLOAD,
        "layer_batch_size": 1,
        "measure": False,
        "model_class": kind,
        "reader": "direct",  # mapped files need no slots, whose memory would go to cells
    }


def _streamed(
    kind: type[Any],
    path: Path,
    budget: Budget,
    options: dict[str, Any],
    *,
    works: dict[str, Callable[[Any], Any]],
    expected: dict[str, list[torch.Tensor]],
) -> dict[str, Any] | None:
    """What the experts did, or the outcome if it is not equal; None if the budget is too small."""
    name, route = "open", ExpertRoute(most=_MOST_DEMANDS)
    try:
        with load_streamed(path, budget=budget, **_settings(kind, options)) as model:
            if (store := expert_store(model)) is not None:
                store.record(route)
            for name, tensors in expected.items():
                found = tensors_of(computed(partial(works[name], model)))
                if not equal_bits(tensors, found):
                    return {"outcome": "different", "detail": f"{name}: {gap_of(tensors, found)}"}
            return {"on_demand": []} if store is None else _shown(store, route)
    except (AdmissionError, PlanError):
        return None
    except LayerstreamError as error:
        return {"outcome": "refused", "detail": f"{name}: {type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001
        trace = traceback.format_exc()[-3000:]
        return {"outcome": "failed", "detail": f"{name}: {error!r:.300}", "trace": trace}


def _shown(store: ExpertStore, route: ExpertRoute) -> dict[str, Any]:
    """What the experts on demand did."""
    counts = store.counts()
    return {
        "on_demand": [each.module for each in store.sets],
        "misses": counts.wanted - counts.hits,
        "demand": max((len(each.experts) for each in route.demands), default=0),
        "cells": sum(region.count for region in store._cells.regions),  # noqa: SLF001
        "all": sum(each.experts for each in store.sets),
    }
