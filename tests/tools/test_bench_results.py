"""Results of ``layerstream bench``: ratios to layerstream, and agreement of logits."""

from pathlib import Path

import numpy as np
from support.contenders import make_setup

from layerstream.tools.compare.contenders import Contender
from layerstream.tools.compare.results import Spread, make_rows
from layerstream.tools.compare.rounds import Outcome, Pass, TurnResult


def turn_result(
    number: int, *, cold: float | None = None, shape: tuple[int, ...] | None = None
) -> TurnResult:
    return TurnResult(
        round=number,
        all_was_dropped=True,
        open_seconds=1.0,
        cold=None if cold is None else Pass(seconds=cold, read_bytes=10),
        warm=None,
        peak_anonymous_bytes=1,
        peak_bytes=None,
        logits_shape=shape,
        notes={},
        versions={},
    )


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    ours = Contender(name="layerstream", opener="layerstream")
    other = Contender(name="other", opener="other")
    our_turns = [turn_result(1, cold=1.0), turn_result(2, cold=2.0), turn_result(3, cold=4.0)]
    other_turns = [turn_result(1, cold=3.0), turn_result(3, cold=4.0)]
    row = make_rows(
        Outcome(turns={ours: our_turns, other: other_turns}, failed=()), make_setup(tmp_path)
    )[1]
    assert row.ratio("cold") == Spread(median=2.0, least=1.0, most=3.0)
    assert row.ratio("warm") is None
    assert row.seconds("cold") == Spread(median=3.5, least=3.0, most=4.0)
    assert row.to_json()["cold_read_bytes"] == [10, 10]


def test_differences_of_logits_are_measured_unless_their_shapes_differ(
    tmp_path: Path,
) -> None:
    setup = make_setup(tmp_path)
    logits = {
        "layerstream": [[1.0, 2.0], [3.0, 4.0]],
        "transformers, all in memory": [[1.0, 2.0], [4.5, 4.0]],
        "AirLLM": [[1.0]],
    }
    turns = {}
    for name, values in logits.items():
        each = Contender(name=name, opener=name)
        array = np.array(values, np.float32)
        array.tofile(setup.logits_file(each))
        turns[each] = [turn_result(1, shape=array.shape)]
    ours, reference, air = make_rows(Outcome(turns=turns, failed=()), setup)
    assert reference.agreement is None
    assert ours.agreement
    assert not ours.agreement.equal
    assert (ours.agreement.max_abs_difference, ours.agreement.same_argmax_share) == (1.5, 0.5)
    assert air.agreement
    assert air.agreement.text() == "not comparable"
