"""Mixtures whose experts are read on demand compute what transformers computes, with any number of cells."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import transformers
from support.experts import host_cells
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, save_model
from support.selection import covering
from support.streaming import SMALL, bits_equal, open_streaming
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from layerstream.pipeline import Budget, ClosedError, ModelError, StreamedModel
from layerstream.pipeline.modeling.experts import stream_experts
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor, lay_out_experts
from layerstream.stages.batch import Extent
from layerstream.stages.experts.expert_reads import ExpertReads
from layerstream.stages.experts.expert_set import request_bytes
from layerstream.stages.experts.lease import Lease, WaitFor
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.guard import ReadGuard

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = {
    "qwen3-moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "gpt-oss": {"num_local_experts": 8},
    "deepseek-v3": {},
}


def prompt(seed: int = 1, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


def reference(folder: Path, case: str, **options: Any) -> Any:
    return getattr(transformers, CASES[case].model).from_pretrained(folder, **options)


def all_home(store: ExpertStore) -> bool:
    """Whether nobody holds a cell, as soon as reads for whoever was cancelled have ended."""

    def held() -> bool:
        regions = store._cells.regions
        return any(cell.users for region in regions for cell in region._cells.values())

    deadline = time.monotonic() + 10
    while held() and time.monotonic() < deadline:
        time.sleep(0.001)
    return not held()


# -- whole models ----------------------------------------------------------------------------------


@covering(case=list(SETTINGS), dtype=DTYPES, implementation=[None, "eager"])
def test_a_model_computes_what_transformers_computes(
    tmp_path: Path, case: str, dtype: torch.dtype, implementation: str | None
) -> None:
    folder = save_model(tmp_path / "model", case, dtype, **SETTINGS[case])
    options = {} if implementation is None else {"experts_implementation": implementation}
    whole = reference(folder, case, **options)
    logits = whole(input_ids=prompt()).logits.detach()
    tokens = whole.generate(prompt(), **GREEDY)

    async def main() -> None:  # mapped files need no slots, whose memory would go to cells
        async with await open_streaming(folder, reader="direct", **options) as model:
            assert model.plan.experts
            own = sum(each.cells - each.experts for each in model.plan.experts)
            assert own + model.plan.shared_expert_cells < 0
            assert bits_equal((await model.forward(input_ids=prompt())).logits, logits)
            assert torch.equal(await model.generate(input_ids=prompt(), **GREEDY), tokens)
            assert model.stats().experts_wanted > model.stats().expert_hits
            assert all_home(model._running.stream.pipeline.experts)

    with nothing_left_behind():
        run(main())


def test_requests_at_the_same_time_and_cancelled_ones(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3-moe", torch.bfloat16, num_experts=8)
    whole = reference(folder, "qwen3-moe")
    seeds = range(5)
    expected = [whole.generate(prompt(seed), **GREEDY) for seed in seeds]

    async def main() -> None:
        async with await open_streaming(folder) as model:

            async def cancelled(seconds: float) -> None:
                task = asyncio.create_task(
                    model.generate(input_ids=prompt(9), max_new_tokens=10_000, do_sample=False)
                )
                await asyncio.sleep(seconds)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            generated, _ = await asyncio.gather(
                asyncio.gather(
                    *(model.generate(input_ids=prompt(seed), **GREEDY) for seed in seeds)
                ),
                asyncio.gather(*(cancelled(0.01 * number**2) for number in range(6))),
            )
            for got, tokens in zip(generated, expected, strict=True):
                assert torch.equal(got, tokens)
            assert all_home(model._running.stream.pipeline.experts)

    with nothing_left_behind():
        run(main())


def test_bytes_that_are_read_are_those_of_the_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "qwen3-moe", num_experts=8)
    # Experts that are read ahead are misses when they are needed, which not all of them are.
    monkeypatch.setattr("layerstream.stages.experts.store._CERTAIN", 2.0)
    missed: list[int] = []
    load = ExpertStore._load

    def counting(self: Any, region: Any, cell: Any, experts: Any, expert: int) -> None:
        sizes, request = self._loader._file_bytes, self._loader._request_bytes
        reads = experts.reads(expert, request_bytes=request, file_bytes=sizes)
        missed.append(sum(read.extent.nbytes for read in reads))
        load(self, region, cell, experts, expert)

    monkeypatch.setattr(ExpertStore, "_load", counting)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            await model.generate(input_ids=prompt(), max_new_tokens=8, do_sample=False)
            counts = model.timings().experts
            assert counts is not None
            assert counts.wanted - counts.hits == len(missed)
            assert counts.read_bytes == sum(missed)
        missed.clear()
        async with StreamedModel.open(
            folder, device="cpu", workload=SMALL, reader="direct", budget=Budget(host="1GiB")
        ) as model:  # with cells for all of them, each is read once
            for _ in range(2):
                await model.generate(input_ids=prompt(), **GREEDY)
                before = len(missed)
            assert len(missed) == before <= 16

    run(main())


# -- a module by itself ----------------------------------------------------------------------------


class Streamed:
    """An expert module over a store whose file holds its parameters; ``whole`` is its twin with all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        kind: type[Any] = MixtralExperts,
        implementation: str = "grouped_mm",
        dtype: torch.dtype = torch.float32,
        sizes: tuple[int, int] = (32, 24),
        cells: int = 2,
        waiting: Callable[[], AbstractContextManager[WaitFor]] = lambda: nullcontext(
            Future.exception
        ),
    ) -> None:
        torch.manual_seed(0)
        gpt = kind is GptOssExperts
        config = (transformers.GptOssConfig if gpt else transformers.MixtralConfig)(
            hidden_size=sizes[0], intermediate_size=sizes[1], num_local_experts=8
        )
        config._experts_implementation = implementation
        self.whole, self.module = kind(config).to(dtype), kind(config).to(dtype)
        tensors, contents = [], b""
        for name, parameter in self.whole.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            raw = bytes(parameter.detach().view(-1).view(torch.uint8).numpy())
            each, begin = len(raw) // 8, len(contents)
            tensors.append(
                ExpertTensor(
                    name=name,
                    dtype=str(dtype).removeprefix("torch."),
                    shape=tuple(parameter.shape[1:]),
                    nbytes=each,
                    extents=tuple(
                        (Extent(file=0, offset=begin + i * each, nbytes=each),) for i in range(8)
                    ),
                )
            )
            contents += raw
            vars(self.module)["_parameters"][name] = None
        source = ExpertSource(module="0", experts=8, per_token=2, tensors=tuple(tensors))
        path = folder / "experts"
        path.write_bytes(contents)
        self._reader = DirectReader([path])
        self.store = ExpertStore(
            sets := [lay_out_experts(source, layer="", cells=cells)],
            passing_cells=4,
            allocate=host_cells,
            loader=ExpertReads(
                self._reader,
                guard=ReadGuard(),
                file_bytes=[len(contents)],
                threads=2,
                request_bytes=request_bytes([source.expert_bytes], most=1 << 20),
            ),
        )
        stream_experts(torch.nn.Sequential(self.module), sets, self.store, waiting=waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.store.close()
        self._reader.close()

    def compute(self, tokens: int, module: Any) -> torch.Tensor:
        """What ``module`` makes of so many tokens."""
        torch.manual_seed(tokens)
        weight = self.whole.down_proj
        width = (
            self.whole.hidden_dim if hasattr(self.whole, "hidden_dim") else self.whole.hidden_size
        )
        hidden = torch.randn(tokens, width).to(weight.dtype)
        weights = torch.rand(tokens, 2).to(weight.dtype)
        chosen = [torch.randperm(8)[:2] for _ in range(tokens)]
        index = torch.stack(chosen) if chosen else torch.empty((0, 2), dtype=torch.long)
        with torch.no_grad():
            result: torch.Tensor = module(hidden, index, weights)
        return result

    def equal(self, tokens: int) -> bool:
        """Whether the module and its twin make the same of so many tokens."""
        return bits_equal(self.compute(tokens, self.module), self.compute(tokens, self.whole))


@covering(
    kind=[MixtralExperts, GptOssExperts], implementation=["grouped_mm", "eager"], dtype=DTYPES
)
def test_any_number_of_tokens_and_cells_gives_equal_bits(
    tmp_path: Path, kind: type[Any], implementation: str, dtype: torch.dtype
) -> None:
    for sizes, cells in [((32, 16), 1), ((80, 24), 1), ((80, 24), 3), ((32, 64), 8)]:
        with Streamed(
            tmp_path,
            kind=kind,
            implementation=implementation,
            dtype=dtype,
            sizes=sizes,
            cells=cells,
        ) as streamed:
            for tokens in (1, 2, 7, 33, 64, 700):
                assert streamed.equal(tokens), (sizes, cells, tokens)
            assert streamed.compute(0, streamed.module).shape == (0, sizes[0])
            assert all_home(streamed.store)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_a_wrong_cell_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    with Streamed(tmp_path, implementation=implementation, cells=4) as streamed:
        assert streamed.equal(16)
        monkeypatch.setattr(
            Lease, "cells", property(lambda self: [c.number ^ 1 for c in self._cells])
        )
        assert not streamed.equal(16)


@pytest.mark.parametrize("index", [-1, 8, 1 << 40])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_an_expert_that_does_not_exist_is_refused(
    tmp_path: Path, implementation: str, index: int
) -> None:
    with Streamed(tmp_path, implementation=implementation) as streamed:
        with pytest.raises(ModelError, match=f"has 8 experts, but .* expert {index}"):
            streamed.module(torch.ones(1, 32), torch.tensor([[0, index]]), torch.ones(1, 2))
        assert all_home(streamed.store)


def test_an_implementation_without_equal_bits_is_refused(tmp_path: Path) -> None:
    with Streamed(tmp_path) as streamed:
        streamed.module.config._experts_implementation = "batched_mm"
        with pytest.raises(
            ModelError, match="open the model with experts_implementation='batched_mm'"
        ):
            streamed.compute(3, streamed.module)


class Unwound(Exception):  # noqa: N818 - it reports no error
    """A pass was cancelled."""


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_a_pass_that_is_cancelled_while_it_waits_gives_its_cells_back(
    tmp_path: Path, implementation: str
) -> None:
    cancelled = itertools.count()

    @contextmanager
    def waiting() -> Iterator[WaitFor]:
        yield Future.exception
        if next(cancelled) % 3:  # after each kind of wait, now and then
            raise Unwound

    with Streamed(tmp_path, implementation=implementation, waiting=waiting) as streamed:
        for tokens in range(1, 12):
            with suppress(Unwound):
                assert streamed.equal(tokens)
            assert all_home(streamed.store)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_a_computation_that_fails_gives_its_cells_back(tmp_path: Path, implementation: str) -> None:
    with Streamed(tmp_path, implementation=implementation) as streamed:
        act, calls = streamed.module.act_fn, itertools.count()

        def failing(hidden: torch.Tensor) -> torch.Tensor:
            if next(calls) == 1:
                raise RuntimeError("out of memory")
            return act(hidden)

        vars(streamed.module)["_modules"].pop("act_fn")
        vars(streamed.module)["act_fn"] = failing
        with pytest.raises(RuntimeError, match="out of memory"):
            streamed.compute(16, streamed.module)
        assert all_home(streamed.store)
        assert streamed.equal(16)


def test_a_module_that_outlives_its_model_does_not_keep_the_cells(tmp_path: Path) -> None:
    with nothing_left_behind():
        with Streamed(tmp_path) as streamed:
            assert streamed.equal(16)
        module = streamed.module
    with pytest.raises(ClosedError):
        streamed.compute(3, module)
