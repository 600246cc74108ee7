"""Budgets, workloads and plans as data: invalid ones are refused, and JSON is read back or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import plan_of

from layerstream.pipeline import Budget, Plan, PlanError, Workload

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("80 GB", 80 * 10**9),
        (" 1.5gib ", 3 << 29),
        ("512 MiB", 512 << 20),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_a_budget_is_a_number_of_bytes_or_a_string_with_a_unit(text, nbytes):
    assert Budget(host=text).host_bytes(1) == Budget(vram=text).vram_bytes(1) == nbytes


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "much",
        "4 GiBs",
        "-4GiB",
        "4,5GiB",
        "0",
        "0GiB",
        "GiB",
        "1e9",
        "9" * 400,
        0,
        -1,
        True,
        1.5,
    ],
)
def test_a_budget_that_is_not_a_size_is_refused_when_it_is_made(nonsense):
    with pytest.raises(PlanError, match="host budget"):
        Budget(host=nonsense)
    with pytest.raises(PlanError, match="VRAM budget"):
        Budget(vram=nonsense)


@pytest.mark.parametrize("field", ["batch_size", "prompt_tokens", "new_tokens"])
@pytest.mark.parametrize("nonsense", [0, -1, 1.5, "8", True, None])
def test_an_invalid_workload_is_refused(field, nonsense):
    with pytest.raises(PlanError, match=f"{field} is .*whole number from 1"):
        Workload(**{field: nonsense})


def raw_plan():
    return json.loads(plan_of([MIB] * 3, host=64 * MIB).to_json())


def without(key):
    raw = raw_plan()
    del raw[key]
    return raw


def with_batch(**changes):
    raw = raw_plan()
    raw["batches"][1].update(changes)
    return raw


NOT_PLANS = {
    "not JSON": "nonsense",
    "empty": "",
    "null": "null",
    "a list": "[]",
    "brackets without end": "[" * 100_000,
    "another version": json.dumps({"version": 0}),
    "no version": json.dumps(without("version")),
    "a version of another type": json.dumps({**raw_plan(), "version": True}),
    "a field missing": json.dumps(without("batches")),
    "a field too many": json.dumps({**raw_plan(), "more": 1}),
    "a string for a number": json.dumps({**raw_plan(), "host_arena_bytes": "1"}),
    "a float for a count": json.dumps({**raw_plan(), "host_slots": 1.5}),
    "a bool for a count": json.dumps({**raw_plan(), "host_slots": True}),
    "an unknown reader": json.dumps({**raw_plan(), "reader": "telepathy"}),
    "a list for a string": json.dumps({**raw_plan(), "device": []}),
    "a number for a list": json.dumps({**raw_plan(), "notes": 1}),
    "a nonsensical workload": json.dumps({**raw_plan(), "workload": {"batch_size": 0}}),
    "a batch that is no batch": json.dumps({**raw_plan(), "batches": [1]}),
    "batches out of order": json.dumps(with_batch(index=2)),
    "an unknown place": json.dumps(with_batch(tensors=[{"place": "moon"}])),
    "more memory than its budget": json.dumps(
        {**raw_plan(), "host_memory": {**raw_plan()["host_memory"], "budget_bytes": 1}}
    ),
}


@pytest.mark.parametrize("text", NOT_PLANS.values(), ids=NOT_PLANS)
def test_text_that_is_not_a_plan_is_refused(text):
    with pytest.raises(PlanError, match=r"plan|workload"):
        Plan.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(sorted(raw_plan())),
)
def test_a_plan_with_garbage_in_a_field_is_refused_or_read_but_never_crashes(garbage, field):
    raw = {**raw_plan(), field: garbage}
    try:
        plan = Plan.from_json(json.dumps(raw))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
