from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.data.document import Document, text_digest
from btx_megatron.data.split import Splitter

sizes = st.lists(st.integers(1, 5000), min_size=2, max_size=60)
fractions = st.floats(0.001, 0.9)


def documents(sizes: list[int], first: int = 0) -> list[Document]:
    numbered = enumerate(sizes, start=first)
    return [Document(str(i), Path(str(i)), size, text_digest(str(i).encode())) for i, size in numbered]


@given(sizes, fractions, st.integers(0, 5))
def test_every_document_is_on_one_side_and_both_sides_have_some(
    sizes: list[int], fraction: float, seed: int
) -> None:
    whole = documents(sizes)
    sides = Splitter(fraction, seed).split(whole)
    assert sides.train
    assert sides.held_out
    assert sorted(sides.train + sides.held_out, key=lambda d: int(d.name)) == whole
    assert sides.train == [d for d in whole if d in sides.train]


@given(st.lists(st.integers(50, 150), min_size=100, max_size=200), st.floats(0.02, 0.5), st.integers(0, 3))
def test_the_held_out_bytes_are_the_fraction_asked_for(sizes: list[int], fraction: float, seed: int) -> None:
    sides = Splitter(fraction, seed).split(documents(sizes))
    held_out = sum(d.size for d in sides.held_out)
    assert abs(held_out - fraction * sum(sizes)) <= 150 / 2


def test_a_giant_document_is_not_held_out_for_a_small_fraction() -> None:
    for seed in range(20):
        whole = documents([1_000_000] + [100] * 50)
        sides = Splitter(0.05, seed).split(whole)
        assert whole[0] in sides.train


@given(st.data(), fractions)
def test_a_text_of_two_sources_is_on_one_side(data: st.DataObject, fraction: float) -> None:
    whole = documents(data.draw(sizes))
    splitter = Splitter(fraction, 1)
    train: set[str] = set()
    held_out: set[str] = set()
    for _ in range(3):
        part = data.draw(st.lists(st.sampled_from(whole), unique=True))
        sides = splitter.split(part)
        train |= {d.name for d in sides.train}
        held_out |= {d.name for d in sides.held_out}
    assert not train & held_out


def test_the_split_does_not_depend_on_the_order_but_on_the_seed() -> None:
    whole = documents([100] * 100)
    splits = [
        Splitter(0.1, 1).split(whole),
        Splitter(0.1, 1).split(whole[::-1]),
        Splitter(0.1, 2).split(whole),
    ]
    names = [{d.name for d in sides.held_out} for sides in splits]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 10


def test_a_single_document_cannot_serve_both_sides() -> None:
    sides = Splitter(0.05, 1).split(documents([100]))
    assert len(sides.train) + len(sides.held_out) == 1
