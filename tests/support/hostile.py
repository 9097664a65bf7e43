"""What nobody should send or keep: any JSON, and files that were cut or hit by a bit flip."""

from typing import Any

from hypothesis import strategies as st

# Larger ones, of more than 4300 digits, hypothesis cannot show.
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**4000), 5e-324, -0.0])
# As Python reads JSON: with numbers that are none.
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of which something is gone, other, or too much."""
    way = draw(st.sampled_from(["cut", "bit", "bytes", "more"]))
    place = draw(st.integers(0, len(content) - 1))
    if way == "cut":
        return content[:place]
    if way == "bit":
        flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    words = st.sampled_from([b"NaN", b"1e999", b"[" * 20000])
    more = draw(st.binary(min_size=1, max_size=9) | words)
    return content[:place] + more + content[place + len(more) * (way == "bytes") :]


@st.composite
def replaced(draw: st.DrawFn, content: Any) -> Any:
    """JSON in which something, however deep, is something else."""
    if isinstance(content, dict) and content and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(content)))
        return {**content, key: draw(replaced(content[key]))}
    if isinstance(content, list) and content and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(content) - 1))
        return [*content[:place], draw(replaced(content[place])), *content[place + 1 :]]
    return draw(JSON)


def check_one_line(error: Exception) -> None:
    """Check that it can be told in one line that can be read."""
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 600
