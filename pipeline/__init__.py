"""Run models that do not fit: plan how their weights are streamed, and stream them."""

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.dropin import load_streamed
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.model import StreamedModel
from layerstream.pipeline.planning.plan import Budget, Plan, Workload
from layerstream.pipeline.planning.planner import make_plan
from layerstream.pipeline.scheduling.stats import StageUse, Stats
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.errors import (
    AdmissionError,
    BusyError,
    CheckpointError,
    ClosedError,
    DeviceError,
    LayerstreamError,
    ModelError,
    PlanError,
    ReadError,
)

__all__ = [
    "AdmissionError",
    "Budget",
    "BusyError",
    "Checkpoint",
    "CheckpointError",
    "ClosedError",
    "DeviceError",
    "Hardware",
    "LayerstreamError",
    "ModelError",
    "Pipeline",
    "Plan",
    "PlanError",
    "ReadError",
    "StageUse",
    "Stats",
    "StreamedModel",
    "Workload",
    "load_streamed",
    "make_plan",
]
