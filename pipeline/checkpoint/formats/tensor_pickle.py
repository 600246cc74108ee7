"""Reads pickles of tensors, and of nothing else: an interpreter that imports nothing and calls nothing.

It knows the instructions that torch.load(weights_only=True) knows, and of the functions that a pickle may call those that
make a tensor, a parameter and a dict. What they would make is described, not made.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from layerstream.pipeline.checkpoint.formats.pickled_tensors import (
    CALLS,
    STORAGE_DTYPES,
    PickledDict,
    PickledName,
    PickledOrderedDict,
    PickledStorage,
    fill,
    is_dtype,
    is_size,
)

__all__ = ["read_tensor_pickle"]


_MARK = object()


def read_tensor_pickle(content: bytes) -> Any:
    """Return what a pickle holds: dicts, lists, numbers, texts, and ``PickledTensor`` for tensors.

    Raises:
        ValueError: It holds or calls anything else, or is damaged.
    """
    try:
        return _Reader(content).read()
    except (IndexError, struct.error, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged ({type(error).__name__})") from error


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, PickledStorage] = {}

    def read(self) -> Any:
        stack = self._stack
        while True:
            code = self._bytes(1)
            if code == b".":
                return stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"of instructions that are not allowed ({code!r})")
            instruction(self)

    # -- reading ---------------------------------------------------------------------------------

    def _bytes(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._content):
            raise ValueError("damaged: it ends before its last instruction")
        found = self._content[self._at : end]
        self._at = end
        return found

    def number(self, code: str) -> Any:
        """Take a number from the instructions."""
        layout = struct.Struct(code)
        return layout.unpack(self._bytes(layout.size))[0]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def line(self) -> str:
        end = self._content.index(b"\n", self._at) + 1
        return self._bytes(end - self._at)[:-1].decode()

    def text(self) -> None:
        self.push(self._bytes(self.number("<I")).decode("utf-8", "surrogatepass"))

    def short_bytes(self) -> None:
        self.push(self._bytes(self.number("B")))

    def long(self) -> None:
        self.push(int.from_bytes(self._bytes(self.number("B")), "little", signed=True))

    # -- memo and containers ---------------------------------------------------------------------

    def put(self, code: str) -> None:
        self._memo[self.number(code)] = value = self._stack[-1]
        if value is _MARK:
            raise ValueError("damaged: a mark is in the place of a value")

    def get(self, code: str) -> None:
        self.push(self._memo[self.number(code)])

    def marked(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("damaged: a mark is missing")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def tuple_of(self, count: int) -> None:
        found = tuple(self.pop() for _ in range(count))
        self.push(found[::-1])

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("damaged: a mark is in the place of a value")
        return value

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError("damaged: values are appended to what is no list")
        target.extend(values)

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, PickledDict) or len(items) % 2:
            raise ValueError("damaged: items are set in what is no dict")
        fill(target, zip(items[::2], items[1::2], strict=True))

    # -- what would be imported and called -------------------------------------------------------

    def import_name(self) -> None:
        name = f"{self.line()}.{self.line()}"
        known = name in CALLS or name.removeprefix("torch.") in STORAGE_DTYPES or is_dtype(name)
        if not known:
            raise ValueError(f"of {name!r:.200}, which is no tensor")
        self.push(PickledName(name))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not PickledName or type(arguments) is not tuple:
            raise ValueError("damaged: it calls what is no function")
        if function.name not in CALLS:
            raise ValueError(f"of calls of {function.name}")
        self.push(CALLS[function.name](*arguments))

    def set_state(self) -> None:
        """Take an object's attributes."""
        state = self.pop()
        if type(self._stack[-1]) is not PickledOrderedDict or not isinstance(state, PickledDict):
            raise ValueError("of objects with attributes")

    def storage(self) -> None:
        """Make a storage from a reference to what is not in the pickle."""
        kind, storage_type, key, _location, values = self.pop()
        named = type(storage_type) is PickledName and type(key) is str
        if kind != "storage" or not named or not is_size(values):
            raise ValueError("damaged: it refers to what is no storage")
        dtype = STORAGE_DTYPES.get(storage_type.name.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"of storages of type {storage_type.name}")
        found = self._storages.setdefault(key, PickledStorage(key, dtype, values))
        if (found.dtype, found.values) != (dtype, values):
            raise ValueError(f"damaged: storage {key!r:.80} has two types or sizes")
        self.push(found)


_INSTRUCTIONS: Mapping[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda reader: reader.number("B"),
    b"c": _Reader.import_name,
    b"R": _Reader.call,
    b"b": _Reader.set_state,
    b"Q": _Reader.storage,
    b"(": lambda reader: reader.push(_MARK),
    b"t": lambda reader: reader.push(tuple(reader.marked())),
    b"\x85": lambda reader: reader.tuple_of(1),
    b"\x86": lambda reader: reader.tuple_of(2),
    b"\x87": lambda reader: reader.tuple_of(3),
    b")": lambda reader: reader.push(()),
    b"]": lambda reader: reader.push([]),
    b"}": lambda reader: reader.push(PickledDict()),
    b"a": lambda reader: reader.append([reader.pop()]),
    b"e": lambda reader: reader.append(reader.marked()),
    b"s": lambda reader: reader.set_items([reader.pop(), reader.pop()][::-1]),
    b"u": lambda reader: reader.set_items(reader.marked()),
    b"N": lambda reader: reader.push(None),
    b"\x88": lambda reader: reader.push(True),
    b"\x89": lambda reader: reader.push(False),
    b"J": lambda reader: reader.push(reader.number("<i")),
    b"K": lambda reader: reader.push(reader.number("B")),
    b"M": lambda reader: reader.push(reader.number("<H")),
    b"G": lambda reader: reader.push(reader.number(">d")),
    b"X": _Reader.text,
    b"U": _Reader.short_bytes,
    b"\x8a": _Reader.long,
    b"h": lambda reader: reader.get("B"),
    b"j": lambda reader: reader.get("<I"),
    b"q": lambda reader: reader.put("B"),
    b"r": lambda reader: reader.put("<I"),
}
