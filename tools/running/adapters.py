"""Adapters on the command line: which are meant, and where their base model and its tokenizer are."""

import argparse
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import ModelError
from layerstream.tools.console.token_text import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from layerstream.pipeline.checkpoint.adapter_folder import Sources
    from layerstream.pipeline.planning.adapter_size import AdapterSize

__all__ = [
    "adapter_names",
    "adapter_size",
    "add_adapter_arguments",
    "find_model",
    "open_options",
    "request_options",
    "tokenizer_of",
]

_BASE_HELP = "the model, if PATH is an adapter alone (default: the one that its config names)"


def add_adapter_arguments(parser: argparse.ArgumentParser, *, named: bool) -> None:
    """Add --base and --adapter: as many as wanted, by name, or one for all that is generated."""
    parser.add_argument("--base", metavar="PATH", help=_BASE_HELP)
    if named:
        parser.add_argument(
            "--adapter",
            action="append",
            default=[],
            type=_named_path,
            metavar="NAME=PATH",
            help="an adapter, for requests whose model is NAME (may be repeated)",
        )
    else:
        parser.add_argument(
            "--adapter",
            metavar="PATH",
            help="an adapter of PEFT, to compute with: a folder or hub id",
        )


def find_model(args: argparse.Namespace) -> "Sources":
    """Find the model and all adapters that the arguments name."""
    from layerstream.pipeline.checkpoint.adapter_folder import resolve_sources

    return resolve_sources(args.model, **open_options(args))


def open_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``StreamedModel.open`` for them."""
    return {"base": getattr(args, "base", None), "adapters": _adapters_of(args)}


def adapter_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The names by which requests choose adapters."""
    return tuple(_adapters_of(args))


def adapter_size(sources: "Sources") -> "AdapterSize":
    """What the adapters take, as far as their headers tell; their modules are not known from these."""
    from layerstream.pipeline.planning.adapter_size import AdapterSize

    return AdapterSize(nbytes=sum(each.float32_bytes for each in sources.adapters))


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a request that is to be computed with the one adapter that is given."""
    return {"adapter": name} if (name := getattr(args, "adapter", None)) is not None else {}


def tokenizer_of(sources: "Sources") -> Any | None:
    """The tokenizer in the adapter's own folder if it has one, else the model's; None without one."""
    own = (path for path in sources.documents if path != sources.model)
    return load_tokenizer(sources.model, folder=next((p for p in own if has_tokenizer(p)), None))


def _adapters_of(args: argparse.Namespace) -> dict[str, str]:
    given = getattr(args, "adapter", None)  # `demo` has none
    if not isinstance(given, list):
        return {} if given is None else {given: given}
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ModelError(
            f"--adapter {twice[0]} is given twice: give each adapter a name of its own."
        )
    return dict(given)


def _named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name.strip() and equals and path):
        raise argparse.ArgumentTypeError(f"not NAME=PATH: {text!r}")
    return name.strip(), path
