"""Runs a kernel in the OpenMP threads that torch multiplies with.

Those are awake between two products, and a processor that one of them spins on is no other thread's: threads of our own would
wait for it, and Python in them for the interpreter's lock. What runs in them is compiled as a whole.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from layerstream.stages.unpack.kernels.vectors import generated

__all__ = ["in_threads"]

_I32, _NOTHING = ir.IntType(32), ir.VoidType()


# What the two below call: a kernel's own.
_rows_of: Any = None
_part_of: Any = None


def _shared(threads: int, rows: int, arguments: Any) -> None:
    _in_team(_part_of, threads, rows, arguments)


def _alone(threads: int, rows: int, arguments: Any) -> None:
    _rows_of(0, rows, *arguments)


def in_threads(function: Callable[..., None], *, has_openmp: bool) -> Callable[..., None]:
    """Make a kernel, ``function(begin, end, *arguments)``, one that is called with threads and rows instead of begin and end.

    Without ``has_openmp``, the calling thread does it all.
    """
    rows_of = register_jitable(function)

    def part_of(number: int, count: int, rows: int, arguments: Any) -> None:
        rows_of(rows * number // count, rows * (number + 1) // count, *arguments)

    # Native code is found by these names: of two kernels whose names and types were equal, compiled in different processes, the
    # one that is loaded first would run for both.
    name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
    part_of.__qualname__ = f"{name}.part"
    # Not as a closure: numba looks for compiled functions by the pickled contents of their closures, and those of functions
    # made of generated code differ from process to process.
    chosen = _shared if has_openmp else _alone
    names = {**globals(), "_rows_of": rows_of, "_part_of": register_jitable(part_of)}
    kernel = FunctionType(chosen.__code__, names, function.__name__)
    kernel.__qualname__ = name
    return kernel


@generated
def _in_team(typing_context: Any, function: Any, threads: Any, rows: Any, arguments: Any) -> Any:
    """Call ``function(number, count, rows, arguments)`` in ``threads`` threads, or as many as there are."""
    part = types.none(types.intp, types.intp, types.intp, arguments)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        module, integer = builder.module, context.get_value_type(types.intp)
        shared = [
            cgutils.alloca_once_value(builder, context.cast(builder, values[2], rows, types.intp)),
            cgutils.alloca_once_value(builder, values[3]),
        ]
        compiled = context.compile_subroutine(builder, function.typing_key, part)
        body = ir.Function(
            module,
            ir.FunctionType(_NOTHING, [cgutils.voidptr_t]),
            name=module.get_unique_name(f"{builder.function.name}.part"),
        )
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block("entry"))
        frame = inner.bitcast(body.args[0], _pointers(shared).as_pointer())
        row_count, those = (
            inner.load(inner.load(cgutils.gep_inbounds(inner, frame, 0, place)))
            for place in range(len(shared))
        )
        number, count = (
            inner.sext(inner.call(_external(module, name, _I32), []), integer)
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        )
        # Kernels raise nothing.
        context.call_internal_no_propagate(
            inner, compiled.fndesc, part, [number, count, row_count, those]
        )
        inner.ret_void()
        launch = _external(
            module, "GOMP_parallel", _NOTHING, body.type, cgutils.voidptr_t, _I32, _I32
        )
        place = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, shared))
        wanted = builder.trunc(values[1], _I32)
        builder.call(launch, [body, builder.bitcast(place, cgutils.voidptr_t), wanted, _I32(0)])
        return context.get_dummy_value()

    return types.none(function, threads, rows, arguments), generate


def _pointers(values: Any) -> Any:
    return ir.LiteralStructType([value.type for value in values])


def _external(module: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(module, ir.FunctionType(result, arguments), name)
