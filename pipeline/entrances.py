"""What cannot be done with a streamed model is refused by its name, with the reason, before anything is done."""

from collections.abc import Callable, Mapping
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["NOT_SHARED", "REFUSED", "guard_entrances", "with_methods"]

_OWN_CACHE = "it would take memory that is not reserved; call generate from several threads, which share sweeps"
_COMING_AND_GOING = "its weights come and go between layers, which compiled code does not know"

# Methods that would run the model past the requests that share its memory.
NOT_SHARED: Mapping[str, str] = {
    "continuous_batching_context_manager": _OWN_CACHE,
    "generate_batch": _OWN_CACHE,
    "init_continuous_batching": _OWN_CACHE,
}
_ITS_FILES = (
    "its weights are in their files already; copy those, or save what from_pretrained loads"
)
# Methods that would make a second model, or another one, of this one.
REFUSED: Mapping[str, str] = {
    **NOT_SHARED,
    "compile": _COMING_AND_GOING,
    "gather_sharded_state_dict_for_save": _ITS_FILES,
    "save_distributed_checkpoint": _ITS_FILES,
}


def guard_entrances(module: Any) -> None:
    """Let ``module`` refuse what cannot be done with it, or would not do what it says."""
    kind = type(module)
    methods: dict[str, Any] = {
        name: _refusing(name, reason) for name, reason in REFUSED.items() if hasattr(kind, name)
    }
    methods["__reduce_ex__"] = _refuse_copy
    if hasattr(kind, "get_compiled_call"):
        methods["get_compiled_call"] = _uncompiled_call
    module.__class__ = with_methods(kind, methods)


def with_methods(kind: type[Any], methods: Mapping[str, Any], *mixins: type[Any]) -> type[Any]:
    """A subclass of ``kind`` with its name, by which transformers finds it, and other ``methods``."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind, *mixins), {**names, **methods})


def _refusing(name: str, reason: str) -> Any:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise ModelError(f"{name} does not work on a streamed {type(self).__name__}: {reason}.")

    return refuse


def _refuse_copy(self: Any, _: Any) -> Any:
    raise ModelError(
        f"a streamed {type(self).__name__} cannot be copied or pickled: its weights stay in their files; open it "
        "once more with load_streamed instead."
    )


def _uncompiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
    """The call itself: ``generate`` compiles it unasked on a GPU, with a cache of a fixed size."""
    if compile_config is not None:
        _refusing("compile_config=", _COMING_AND_GOING)(self)
    call: Callable[..., Any] = self.__call__
    return call
