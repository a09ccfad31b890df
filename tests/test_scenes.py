"""Captions and the scenes they name."""

import itertools
import random

import pytest
import torch

from flexi_core import FlexiError
from flexi_core.demo.captions import TABLE_ROWS, embed_captions, token_rows
from flexi_core.demo.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    FREE,
    PLACES,
    SHAPES,
    Caption,
    captions_of,
    parse_caption,
    random_attributes,
    render,
)


def draw(n: int, seed: int = 0, **attributes: str) -> torch.Tensor:
    """Return n scenes [n, 3, 32, 32] with these attributes; the others are large, white, circle, center, black."""
    named = {"size": "large", "colour": "white", "shape": "circle", "place": "center", "background": "black", **attributes}
    row = [ATTRIBUTES[name].index(named[name]) for name in ATTRIBUTES]
    return render(torch.tensor([row] * n), torch.Generator().manual_seed(seed))


def covered(images: torch.Tensor) -> torch.Tensor:
    """Return where a white shape on black is seen [n, 32, 32]."""
    return images.mean(dim=1) > 0


def test_every_full_caption_round_trips():
    for indices in itertools.product(*(range(len(values)) for values in ATTRIBUTES.values())):
        assert parse_caption(str(Caption(*indices))) == Caption(*indices)


def test_captions_with_free_parts_round_trip():
    rng = random.Random(0)
    for _ in range(500):
        caption = Caption(*(rng.choice([FREE, rng.randrange(len(values))]) for values in ATTRIBUTES.values()))
        assert parse_caption(str(caption)) == caption


def test_the_caption_reads_as_english():
    text = "a large red circle at the center on a navy background"
    assert str(parse_caption(text)) == text
    assert str(parse_caption("top left, green")) == "a green shape at the top left"


@pytest.mark.parametrize("text", ["", "   ", "a", "a shape on the background", "an, a."])
def test_a_caption_that_names_nothing_is_unconditional(text):
    assert parse_caption(text) == Caption()
    assert str(Caption()) == ""


@pytest.mark.parametrize(
    "text",
    [
        "A LARGE Red circle AT the CENTER on a navy background",
        "navy background, center, circle, red, large.",
        "red red circle large center navy",
        "  large\tred\ncircle center navy ",
    ],
)
def test_order_case_and_filler_do_not_matter(text):
    assert parse_caption(text) == parse_caption("a large red circle at the center on a navy background")


@pytest.mark.parametrize(
    ("text", "place"),
    [("top left", "top left"), ("bottom-right", "bottom right"), ("top", "top"), ("left", "left"), ("at the top", "top")],
)
def test_places_of_two_words_are_one_place(text, place):
    assert ATTRIBUTES["place"][parse_caption(text).place] == place


@pytest.mark.parametrize("word", ["cat", "orange", "huge", "middle", "1", "<script>"])
def test_an_unknown_word_is_refused_with_all_known_ones(word):
    with pytest.raises(FlexiError) as refused:
        parse_caption(f"a large {word} circle")
    assert repr(word.lower()) in str(refused.value)
    for values in ATTRIBUTES.values():
        assert all(value in str(refused.value) for value in values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red blue circle", "two values for colour: 'red' and 'blue'; keep one"),
        ("a small large ring", "two values for size: 'small' and 'large'"),
        ("a circle square", "two values for shape"),
        ("left right", "two values for place"),
        ("on a navy teal background", "two values for background"),
    ],
)
def test_words_that_contradict_each_other_are_refused(text, message):
    with pytest.raises(FlexiError, match=message):
        parse_caption(text)


def test_every_attribute_value_and_every_free_part_has_a_token_of_its_own():
    rows = set()
    for slot, values in enumerate(ATTRIBUTES.values()):
        for index in (FREE, *range(len(values))):
            attributes = torch.full((1, 5), FREE)
            attributes[0, slot] = index
            rows.add((slot, token_rows(attributes)[0, slot].item()))
    assert sorted(row for _, row in rows) == list(range(TABLE_ROWS))


def test_the_context_of_a_caption_is_its_tokens_rows():
    table = torch.arange(TABLE_ROWS).float().view(-1, 1)
    context = embed_captions(table, [Caption(), Caption(0, 0, 0, 0, 0)])
    assert context.shape == (2, 5, 1)
    assert (context[0] - context[1]).flatten().tolist() == [len(values) for values in ATTRIBUTES.values()]


def test_scenes_are_their_generators():
    attributes = random_attributes(20, torch.Generator().manual_seed(1))
    first, second, other = (render(attributes, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(attributes, random_attributes(20, torch.Generator().manual_seed(1)))


def test_scenes_are_pictures_in_range():
    images = render(random_attributes(500, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert (images.flatten(1).std(dim=1) > 0.05).all()


def test_every_value_of_every_attribute_is_drawn_equally_often():
    attributes = random_attributes(9000, torch.Generator().manual_seed(1))
    for column, values in zip(attributes.T, ATTRIBUTES.values(), strict=True):
        counts = column.bincount(minlength=len(values))
        assert len(counts) == len(values)
        assert (counts - 9000 / len(values)).abs().max() < 5 * (9000 / len(values)) ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_every_shape_lies_in_the_third_that_its_place_names(shape, place):
    for size in ("small", "large"):
        for mask in covered(draw(20, shape=shape, place=place, size=size)):
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            middle = [(axis.min() + axis.max() + 1).item() / 2 for axis in (columns, rows)]
            assert [int(m // (32 / 3)) - 1 for m in middle] == list(PLACES[place])


@pytest.mark.parametrize("pair", [*itertools.combinations(SHAPES, 2)], ids=" ".join)
@pytest.mark.parametrize("size", ["small", "large"])
def test_two_shapes_differ_by_many_pixels(pair, size):
    one, other = (covered(draw(10, shape=shape, size=size)) for shape in pair)
    assert ((one != other).sum(dim=(1, 2)) >= 8).all()


def test_every_large_shape_covers_more_than_any_small_one_and_on_average_twice_as_much():
    for shape in SHAPES:
        small, large = (covered(draw(50, shape=shape, size=size)).sum(dim=(1, 2)) for size in ("small", "large"))
        assert large.min() > small.max()
        assert large.float().mean() > 2 * small.float().mean()


def test_a_ring_has_a_hole_and_a_triangle_its_apex_on_top():
    assert not covered(draw(20, shape="ring"))[:, 15:17, 15:17].any()
    widths = covered(draw(20, shape="triangle")).sum(dim=2)
    for width in widths:
        width = width[width > 0]
        assert width.tolist() == sorted(width.tolist())


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_shape_and_background_have_the_colours_that_they_name(colour, background):
    images = (draw(10, colour=colour, background=background) + 1) / 2
    shape, ground = images[:, :, 15:17, 15:17].mean(dim=(2, 3)), images[:, :, :3, :3].mean(dim=(2, 3))
    assert (shape - torch.tensor(COLOURS[colour])).abs().max() < 0.06
    assert (ground - torch.tensor(BACKGROUNDS[background])).abs().max() < 0.2
    nearest = torch.cdist(ground, torch.tensor(list(BACKGROUNDS.values()))).argmin(dim=1)
    assert {list(BACKGROUNDS)[i] for i in nearest} == {background}


def test_edges_are_anti_aliased():
    values = draw(20).mean(dim=1)
    between = (values > -0.5) & (values < 0.5)
    assert (between.sum(dim=(1, 2)) > 8).all()


def test_full_captions_name_every_attribute():
    captions = captions_of(random_attributes(50, torch.Generator().manual_seed(1)))
    assert all(FREE not in caption.indices for caption in captions)
