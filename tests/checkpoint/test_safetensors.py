"""Each rule of the safetensors format, with safetensors itself as the reference for accepted files."""

import json
import struct
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.safetensors_files import assert_safetensors_agrees

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.formats import safetensors
from layerstream.pipeline.checkpoint.formats.safetensors_json import decode_json
from layerstream.stages.errors import CheckpointError


def file_bytes(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 4, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


def test_a_file_of_holes_opens_and_only_its_header_is_read(tmp_path):
    size = 1 << 40
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(file_bytes({"t": entry(0, size)}))
        stream.truncate(stream.tell() + size)
    assert Checkpoint.open(tmp_path).total_bytes == size


@dataclass(frozen=True, kw_only=True)
class Malformed:
    content: bytes
    says: str


TENSOR = b'{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'
MALFORMED = {
    "an empty file": Malformed(content=b"", says="has only 0 bytes"),
    "a git-lfs pointer": Malformed(
        content=b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        says="git-lfs pointer",
    ),
    "a GGUF file": Malformed(content=b"GGUF" + bytes(60), says="a name that ends in .gguf"),
    "a pickle": Malformed(
        content=b"PK\x03\x04" + bytes(60),
        says="is a torch.save file, not a safetensors file: give it a name that ends in .bin",
    ),
    "a huge header": Malformed(content=struct.pack("<Q", 100_000_001), says="100,000,001 bytes"),
    "a header beyond the end": Malformed(
        content=struct.pack("<Q", 500) + b"{}", says="truncated within its header"
    ),
    "no JSON": Malformed(content=file_bytes(b"{'a': 1}"), says="header that is not valid JSON"),
    "no UTF-8": Malformed(content=file_bytes(b'{"\xff": 1}'), says="header that is not valid JSON"),
    "a constant": Malformed(content=file_bytes(b'{"a": NaN}'), says="NaN is not JSON"),
    "a deep header": Malformed(content=file_bytes(b"[" * 100_000), says="is not valid JSON"),
    "millions of arrays": Malformed(
        content=file_bytes(b'{"a": %b, "x": [%b]}}' % (TENSOR[:-1], b",".join([b"[]"] * 600_000))),
        says="far more than its tensors need",
    ),
    "a list": Malformed(content=file_bytes(b"[]"), says="JSON list, not an object"),
    "half of a surrogate pair": Malformed(
        content=file_bytes(b'{"\\ud800": %b}' % TENSOR, bytes(4)), says="surrogates not allowed"
    ),
    "a tensor twice": Malformed(
        content=file_bytes(b'{"a": %b, "a": %b}' % (TENSOR, TENSOR), bytes(4)),
        says="key 'a' occurs twice",
    ),
    "metadata of numbers": Malformed(
        content=file_bytes({"__metadata__": {"a": 1}}), says="does not map strings to strings"
    ),
    "a tensor without shape": Malformed(
        content=file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)),
        says="tensor 'a' is not described by a dtype, a shape",
    ),
    "three offsets": Malformed(
        content=file_bytes({"a": entry(data_offsets=[0, 4, 4])}, bytes(4)), says="two data_offsets"
    ),
    "a negative size": Malformed(
        content=file_bytes({"a": entry(shape=[-4])}, bytes(4)), says="has -4 in its shape"
    ),
    "negative zero": Malformed(
        content=file_bytes(b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}'),
        says="has -1 in its shape",
    ),
    "a size with a leading zero": Malformed(
        content=file_bytes(b'{"a":%b}' % TENSOR.replace(b"[4]", b"[04]"), bytes(4)),
        says="header that is not valid JSON",
    ),
    "a comma behind the last size": Malformed(
        content=file_bytes(b'{"a":%b}' % TENSOR.replace(b"[4]", b"[4,]"), bytes(4)),
        says="header that is not valid JSON",
    ),
    "a boolean size": Malformed(
        content=file_bytes({"a": entry(shape=[4, True])}, bytes(4)), says="has True in its shape"
    ),
    "a fractional size": Malformed(
        content=file_bytes({"a": entry(shape=[4.0])}, bytes(4)), says="has 4.0 in its shape"
    ),
    "a huge size": Malformed(
        content=file_bytes({"a": entry(shape=[2**64])}, bytes(4)), says="only whole numbers"
    ),
    "a huge empty tensor": Malformed(
        content=file_bytes({"a": entry(0, 0, shape=[2**40, 2**40, 0])}),
        says="more than 2**60 elements",
    ),
    "a product of 400,000 huge sizes": Malformed(
        content=file_bytes({"a": entry(shape=[2**60] * 400_000)}, bytes(4)),
        says="more than 2**60 elements",
    ),
    "a product of huge sizes and of 0": Malformed(
        content=file_bytes({"a": entry(0, 0, shape=[0, *[2**60] * 400_000])}),
        says="more than 2**60 elements",
    ),
    "an unknown dtype": Malformed(
        content=file_bytes({"a": entry(dtype="Q7")}, bytes(4)), says="has dtype 'Q7', which torch"
    ),
    "a dtype torch lacks": Malformed(
        content=file_bytes({"a": entry(0, 3, dtype="F6_E2M3", shape=[4])}, bytes(3)),
        says="has dtype 'F6_E2M3', which torch does not know",
    ),
    "an odd number of 4-bit floats": Malformed(
        content=file_bytes({"a": entry(0, 3, dtype="F4", shape=[2, 3])}, bytes(3)),
        says="last dimension must be even",
    ),
    "another size than the shape's": Malformed(
        content=file_bytes({"a": entry(shape=[3])}, bytes(4)),
        says="has 4 bytes, but its shape and dtype take 3 bytes",
    ),
    "a gap at the start": Malformed(
        content=file_bytes({"a": entry(4, 8)}, bytes(8)), says="follows a gap: it starts at byte 4"
    ),
    "an overlap": Malformed(
        content=file_bytes({"a": entry(), "b": entry(2, 6)}, bytes(6)),
        says="tensor 'b' overlaps the tensor before it: it starts at byte 2, not 4",
    ),
    "a truncated file": Malformed(
        content=file_bytes({"a": entry(), "b": entry(4, 8)}, bytes(7)),
        says="so that tensor 'b' is cut short",
    ),
    "bytes behind the end": Malformed(
        content=file_bytes({"a": entry()}, bytes(6)), says="2 bytes after its last tensor"
    ),
    "no tensor": Malformed(content=file_bytes({}), says="holds no tensors"),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_by_name(tmp_path, case):
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert case.says in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize("depth", [127, 128])
@pytest.mark.parametrize(
    "nest", [b"[%b]", b'{"dtype": 0, "shape": [], "data_offsets": [], "x": %b}']
)
def test_nesting_is_refused_from_the_depth_at_which_safetensors_refuses_it(tmp_path, depth, nest):
    path = tmp_path / "model.safetensors"
    deep = b'["[[{\\""]'
    for _ in range(depth - 3):
        deep = nest % deep
    path.write_bytes(file_bytes(b'{"a": %b, "x": %b}}' % (TENSOR[:-1], deep), bytes(4)))
    if depth == 127:
        assert_safetensors_agrees(path)
        return
    with pytest.raises(SafetensorError, match="recursion limit"), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match="nests deeper than 127 levels"):
        Checkpoint.open(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "model.safetensors"


@given(content=st.binary(max_size=80) | st.binary(max_size=60).map(file_bytes))
def test_arbitrary_bytes_are_refused_with_a_checkpoint_error(scratch, content):
    scratch.write_bytes(content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(scratch)


GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [12, 12]},
    "scalar": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "x-0": {"dtype": "F4", "shape": [1, 4], "data_offsets": [16, 18]},
}
SNIPPETS = [b"", b"-", b"0", b"1", b"12", b'"', b",", b"]", b"}", b" ", b"\\", b"\0", b"e", b"."]


@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(SNIPPETS)), max_size=3
    ),
    data_bytes=st.sampled_from([18, 18, 17, 19]),
    separators=st.sampled_from([(", ", ": "), (",", ":"), (" , ", " : ")]),
)
@example(edits=[], data_bytes=18, separators=(",", ":"))
@example(edits=[], data_bytes=18, separators=(" , ", " : "))
def test_an_edited_header_is_accepted_only_if_safetensors_reads_it_alike(
    scratch, edits, data_bytes, separators
):
    header = json.dumps(GOOD, separators=separators).encode()
    for at, cut, snippet in edits:
        header = header[:at] + snippet + header[at + cut :]
    scratch.write_bytes(file_bytes(header, bytes(range(data_bytes))))
    try:
        Checkpoint.open(scratch)
    except CheckpointError:
        assert edits or data_bytes != 18
    else:
        assert_safetensors_agrees(scratch)
    # In the usual form or in another one that means the same: with and without the JSON parser.
    outcomes = []
    for start in (b"{", b" {"):
        scratch.write_bytes(file_bytes(start + header.removeprefix(b"{"), bytes(range(data_bytes))))
        try:
            tensors = Checkpoint.open(scratch).tensors.items()
            outcomes.append([(name, info._replace(offset=0)) for name, info in tensors])
        except CheckpointError:
            outcomes.append(None)
    assert header[:1] != b"{" or outcomes[0] == outcomes[1]


def test_what_safetensors_writes_needs_no_json_parser_but_for_metadata(tmp_path, monkeypatch):
    tensors = {"ü": torch.ones(2, 3), "": torch.ones(()), "{": torch.ones(0, 2).bfloat16()}
    metadata = {"a": 'with "quotes", \\ and {braces}', "b": "]"}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    parsed = []

    def recorded(text, path):
        parsed.append(json.loads(text))
        return decode_json(text, path)

    monkeypatch.setattr(safetensors, "decode_json", recorded)
    assert_safetensors_agrees(tmp_path / "model.safetensors")
    assert parsed == [{"__metadata__": metadata}]


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**40, True, 2.0, None, "2"]), max_size=3)
OFFSETS = st.lists(st.sampled_from([0, 2, 4, 6, 8, -2, False, 4.0, "4"]), min_size=1, max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["U8", "F16", "F4", "F6_E3M2", "u8", 3]), "shape": SHAPES},
    optional={"data_offsets": OFFSETS | st.just([0, 4]) | st.just([4, 8])},
)


@given(header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.integers(0, 8))
def test_a_random_header_is_accepted_only_if_safetensors_reads_it_alike(scratch, header, size):
    scratch.write_bytes(file_bytes(header, bytes(range(size))))
    try:
        Checkpoint.open(scratch)
    except CheckpointError:
        return
    assert_safetensors_agrees(scratch)
