"""Several requests over one mixture: ``python -m layerstream.tools.benchmarks.experts_together PATH --host 160MiB``.

Requests that are generated at the same time, each with a prompt of its own, go through the layers in the same sweeps. An expert that
several of them need should be read once: bytes that were read are compared with the union of what the passes of each layer in
each sweep needed. Results: experts.md.
"""

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

from layerstream.pipeline import Budget, StreamedModel, Workload
from layerstream.pipeline.modeling.experts import expert_store
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.experts.usage import ExpertDemand
from layerstream.tools.console.arguments import budget_size, positive_int

__all__ = ["main"]


def main() -> int:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a mixture of experts")
    parser.add_argument("--host", type=budget_size, default="25%", help="host budget")
    parser.add_argument("--requests", type=positive_int, default=8)
    parser.add_argument("--prompt-tokens", type=positive_int, default=4)
    parser.add_argument("--new-tokens", type=positive_int, default=10)
    parser.add_argument("--rounds", type=positive_int, default=3)
    args = parser.parse_args()
    for _ in range(args.rounds):
        print(json.dumps(asyncio.run(_turn(args))), flush=True)
    return 0


async def _turn(args: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 200, (args.requests, 1, args.prompt_tokens), generator=generator)
    async with StreamedModel.open(
        args.path,
        device="cpu",
        budget=Budget(host=args.host),
        workload=Workload(
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            batch_size=args.requests,
        ),
        measure=False,
        reader="direct",
    ) as model:
        store = expert_store(model.module)
        if store is None:
            raise SystemExit(f"{args.path} has no experts on demand")
        needed = _Union(model, store)
        await asyncio.gather(
            *(
                model.generate(input_ids=each, max_new_tokens=args.new_tokens, do_sample=False)
                for each in prompts
            )
        )
        counts, plan = store.counts(), model.plan
        return {
            "cells": sum(each.cells for each in plan.experts) + plan.shared_expert_cells,
            "demands_per_layer_and_sweep": needed.demands / len(needed.experts),
            "wanted": counts.wanted,
            "union": needed.count,
            "read": counts.wanted - counts.hits,
            "read_bytes": counts.read_bytes,
            "read_over_union": (counts.wanted - counts.hits) / needed.count,
        }


class _Union:
    """What the passes of each layer and sweep need together; gets the demands instead of a recorded route."""

    def __init__(self, model: StreamedModel, store: ExpertStore) -> None:
        self._model = model
        self.demands = 0
        self.experts: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        count = store.count

        def counted(demand: ExpertDemand) -> None:
            self.demands += 1
            self.experts[model.stats().sweeps, demand.set_index].update(demand.experts)
            count(demand)

        store.count = counted  # type: ignore[method-assign]

    @property
    def count(self) -> int:
        """Experts of all unions."""
        return sum(map(len, self.experts.values()))


if __name__ == "__main__":
    sys.exit(main())
