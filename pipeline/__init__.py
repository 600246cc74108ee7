"""Run models that do not fit: plan how their weights are streamed, and stream them."""

from layerstream.pipeline.checkpoint import Checkpoint
from layerstream.pipeline.dropin import load_streamed
from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.model import StreamedModel
from layerstream.pipeline.pipeline import Pipeline
from layerstream.pipeline.plan import Budget, Plan, Workload
from layerstream.pipeline.planner import make_plan
from layerstream.pipeline.stats import StageUse, Stats
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
