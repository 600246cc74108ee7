"""Tables of n-grams, which checkpoints store in many tensors, are read row by row and never as a whole."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.loop import run
from support.models import CACHE
from support.page_cache import cached_pages, drop_from_cache
from support.streaming import bits_equal

from layerstream.pipeline import Budget, Checkpoint, StreamedModel, Workload
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.modeling.table_source import FileSpan, TableSource
from layerstream.pipeline.planning.planned_layers import planned_layers

END_OF_SEQUENCE = 3
PARTS = 8
ROW_BYTES = 16
ROWS_PER_TOKEN = 16
TINY = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": 2,
    "hc_lowrank": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [2],
    "ngram_vocab_size_base": 200_000,
    "split_ngram_parts": PARTS,
    "eos_token_id": END_OF_SEQUENCE,
    "pad_token_id": END_OF_SEQUENCE,
}
TABLE = "model.layers.1.ple.ple_embedding.ngram_embedding"
MOST_BYTES = 40 << 20
"""Of the budget: for the workload and all weights but the table, which has 51 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model, in three files that each hold some parts of the table."""
    folder = tmp_path_factory.mktemp("ngram")
    torch.manual_seed(0)
    model = transformers.Qwen4ExpForCausalLM(transformers.Qwen4ExpTextConfig(**TINY))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    file_of = {
        name: f"model-{number % 3 + 1}-of-3.safetensors" for number, name in enumerate(names)
    }
    for file in set(file_of.values()):
        part = {name: tensors[name] for name in names if file_of[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    """Transformers' own model."""
    return transformers.Qwen4ExpForCausalLM.from_pretrained(folder)


def prompt(seed: int) -> torch.Tensor:
    """40 tokens, the 17th of which ends a sequence."""
    ids = torch.randint(4, 200, (1, 40), generator=torch.Generator().manual_seed(seed))
    ids[0, 16] = END_OF_SEQUENCE
    return ids


def opened(folder: Path, **options: Any) -> StreamedModel:
    return StreamedModel.open(
        folder,
        device="cpu",
        budget=Budget(host=MOST_BYTES),
        workload=Workload(prompt_tokens=40, new_tokens=8),
        **options,
    )


def rows_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The rows that the prompt ``ids`` looks up, each once, in ascending order."""
    found = []
    hook = model.get_submodule(TABLE).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    assert found[0].numel() == ids.numel() * ROWS_PER_TOKEN
    return found[0].unique()


@contextmanager
def spans_read() -> Iterator[list[FileSpan]]:
    """What is read of tables meanwhile."""
    spans: list[FileSpan] = []
    read_into = TableSource.read_into

    def read(self: TableSource, requested: list[FileSpan]) -> None:
        spans.extend(requested)
        read_into(self, requested)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableSource, "read_into", read)
        yield spans


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_logits_are_equal_within_a_budget_that_the_table_exceeds(
    reader: str, folder: Path, whole: Any
) -> None:
    table = [info for name, info in Checkpoint.open(folder).tensors.items() if TABLE in name]
    assert len(table) == PARTS
    assert len({info.file for info in table}) > 1
    assert sum(info.nbytes for info in table) > MOST_BYTES
    first, second = prompt(0), prompt(1)
    with torch.no_grad():
        expected = [whole(input_ids=ids).logits for ids in (first, second)]

    async def main() -> None:
        async with opened(folder, reader=reader) as model:
            assert model.plan.host_memory.used_bytes < MOST_BYTES
            assert bits_equal((await model.forward(input_ids=first)).logits, expected[0])
            both = await asyncio.gather(
                model.forward(input_ids=first), model.forward(input_ids=second)
            )
            for output, logits in zip(both, expected, strict=True):
                assert bits_equal(output.logits, logits)

    run(main())


def test_a_prompt_in_pieces_finds_the_rows_of_its_whole(folder: Path, whole: Any) -> None:
    ids = prompt(0)
    pieces = ids.split([15, 3, 1, 21], dim=1)  # the end of the sequence is within the second
    expected, cache = [], None
    with torch.no_grad():
        for piece in pieces:
            output = whole(input_ids=piece, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            expected.append(output.logits)

    async def main() -> None:
        async with opened(folder) as model:
            cache = None
            for piece, logits in zip(pieces, expected, strict=True):
                output = await model.forward(input_ids=piece, use_cache=True, **{CACHE: cache})
                cache = output[CACHE]
                assert bits_equal(output.logits, logits)
            settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
            assert torch.equal(
                await model.generate(input_ids=ids, **settings),
                whole.generate(input_ids=ids, **settings),
            )

    run(main())


def test_rows_alone_are_read_each_once(folder: Path, whole: Any) -> None:
    ids = prompt(2)
    ids[0, 20:] = ids[0, :20]  # the same n-grams again
    rows = rows_of(whole, ids)
    assert len(rows) < 25 * ROWS_PER_TOKEN

    async def main() -> None:
        async with opened(folder) as model:
            with spans_read() as spans:
                await model.forward(input_ids=ids)
            table_bytes = sum(len(span.buffer) for span in spans if len(span.buffer) % 256)
            assert table_bytes == len(rows) * ROW_BYTES

    run(main())


def test_the_disk_reads_the_blocks_of_these_rows_alone(
    folder: Path, whole: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")  # that nothing maps
    checkpoint = Checkpoint.open(folder)
    ids = prompt(3)
    rows = rows_of(whole, ids)
    blocks = set()
    for row in rows.tolist():
        info = checkpoint.tensors[f"{TABLE}.shard_{row // 400_176}.weight"]
        begin = info.offset + row % 400_176 * ROW_BYTES
        blocks |= {(info.file, begin // 4096), (info.file, (begin + ROW_BYTES - 1) // 4096)}
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    others = -(-embedding.nbytes // 4096) + 1

    async def main() -> None:
        # Layers are read directly; only the rows of the two tables go through the page cache.
        async with opened(folder, reader="direct") as model:
            for file in checkpoint.files:
                drop_from_cache(file.path)
            if any(cached_pages(file.path) for file in checkpoint.files):
                pytest.skip("this filesystem keeps its pages")
            await model.forward(input_ids=ids)
            cached = sum(cached_pages(file.path) for file in checkpoint.files)
            assert len(blocks) <= cached <= len(blocks) + others

    run(main())


def test_a_plan_from_names_alone_leaves_the_table_in_its_files(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    layers = planned_layers(checkpoint, group_layers(checkpoint), gathers_tables=True)
    planned = {tensor.name for layer in layers for tensor in layer.tensors}
    tables = {name for name in checkpoint.tensors if f"{TABLE}.shard_" in name}
    assert checkpoint.tensors.keys() - planned == {*tables, "model.embed_tokens.weight"}
