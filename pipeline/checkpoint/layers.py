"""Tensors -> layers in the order of a forward pass, from names alone.

Three facts hold for nearly every published model, so there is no code for single architectures:

- A block is an element of a module list: the first number in a tensor's name is its index, and
  what precedes it is the stack ("model.layers", "h", "encoder.block").
- The names of the other modules indicate their purpose: "embed_tokens", "norm", "lm_head".
- Data flows from embeddings and towers (vision, audio) through encoders, projectors and decoders to
  the final norm and the head; within each of these parts the same order holds again.

If a name is misleading, only the order is wrong: each tensor is in a layer in any case.
"""

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.checkpoint.files import natural_order
from layerstream.pipeline.checkpoint.name_words import Phase, phase_of_module, phase_of_stack

__all__ = ["Layer", "LayerKind", "group_layers", "joined"]

_BLOCK_INDEX = re.compile(r"(?:^|\.)([0-9]+)(?:\.|$)")

_EMBEDDING = re.compile("emb|wte|shared")
_LANGUAGE_MODEL_CLASS = re.compile(
    "(ForCausalLM|ForConditionalGeneration|LMHeadModel|WithLMHead(Model)?|MTModel|ForMaskedLM|ForPreTraining)$"
)
_OWN_WEIGHT = re.compile(r"(\.[0-9]+)?\.weight")  # "lm_head.weight", but not "lm_head.dense.weight"

_ModulePath = tuple[str, ...]
_Position = tuple[tuple[Phase, tuple[tuple[int, str], ...]], ...]
_Stacks = dict[str, dict[str, list[TensorInfo]]]  # stack -> index -> tensors


class LayerKind(enum.StrEnum):
    """The purpose of a layer."""

    EMBEDDING = "embedding"
    BLOCK = "block"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Tensors that are used together."""

    name: str
    """The block's module ("model.layers.3"), or the modules joined by "+"; unique."""
    kind: LayerKind
    """EMBEDDING and OTHER come before or between blocks, HEAD after the last one."""
    tensors: tuple[str, ...]
    """Names, in the order of the files."""


class _Item(NamedTuple):
    """A block, or a module outside of all blocks."""

    name: str
    kind: LayerKind
    tensors: list[TensorInfo]


def group_layers(checkpoint: Checkpoint) -> tuple[Layer, ...]:
    """Return the layers in execution order.

    Each tensor is in exactly one layer, except that the table of a model with tied embeddings is
    in its embedding layer and in the head. Norm and head share a layer, as do all modules of one
    kind that follow one another outside of blocks.
    """
    stacks, loose = _split_blocks(checkpoint.tensors.values())
    items = list(_items_in_order(stacks, loose))
    tied = _tied_table(checkpoint, items)
    if tied:
        if items[-1].kind is not LayerKind.HEAD:
            items.append(_Item("head", LayerKind.HEAD, []))
        items[-1].tensors.append(tied)
    layers = []
    for _, run in groupby(enumerate(items), _layer_key):
        members = [item for _, item in run]
        tensors = [tensor for item in members for tensor in item.tensors]
        tensors.sort(key=lambda tensor: (tensor.file, tensor.offset, tensor.nbytes))
        layers.append(
            Layer(
                name=joined([item.name for item in members]),
                kind=members[0].kind,
                tensors=tuple(tensor.name for tensor in tensors),
            )
        )
    return tuple(layers)


def _layer_key(numbered: tuple[int, _Item]) -> tuple[LayerKind, int]:
    number, item = numbered
    return item.kind, number if item.kind is LayerKind.BLOCK else -1


def joined(names: list[str]) -> str:
    """Return the name of a layer that consists of the modules ``names``."""
    if len(names) > 3:  # noqa: PLR2004 - a name is read by people
        names = [names[0], "...", names[-1]]
    return "+".join(names)


def _split_blocks(tensors: Iterable[TensorInfo]) -> tuple[_Stacks, list[TensorInfo]]:
    """Separate the tensors in blocks, by stack and index, from the others."""
    groups: _Stacks = defaultdict(lambda: defaultdict(list))
    loose = []
    composite = set()
    for tensor in tensors:
        match = _BLOCK_INDEX.search(tensor.name)
        if match is None:
            loose.append(tensor)
            continue
        stack = tensor.name[: match.start()]
        groups[stack][match[1]].append(tensor)
        if "." in tensor.name[match.end() :]:
            composite.add(stack)
    # Blocks contain modules. Lists of single layers, such as the Linears of a projector, belong to
    # other modules, as do lists of embeddings and heads; unless there are no other lists.
    stacks = {name for name in composite if not _is_input_or_head(name)} or composite or set(groups)
    leaders = _stack_leaders(groups, stacks)
    blocks: _Stacks = defaultdict(lambda: defaultdict(list))
    for name, group in groups.items():
        leader = leaders.get(name, name)
        for index, members in group.items():
            (blocks[leader][index] if leader in stacks else loose).extend(members)
    return blocks, loose


def _is_input_or_head(stack: str) -> bool:
    *parents, last = stack.split(".")
    return phase_of_module(last) in {Phase.INPUT, Phase.HEAD} or any(
        phase_of_module(parent) is Phase.HEAD for parent in parents
    )


def _stack_leaders(groups: _Stacks, stacks: set[str]) -> dict[str, str]:
    """Find the lists of one parent that are computed alternately, as list -> the stack to merge it into.

    If a list of norms has the same indices as a sibling that is a stack, step i uses element i of
    each ("attentions.0", "layer_norm1.0", "ffns.0", then "attentions.1").
    """
    siblings_by_indices = defaultdict(list)
    for name, group in groups.items():
        if len(group) > 1:
            siblings_by_indices[name.rpartition(".")[0], frozenset(group)].append(name)
    leaders = {}
    for names in siblings_by_indices.values():
        lists = [name for name in names if not _is_input_or_head(name)]
        if len({name in stacks for name in lists}) > 1:
            leader = min((name for name in lists if name in stacks), key=natural_order)
            leaders.update(dict.fromkeys(lists, leader))
    return leaders


def _items_in_order(stacks: _Stacks, loose: list[TensorInfo]) -> Iterator[_Item]:
    """Yield the blocks and the modules outside of blocks, in execution order."""
    paths = [tuple(name.split(".")) for name in stacks]
    phases = _phases_of_paths(paths)
    modules = defaultdict(list)
    for tensor in loose:
        modules[_module_path(tuple(tensor.name.split(".")), phases)].append(tensor)

    def position(path: _ModulePath) -> _Position:
        parts = (path[:depth] for depth in range(1, len(path) + 1))
        return tuple((phases[part], natural_order(part[-1])) for part in parts)

    last = max(map(position, paths), default=None)
    queue: list[tuple[_Position, Phase | None, _ModulePath]] = [
        (position(p), None, p) for p in paths
    ]
    for path in modules:
        in_tower = any(phase_of_stack(parent) is Phase.TOWER for parent in path[:-1])
        own = phase_of_module(path[-1], in_tower=in_tower)
        queue.append(((*position(path[:-1]), (own, natural_order(path[-1]))), own, path))
    for where, phase, path in sorted(queue, key=itemgetter(0)):
        name = ".".join(path)
        if phase is not None:
            yield _Item(
                name, _layer_kind(phase, after_blocks=last is None or where > last), modules[path]
            )
            continue
        for index, tensors in sorted(stacks[name].items(), key=lambda i: natural_order(i[0])):
            yield _Item(f"{name}.{index}" if name else index, LayerKind.BLOCK, tensors)


def _layer_kind(phase: Phase, *, after_blocks: bool) -> LayerKind:
    if phase is Phase.INPUT:
        return LayerKind.EMBEDDING
    if after_blocks and phase > Phase.INPUT:
        return LayerKind.HEAD
    return LayerKind.OTHER


def _phases_of_paths(stacks: Iterable[_ModulePath]) -> dict[_ModulePath, Phase]:
    """Return the phase of each stack and of each module that has one in it.

    A module's own name decides; otherwise the first name inside it that indicates a phase, then the nearest one
    around it; otherwise it is a decoder. Of several stacks in a module, the latest phase decides.
    """
    phases: dict[_ModulePath, Phase] = {}
    for stack in stacks:
        indicated = [phase_of_stack(name) for name in stack]
        surrounding = Phase.DECODER
        for depth, own in enumerate(indicated, start=1):
            phase = next(filter(None, indicated[depth - 1 :]), surrounding)
            phases[stack[:depth]] = max(phase, phases.get(stack[:depth], Phase.UNKNOWN))
            surrounding = own or surrounding
    return phases


def _module_path(path: _ModulePath, phases: Mapping[_ModulePath, Phase]) -> _ModulePath:
    """Return the outermost module around a tensor that has no stack in it, or the tensor itself."""
    depth = 1
    while depth < len(path) and path[:depth] in phases:
        depth += 1
    return path[:depth]


def _tied_table(checkpoint: Checkpoint, items: list[_Item]) -> TensorInfo | None:
    """Return the embedding table that is also the head's matrix, if there is one."""
    config = checkpoint.config
    if config is None or not _may_be_tied(config):
        return None
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    vocabularies = {part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int}
    tables = [
        tensor
        for item in items
        if item.kind is LayerKind.EMBEDDING
        for tensor in item.tensors
        if len(tensor.shape) == 2  # noqa: PLR2004 - a matrix
        and "pos" not in tensor.name
        and (tensor.shape[0] in vocabularies if vocabularies else _EMBEDDING.search(tensor.name))
    ]
    table = max(tables, key=lambda tensor: tensor.shape[0], default=None)
    heads = (item for item in items if item.kind is LayerKind.HEAD)
    matrices = ((item, tensor) for item in heads for tensor in item.tensors)
    if table and any(_is_head_matrix(item, tensor, table) for item, tensor in matrices):
        return None
    return table


def _may_be_tied(config: Mapping[str, Any]) -> bool:
    """Return what config.json says; without a flag, the default of the model type may be either."""
    text = config.get("text_config")
    flags = [
        part["tie_word_embeddings"]
        for part in (config, text)
        if isinstance(part, Mapping) and "tie_word_embeddings" in part
    ]
    architectures = config.get("architectures")
    if not isinstance(architectures, list | tuple):
        architectures = [architectures] if architectures else []
    generates = any(_LANGUAGE_MODEL_CLASS.search(str(name)) for name in architectures)
    if any(flags):
        return generates or not architectures
    return generates and not flags


def _is_head_matrix(item: _Item, tensor: TensorInfo, table: TensorInfo) -> bool:
    """Return whether this is the head's matrix: one with the table's rows (columns, if packed), or by name."""
    if sum(size > 1 for size in tensor.shape) < 2:  # noqa: PLR2004 - a bias, or a norm
        return False
    named_head = phase_of_module(item.name.rpartition(".")[2]) is Phase.HEAD
    is_own_weight = _OWN_WEIGHT.fullmatch(tensor.name.removeprefix(item.name))
    return table.shape[0] in tensor.shape or (named_head and is_own_weight is not None)
