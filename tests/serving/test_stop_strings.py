"""Stop strings are found however a text is split into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from layerstream.tools.serving.stop_strings import StopStrings

TEXT = st.text("ab", max_size=12)


@given(st.lists(TEXT), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_returned_text_ends_before_the_first_stop_string(
    pieces: list[str], strings: list[str]
) -> None:
    stops = StopStrings(strings)
    returned, received = "", ""
    for piece in pieces:
        returned += stops.add(piece)
        received += piece
        ends = [received.find(string) for string in strings if string in received]
        assert stops.found == bool(ends)
        if ends:
            assert returned == received[: min(ends)]
            return
        assert received.startswith(returned)
    assert returned + stops.finish() == "".join(pieces)


def test_text_that_begins_no_stop_string_is_not_held_back() -> None:
    stops = StopStrings(["</end>"])
    assert [stops.add(piece) for piece in ("a b", "<", "/e", "x", "</en", "d>c")] == [
        "a b",
        "",
        "",
        "</ex",
        "",
        "",
    ]
    assert stops.found
