"""What a generation's choice of experts would have hit in memory, for ``layerstream profile --experts``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import ModelError

if TYPE_CHECKING:
    from layerstream.pipeline import Plan, StreamedModel
    from layerstream.pipeline.planning.expert_replay import Replay
    from layerstream.stages.experts.usage import ExpertRoute

__all__ = ["ExpertProfile", "profile_experts"]

# Enough for a hundred thousand tokens of ten layers; some tens of megabytes.
_MOST_DEMANDS = 1_000_000
# The curve is shown for these shares of all experts.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertProfile:
    """A recorded route of decoding, replayed."""

    tokens: int
    """That were decoded."""
    dropped: int
    """Demands of passes that were not recorded, since there were too many."""
    cells: int
    """Of the plan, all layers together."""
    experts: int
    wanted: int
    hits: int
    """Those of the store; cells were filled before by a prompt."""
    replays: tuple["Replay", ...]
    """With the plan's cells first, then by cells."""
    distinct_per_layer: tuple[int, ...]
    """How many different experts each layer's tokens were routed to."""

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        curve = [
            {
                **asdict(each),
                "quota_lru_hit_share": each.share(each.quota_lru_hits),
                "global_lru_hit_share": each.share(each.global_lru_hits),
                "optimal_hit_share": each.share(each.optimal_hits),
            }
            for each in self.replays
        ]
        return {
            "decoded_tokens": self.tokens,
            "dropped_demands": self.dropped,
            "expert_cells": self.cells,
            "experts": self.experts,
            "experts_wanted": self.wanted,
            "expert_hits": self.hits,
            "expert_hit_share": self.hits / self.wanted if self.wanted else 0.0,
            "distinct_experts_per_layer": list(self.distinct_per_layer),
            "with_the_plans_cells": curve[0],
            "by_cells": curve[1:],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each number of cells: cells, their share of the experts, and the hits of each way to use them."""
        return [
            (
                f"{each.cells}{' (plan)' if number == 0 else ''}",
                f"{each.cells / self.experts:.0%}",
                *(
                    f"{each.share(hits):.1%}"
                    for hits in (each.quota_lru_hits, each.global_lru_hits, each.optimal_hits)
                ),
            )
            for number, each in enumerate(self.replays)
        ]

    @property
    def sentence(self) -> str:
        """What was recorded."""
        distinct = self.distinct_per_layer
        found = (
            f"{self.tokens} tokens wanted {self.wanted} experts, {self.hits / max(self.wanted, 1):.1%} were in memory, on a GPU in VRAM; "
            f"each layer used {min(distinct)} to {max(distinct)} different ones"
        )
        if self.dropped:
            found += f"; {self.dropped} further demands were not recorded"
        return found


async def profile_experts(
    model: "StreamedModel", *, prompt: Any, tokens: int, options: Mapping[str, Any]
) -> ExpertProfile:
    """Sample ``tokens`` after ``prompt``, record which experts they are routed to, and replay that.

    ``options``: Others of the request.

    Raises:
        ModelError: Experts are not read on demand.
    """
    from layerstream.pipeline.modeling.experts import expert_store
    from layerstream.stages.experts.usage import ExpertRoute

    store = expert_store(model.module)
    if store is None:
        raise ModelError(
            "--experts needs a model whose experts are read on demand, and this plan has none: it is no mixture of experts, or its "
            "experts stream with their layers; leave --experts out"
        )
    route = ExpertRoute(most=_MOST_DEMANDS)
    decoded = 0
    async for _ in model.stream(
        input_ids=prompt,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        do_sample=True,
        **options,
    ):
        if not decoded:  # the prompt's; what follows is decoding
            store.record(route)
            before = store.counts()
        decoded += 1
    store.record(None)
    after = store.counts()
    wanted, hits = after.wanted - before.wanted, after.hits - before.hits
    return _replayed(route, model.plan, tokens=decoded - 1, wanted=wanted, hits=hits)


def _replayed(
    route: "ExpertRoute", plan: "Plan", *, tokens: int, wanted: int, hits: int
) -> ExpertProfile:
    from layerstream.pipeline.planning.expert_replay import replay

    demands = route.demands
    experts = sum(each.experts for each in plan.experts)
    cells = sum(each.cells for each in plan.experts) + plan.shared_expert_cells
    if not plan.on_cpu:  # those that are computed with
        cells = sum(each.device_cells for each in plan.experts) + plan.shared_device_expert_cells
    sizes: Sequence[int] = [cells, *(max(1, round(experts * share)) for share in _SHARES)]
    used: list[set[int]] = [set() for _ in plan.experts]
    for demand in demands:
        used[demand.set_index].update(demand.experts)
    return ExpertProfile(
        tokens=tokens,
        dropped=route.dropped,
        cells=cells,
        experts=experts,
        wanted=wanted,
        hits=hits,
        replays=tuple(replay(demands, cells=size) for size in sizes),
        distinct_per_layer=tuple(len(each) for each in used),
    )
