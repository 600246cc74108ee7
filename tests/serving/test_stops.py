"""Stop strings are found wherever a text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from layerstream.tools.serving.stops import StopStrings

TEXT = st.text("ab", max_size=12)


@given(st.lists(TEXT), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_what_is_given_out_is_the_text_before_the_first_stop_string(
    pieces: list[str], strings: list[str]
) -> None:
    stops = StopStrings(strings)
    given_out, seen = "", ""
    for piece in pieces:
        given_out += stops.add(piece)
        seen += piece
        ends = [seen.find(string) for string in strings if string in seen]
        assert stops.found == bool(ends)
        if ends:
            assert given_out == seen[: min(ends)]
            return
        assert seen.startswith(given_out)
    assert given_out + stops.finish() == "".join(pieces)


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
