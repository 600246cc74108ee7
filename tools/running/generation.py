"""One measured generation on a streamed model, for ``generate`` and ``demo``."""

import argparse
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import LayerstreamError, ModelError
from layerstream.stages.telemetry.spans import StageTimings
from layerstream.stages.telemetry.timings import Timings
from layerstream.stages.text import format_bytes
from layerstream.tools.running.adapters import open_options, request_options
from layerstream.tools.running.added_memory import added_memory
from layerstream.tools.running.speculation import Speculation

if TYPE_CHECKING:
    from layerstream.pipeline import Plan, StreamedModel

__all__ = ["STAGE_COLUMNS", "GenerationResult", "check_generates", "stage_rows", "stream_tokens"]

STAGE_COLUMNS = ("stage", "batches", "bytes", "busy", "while busy", "waited for input", "for room")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The tokens of one generation, with time and memory."""

    token_ids: list[int]
    """The new tokens."""
    prompt_tokens: int
    """Number of tokens in the prompt."""
    open_seconds: float
    """Time from the call until the model was ready."""
    first_token_seconds: float
    """Time from the prompt to the first token."""
    seconds: float
    """Time from the prompt to the last token."""
    timings: Timings
    """Sweeps and stages, as the pipeline counts them."""
    host_budget_bytes: int
    """The plan's host budget."""
    peak_added_bytes: int | None
    """Peak of the anonymous memory added since before the model was opened; None if unknown."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the prompt's own sweep included."""
        return len(self.token_ids) / self.seconds if self.seconds > 0 else 0.0

    @property
    def step_tokens_per_second(self) -> float:
        """Tokens after the first per second; 0 if there is only one."""
        seconds = self.seconds - self.first_token_seconds
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else 0.0

    def summary(self) -> str:
        """Tokens, seconds and speed in one line."""
        return (
            f"{len(self.token_ids)} tokens in {self.seconds:.2f} s, the first after "
            f"{self.first_token_seconds:.2f} s: {self.tokens_per_second:.2f} tokens/s, "
            f"{self.timings.sweeps} sweeps"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data, with units in the keys."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "open_seconds": self.open_seconds,
            "first_token_seconds": self.first_token_seconds,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "step_tokens_per_second": self.step_tokens_per_second,
            "host_budget_bytes": self.host_budget_bytes,
            "peak_added_bytes": self.peak_added_bytes,
            **self.timings.to_dict(),
        }


async def stream_tokens(
    path: Path,
    prompt: Sequence[int],
    *,
    args: argparse.Namespace,
    on_plan: Callable[["Plan"], object],
    on_token: Callable[[int], object],
    speculation: Speculation | None = None,
) -> GenerationResult:
    """Open the model at ``path`` and generate from the ids of ``prompt``.

    Args:
        path: The model's folder or file.
        prompt: Token ids.
        args: Arguments of ``add_model_arguments`` and ``add_generation_arguments``.
        on_plan: Called with the plan, before anything runs.
        on_token: Called with each new token.
        speculation: How tokens are guessed; None for one token in each sweep.
    """
    import torch

    input_ids = torch.tensor([prompt])
    began = time.monotonic()
    async with added_memory() as memory, _open_model(path, args, len(prompt)) as model:
        plan = model.plan
        check_generates(model.module, path)
        _check_prompt(prompt, model.module)
        options = _sampling(args)
        if speculation is not None:
            speculation.check(model.module)
            options |= speculation.options()
        on_plan(plan)
        tokens: list[int] = []
        first = prompted = time.monotonic()
        stream = model.stream(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.max_new_tokens,
            **request_options(args),
            **options,
        )
        while (token := await _next_token(stream, path)) is not None:
            if not tokens:
                first = time.monotonic()
            tokens.append(token)
            on_token(token)
        ended = time.monotonic()
        timings = model.timings()
        await model.verified()
    return GenerationResult(
        token_ids=tokens,
        prompt_tokens=len(prompt),
        open_seconds=prompted - began,
        first_token_seconds=first - prompted,
        seconds=ended - prompted,
        timings=timings,
        host_budget_bytes=plan.host_memory.budget_bytes,
        peak_added_bytes=memory.peak_bytes,
    )


def _open_model(
    path: Path, args: argparse.Namespace, prompt_tokens: int
) -> AbstractAsyncContextManager["StreamedModel"]:
    from layerstream.pipeline import Budget, StreamedModel, Workload

    return StreamedModel.open(
        path,
        device=args.device,
        budget=Budget(vram=args.vram, host=args.host),
        workload=Workload(
            batch_size=1, prompt_tokens=prompt_tokens, new_tokens=args.max_new_tokens
        ),
        reader=args.reader,
        dtype=args.dtype,
        kernels=args.kernels,
        verify=getattr(args, "verify", False),  # `demo` has no such argument
        **open_options(args),
        # Measuring would delay the first token; what `layerstream plan` has measured is used.
        measure=False,
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    if args.temperature is None:
        return {"do_sample": False}
    torch.manual_seed(args.seed)
    return {"do_sample": True, "temperature": args.temperature}


def check_generates(model: Any, path: Path) -> None:
    """Refuse a model that generates no text, such as a plain encoder.

    Raises:
        ModelError: It says what the model is.
    """
    if not hasattr(model, "generate") or not model.can_generate():
        raise ModelError(
            f"{path} is a {type(model).__name__}, which does not generate text; it takes a model whose config.json "
            "names a class with a language model's head, such as LlamaForCausalLM, in its architectures"
        )


async def _next_token(stream: AsyncIterator[int], path: Path) -> int | None:
    """The next token; None at the end.

    Raises:
        ModelError: The model's own code failed: its weights do not go with what config.json says of them.
    """
    try:
        return await anext(stream, None)
    except (LayerstreamError, OSError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"transformers fails to generate with {path}: {type(error).__name__}: {cause}; check what its config.json "
            "and generation_config.json say"
        ) from error


def _check_prompt(prompt: Sequence[int], model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := max(prompt)) >= rows:
        raise ModelError(
            f"token {largest} of the prompt is none of the model's, which has {rows}: 0 to {rows - 1}"
        )


def stage_rows(stages: Sequence[StageTimings]) -> list[tuple[str, ...]]:
    """Table rows, one for each stage, for ``STAGE_COLUMNS``."""
    return [
        (
            stage.name,
            str(stage.items),
            format_bytes(stage.bytes),
            f"{stage.busy_seconds:.2f} s",
            f"{format_bytes(stage.bytes_per_second)}/s",
            f"{stage.waited_in_seconds:.2f} s",
            f"{stage.waited_out_seconds:.2f} s",
        )
        for stage in stages
    ]
