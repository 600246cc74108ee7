"""When a chat says that the first token will come."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.plans import plan_of

from layerstream.pipeline import Plan, Workload
from layerstream.stages.telemetry.forecast import PredictionCheck
from layerstream.tools.running.answer_times import first_token_seconds
from layerstream.tools.serving.progress import Progress

MIB = 1 << 20
PLANNED = 512


@pytest.fixture(scope="module")
def plan() -> Plan:
    workload = Workload(prompt_tokens=PLANNED, new_tokens=16)
    made = plan_of([MIB] * 8, workload=workload)
    sweep = made.prediction.decode
    prompt = dataclasses.replace(sweep, seconds=40.0, compute_seconds=39.0, read_seconds=5.0)
    step = dataclasses.replace(sweep, seconds=5.5, compute_seconds=0.5, read_seconds=5.0)
    predicted = dataclasses.replace(
        made.prediction, first=prompt.plus(step), prefill=prompt, decode=step
    )
    return dataclasses.replace(made, prediction=predicted)


def expected(plan: Plan, tokens: int, *, sweeps: int = 1, slower: float | None = None) -> float:
    forecast = None
    if slower is not None:
        step = plan.prediction.decode
        measured = dataclasses.replace(step, seconds=step.seconds * slower)
        forecast = PredictionCheck(sweeps=1, predicted=step, measured=measured)
    return first_token_seconds(plan, prompt_tokens=tokens, sweeps=sweeps, forecast=forecast)


def test_a_prompt_as_long_as_planned_takes_as_long_as_planned(plan: Plan) -> None:
    assert expected(plan, PLANNED) == pytest.approx(plan.prediction.prefill.seconds)
    assert expected(plan, PLANNED, sweeps=0) == pytest.approx(plan.prediction.first.seconds)


def test_a_short_prompt_still_reads_all_weights_and_a_long_one_computes_longer(plan: Plan) -> None:
    assert expected(plan, 1) == pytest.approx(6.0)  # 5 s of reading, and 1 s of waiting
    assert expected(plan, 2 * PLANNED) > 1.9 * expected(plan, PLANNED) - 5


def test_what_sweeps_have_taken_corrects_the_plan(plan: Plan) -> None:
    assert expected(plan, PLANNED, slower=3.0) == pytest.approx(3 * expected(plan, PLANNED))


@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_service_corrects_the_plan_by_the_sweeps_of_earlier_requests(
    plan: Plan, sweeps: int
) -> None:
    step = plan.prediction.decode
    measured = dataclasses.replace(step, seconds=step.seconds * 3)
    check = PredictionCheck(sweeps=sweeps, predicted=step, measured=measured) if sweeps else None
    model = SimpleNamespace(
        plan=plan,
        stats=lambda: SimpleNamespace(sweeps=sweeps, requests_waiting=0),
        timings=lambda: SimpleNamespace(forecast=check),
    )
    progress = Progress(cast("Any", model))
    progress.start([2])
    seconds = 3 * plan.prediction.prefill.seconds if sweeps else plan.prediction.first.seconds
    assert progress.seconds_to_token == pytest.approx(seconds, abs=1)
