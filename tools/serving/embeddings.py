"""``POST /v1/embeddings``: a vector for each text, from the hidden states of the model's last layer."""

import asyncio
import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field

from layerstream.pipeline import StreamedModel
from layerstream.stages.errors import ModelError
from layerstream.tools.serving.messages import RequestModel

__all__ = ["EmbeddingRequest", "Pooling", "embed", "read_pooling"]

_MAX_ITEMS = 2048
# Texts of one request that are computed side by side; they share sweeps.
_AT_ONCE = 16

_Listed = Annotated[list[str], Field(fail_fast=True, max_length=_MAX_ITEMS)]
_Tokens = Annotated[list[int], Field(fail_fast=True)]
_Mode = Literal["last", "mean", "first"]
# By names in the configuration of sentence-transformers.
_MODES: dict[str, _Mode] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "first",
    "mean": "mean",
    "lasttoken": "last",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How the hidden states of a text's tokens become one vector."""

    mode: _Mode = "last"
    """Those of the last or first token, or their mean."""
    normalize: bool = True
    """Whether its length is 1."""


def read_pooling(folder: Path) -> Pooling:
    """The pooling of the model in ``folder``, as sentence-transformers saves it; the last token's where nothing is told.

    Raises:
        ModelError: It is of a kind that is not supported.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return Pooling()
    kinds = {
        each["type"].rpartition(".")[2]: each["path"]
        for each in json.loads(modules.read_text("utf-8"))
    }
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{modules} has a module that is not supported: {min(unknown)}.")
    mode: _Mode = "last"
    if "Pooling" in kinds:
        path = folder / kinds["Pooling"] / "config.json"
        config = json.loads(path.read_text("utf-8"))
        given = config.get("pooling_mode")
        names = [given] if isinstance(given, str) else [k for k, v in config.items() if v is True]
        modes = {_MODES.get(name) for name in names if "pooling_mode" in name or name == given}
        if len(modes) != 1 or None in modes:
            raise ModelError(
                f"{path} has a pooling that is not supported; give the model without it."
            )
        mode = cast("_Mode", modes.pop())
    return Pooling(mode=mode, normalize="Normalize" in kinds)


class EmbeddingRequest(RequestModel):
    """``POST /v1/embeddings``. Errors quote a field's description."""

    model: str = Field(description="the name of a model")
    input: str | _Listed | _Tokens | Annotated[list[_Tokens], Field(max_length=_MAX_ITEMS)] = Field(
        union_mode="left_to_right",
        description=f"a string, a list of up to {_MAX_ITEMS} strings, a list of token ids, or of such lists",
    )
    encoding_format: Literal["float", "base64"] = Field("float", description='"float" or "base64"')
    user: str | None = Field(None, description="a string")

    @property
    def prompt(self) -> Any:
        """What is to be tokenized."""
        return self.input

    @property
    def answers(self) -> int:
        """The number of texts that are computed side by side."""
        single = isinstance(self.input, str) or isinstance(next(iter(self.input), 0), int)
        return 1 if single else min(max(len(self.input), 1), _AT_ONCE)


async def embed(
    model: StreamedModel,
    request: EmbeddingRequest,
    prompts: Sequence[Sequence[int]],
    pooling: Pooling,
    options: Mapping[str, Any],
    *,
    at_once: int,
) -> dict[str, Any]:
    """The response to ``request``, whose texts have the token ids ``prompts``.

    ``options`` are those of each pass; ``at_once`` texts share sweeps.
    """
    places = asyncio.Semaphore(at_once)

    async def vector_of(prompt: Sequence[int]) -> Any:
        async with places:
            output = await model.forward(
                input_ids=torch.tensor([prompt]),
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,
                **options,
            )
        states = output.hidden_states[-1][0]
        del output
        return await asyncio.to_thread(_vector, states, pooling, request.encoding_format)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(vector_of(prompt)) for prompt in prompts]
    tokens = sum(map(len, prompts))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": task.result()}
            for index, task in enumerate(tasks)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(states: torch.Tensor, pooling: Pooling, encoding: str) -> list[float] | str:
    """The vector of a text whose tokens have ``states``, one row each; as numbers, or their bytes in base64."""
    states = states.float()
    vector = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[pooling.mode]
    if pooling.normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    values: list[float] = vector.tolist()
    if encoding == "float":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
