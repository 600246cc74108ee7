"""Small real checkpoints, and plans for them with the residents that a test needs."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.pipeline.planning.planner import make_plan
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import Extent, LayerBatch, Residence

__all__ = ["CPU", "GPU", "arranged", "fused_layers", "plan_for", "write_checkpoint"]

CPU = Hardware(device="cpu", host_available_bytes=1 << 40, vram_free_bytes=None, cores=2)
GPU = Hardware(device="cuda:0", host_available_bytes=1 << 40, vram_free_bytes=1 << 40, cores=2)

_BLOCK_BYTES = 4096


def write_checkpoint(folder: Path, *, blocks: int = 8, rows: int = 40) -> dict[str, torch.Tensor]:
    """A checkpoint of ``blocks`` blocks between an embedding and a large head, a shard for each layer.

    So the index of a file tells the layer that is read. Shards have neither equal nor round sizes; each holds tensors
    of several dtypes.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layers = {"model.embed_tokens": {"weight": random(300, 64)}}
    for i in range(blocks):
        layers[f"model.layers.{i}"] = {
            "attn.weight": random(rows + i, 64),
            "mlp.weight": random(64, 2 * rows + 1),
            "norm.weight": random(64, dtype=torch.float32),
            "counts": torch.arange(i + 3),
        }
    layers["lm_head"] = {"weight": random(1000, 64)}
    tensors = {}
    for number, (name, layer) in enumerate(layers.items()):
        named = {f"{name}.{tensor}": value for tensor, value in layer.items()}
        save_file(named, folder / f"model-{number:05}-of-{len(layers):05}.safetensors")
        tensors.update(named)
    return tensors


def fused_layers(checkpoint: Checkpoint, *, blocks: int) -> tuple[PlannedLayer, ...]:
    """A layer for each block: its ``attn`` unchanged, and its ``mlp`` fused with that of the next block."""

    def extent(name: str) -> Extent:
        info = checkpoint.tensors[name]
        return Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)

    layers = []
    for i in range(blocks):
        attn = checkpoint.tensors[f"model.layers.{i}.attn.weight"]
        pieces = [f"model.layers.{j % blocks}.mlp.weight" for j in (i, i + 1)]
        rows, columns = checkpoint.tensors[pieces[0]].shape
        layers.append(
            PlannedLayer(
                name=f"model.layers.{i}",
                kind=LayerKind.BLOCK,
                tensors=(
                    TensorSource(
                        name=attn.name,
                        dtype=attn.dtype,
                        shape=attn.shape,
                        extents=(extent(attn.name),),
                    ),
                    TensorSource(
                        name=f"fused.{i}",
                        dtype=checkpoint.tensors[pieces[0]].dtype,
                        shape=(2 * rows, columns),
                        extents=tuple(extent(piece) for piece in pieces),
                    ),
                ),
            )
        )
    return tuple(layers)


def plan_for(
    folder: Path, hardware: Hardware, *, reader: str = "direct", **arguments: object
) -> Plan:
    """A plan with a layer in each batch; ``arranged`` sets its residents and slots."""
    rate = 1e12 if reader == "throttled" else None
    return make_plan(
        Checkpoint.open(folder),
        hardware,
        reader=reader,
        throttle_bytes_per_second=rate,
        layer_batch_size=1,
        **arguments,
    )


def arranged(
    plan: Plan,
    *,
    on_host: Collection[int] = (),
    on_device: Collection[int] = (),
    slots: int = 3,
) -> Plan:
    """``plan`` with exactly these residents, and rings that hold ``slots`` batches.

    On a CPU device a resident is kept where computation reads it, whether it is in ``on_host`` or ``on_device``.
    """
    on_cpu, maps = plan.on_cpu, plan.reader == "mmap"

    def with_residence(batch: LayerBatch) -> LayerBatch:
        residence = Residence.STREAMED
        if on_cpu and batch.index in {*on_host, *on_device}:
            residence = batch.residence_on_cpu(mapped=maps)
        elif batch.index in on_host:
            residence = Residence.BOTH if batch.index in on_device else Residence.HOST
        elif batch.index in on_device:
            residence = Residence.DEVICE
        return replace(batch, residence=residence)

    batches = tuple(map(with_residence, plan.batches))
    copied_once = [b.host_bytes for b in batches if b.residence is Residence.DEVICE]
    host = max(
        ring_bytes([b.host_bytes for b in batches if b.streamed], slots=slots), *copied_once, 0, 0
    )
    device = ring_bytes([b.device_bytes for b in batches if not b.device_resident], slots=slots)
    return replace(
        plan,
        batches=batches,
        host_slots=slots,
        device_slots=slots,
        host_arena_bytes=0 if on_cpu and maps else host,
        device_arena_bytes=device,
    )
