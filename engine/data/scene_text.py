"""Words of the built-in world: nouns, names, captions, hints and the templates of expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.scene_model import Background, Scene, choose
from engine.data.scene_query import Description, Query, describe, fitting, inside, place_of

_THINGS = ("object", "thing", "shape", "figure")

# {a} head noun phrase without article, {b} {c} anchors without article
TEMPLATES: dict[str, tuple[str, ...]] = {
    "attribute": ("the {a}", "{a}", "the {a} in the picture", "the {a} in this image", "that {a}"),
    "left_of": (
        "the {a} left of the {b}",
        "the {a} to the left of the {b}",
        "the {a} that is left of the {b}",
        "the {a} on the left side of the {b}",
        "the {a} which has the {b} on its right",
        "{a} left of the {b}",
    ),
    "right_of": (
        "the {a} right of the {b}",
        "the {a} to the right of the {b}",
        "the {a} that is right of the {b}",
        "the {a} on the right side of the {b}",
        "the {a} which has the {b} on its left",
        "{a} right of the {b}",
    ),
    "above": (
        "the {a} above the {b}",
        "the {a} over the {b}",
        "the {a} that is higher than the {b}",
        "the {a} located above the {b}",
        "the {a} which has the {b} below it",
        "{a} above the {b}",
    ),
    "below": (
        "the {a} below the {b}",
        "the {a} under the {b}",
        "the {a} that is lower than the {b}",
        "the {a} located beneath the {b}",
        "the {a} which has the {b} above it",
        "{a} below the {b}",
    ),
    "inside": (
        "the {a} inside the {b}",
        "the {a} within the {b}",
        "the {a} in the middle of the {b}",
        "the {a} lying on the {b}",
        "the {a} surrounded by the {b}",
        "the {a} on top of the {b}",
    ),
    "between": (
        "the {a} between the {b} and the {c}",
        "the {a} in between the {b} and the {c}",
        "the {a} that sits between the {b} and the {c}",
        "the {a} with the {b} on one side and the {c} on the other",
        "the {a} halfway from the {b} to the {c}",
    ),
    "leftmost": (
        "the leftmost {a}",
        "the {a} farthest to the left",
        "the {a} closest to the left edge",
        "the {a} furthest left",
        "leftmost {a}",
    ),
    "rightmost": (
        "the rightmost {a}",
        "the {a} farthest to the right",
        "the {a} closest to the right edge",
        "the {a} furthest right",
        "rightmost {a}",
    ),
    "topmost": (
        "the topmost {a}",
        "the highest {a}",
        "the {a} closest to the top edge",
        "the {a} nearest to the top",
        "the uppermost {a}",
    ),
    "bottommost": (
        "the bottommost {a}",
        "the lowest {a}",
        "the {a} closest to the bottom edge",
        "the {a} nearest to the bottom",
        "the {a} furthest down",
    ),
    "largest": (
        "the largest {a}",
        "the biggest {a}",
        "the {a} that is larger than the others",
        "the {a} which takes up the most room",
        "biggest {a}",
    ),
    "smallest": (
        "the smallest {a}",
        "the tiniest {a}",
        "the {a} that is smaller than the others",
        "the {a} which takes up the least room",
        "smallest {a}",
    ),
    "place": (
        "the {a} {p}",
        "{a} {p}",
        "the {a} that is {p}",
        "the {a} located {p}",
        "the {a} you see {p}",
    ),
    "nearest": (
        "the {a} nearest to the {b}",
        "the {a} closest to the {b}",
        "the next-door neighbour of the {b}",
        "whatever is nearest to the {b}",
        "the {a} that is the fewest steps away from the {b}",
    ),
    "farthest": (
        "the {a} farthest from the {b}",
        "the {a} that keeps the greatest distance from the {b}",
        "the {a} most distant from the {b}",
        "whatever is farthest away from the {b}",
        "the {a} one would reach last, starting at the {b}",
    ),
    "same_colour": (
        "the {a} that has the same colour as the {b}",
        "the {a} painted like the {b}",
        "the {a} whose colour matches the {b}",
        "the other {a} in the colour of the {b}",
        "what shares its colour with the {b}",
    ),
    "same_shape": (
        "the {a} that has the same shape as the {b}",
        "the {a} with the outline of the {b}",
        "the {a} whose form matches the {b}",
        "the twin of the {b} as far as the shape goes",
        "what shares its shape with the {b}",
    ),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left corner", "in the upper left", "at the top left"),
    "top": ("at the top in the middle", "at the top centre", "at the middle of the top edge"),
    "top right": ("in the top right corner", "in the upper right", "at the top right"),
    "left": ("at the left in the middle", "at the middle of the left side", "at the left edge"),
    "centre": ("in the centre", "in the middle of the picture", "at the centre"),
    "right": ("at the right in the middle", "at the middle of the right side", "at the right edge"),
    "bottom left": ("in the bottom left corner", "in the lower left", "at the bottom left"),
    "bottom": (
        "at the bottom in the middle",
        "at the bottom centre",
        "at the middle of the bottom edge",
    ),
    "bottom right": ("in the bottom right corner", "in the lower right", "at the bottom right"),
}
# (colours or shapes that the hint fits, words after "the thing ")
SHAPE_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("circle", "ring"), "that you could roll like a wheel"),
    (("circle",), "that looks like a full moon"),
    (("circle",), "that is as round as a coin and has no hole"),
    (("square",), "with four equal sides and four right angles, standing level"),
    (("square",), "that looks like a sugar cube seen from the front"),
    (("triangle",), "with exactly three corners"),
    (("triangle",), "that looks like the roof of a house"),
    (("triangle",), "shaped like a slice of pizza"),
    (("star",), "that looks as if it came from the night sky"),
    (("star",), "with five pointed tips"),
    (("star",), "that a sheriff would wear as a badge"),
    (("cross",), "that looks like a plus sign"),
    (("cross",), "that marks a hospital or a pharmacy"),
    (("ring",), "that looks like a doughnut"),
    (("ring",), "with a hole in its middle"),
    (("ring",), "that you could wear on a finger"),
    (("diamond",), "shaped like a kite"),
    (("diamond",), "that balances on its lower tip and has four straight sides"),
    (("heart",), "that stands for love"),
    (("heart",), "one would draw on a valentine card"),
    (("square", "diamond"), "with exactly four corners"),
    (("circle", "ring", "heart"), "whose outline is curved"),
    (("triangle", "square", "diamond", "star", "cross"), "that has only straight edges"),
)
COLOUR_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("red",), "that has the colour of ripe strawberries"),
    (("red",), "that has the colour of a fire engine"),
    (("red",), "coloured like a stop sign"),
    (("orange",), "that has the colour of a carrot"),
    (("orange",), "coloured like a pumpkin"),
    (("yellow",), "that has the colour of a ripe banana"),
    (("yellow",), "coloured like a lemon"),
    (("green",), "that has the colour of grass"),
    (("green",), "coloured like the leaves of a tree"),
    (("cyan",), "that has the colour of a swimming pool"),
    (("cyan",), "coloured like a shallow lagoon"),
    (("blue",), "that has the colour of the deep ocean"),
    (("blue",), "coloured like the ink of a pen"),
    (("purple",), "that has the colour of an aubergine"),
    (("purple",), "coloured like dark grapes"),
    (("pink",), "that has the colour of a flamingo"),
    (("pink",), "coloured like bubble gum"),
    (("red", "orange", "yellow"), "in a colour of fire"),
    (("cyan", "blue"), "in a colour of water"),
)


def noun(rng: np.random.Generator, description: Description) -> str:
    """Noun phrase without article: "large red circle", "red thing", "object"."""
    words = [description.size] if description.size else []
    if description.colours:
        words.append(next(iter(description.colours)))
    words.append(next(iter(description.shapes)) if description.shapes else choose(rng, _THINGS))
    return " ".join(words)


def name(scene: Scene, i: int) -> str:
    """Name of an object: colour and shape, with the size only where it tells twins apart."""
    item = scene.objects[i]
    plain = f"{item.colour} {item.shape}"
    twins = fitting(scene, describe(item.colour, item.shape))
    same_size = [k for k in twins if scene.objects[k].size == item.size]
    return f"{item.size} {plain}" if len(twins) > 1 and len(same_size) == 1 else plain


def names(words: Sequence[str]) -> str:
    """Answer that lists objects once each, in order; "nothing" for none."""
    return ", ".join(dict.fromkeys(words)) or "nothing"


def say(rng: np.random.Generator, query: Query) -> str:
    """A query in words, by one of the templates of its relation."""
    template = choose(rng, TEMPLATES[query.relation])
    fields = {"a": noun(rng, query.head)}
    for key, anchor in zip("bc", query.anchors, strict=False):
        fields[key] = noun(rng, anchor)
    if query.place:
        fields["p"] = choose(rng, PLACE_PHRASES[query.place])
    return template.format(**fields)


def article(words: str) -> str:
    """With its indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def background_phrase(rng: np.random.Generator, background: Background) -> str:
    """Backdrop in words with its article, without preposition."""
    first, second = background.first, background.second
    if background.kind == "gradient":
        ends = ("top", "bottom") if background.angle else ("left", "right")
        options = [
            f"a background that fades from {first} at the {ends[0]} to {second} at the {ends[1]}",
            f"a gradient from {first} ({ends[0]}) to {second} ({ends[1]})",
            f"a {first} to {second} gradient from {ends[0]} to {ends[1]}",
        ]
    elif background.kind == "plain":
        options = [f"a plain {first} background", f"a {first} background", f"plain {first}"]
    elif background.kind == "stripes":
        way = "horizontal" if background.angle else "vertical"
        options = [
            f"a {first} background with faint {way} stripes",
            f"a {first} background with {way} stripes",
            f"faint {way} stripes on {first}",
        ]
    elif background.kind == "checker":
        options = [
            f"a {first} background with a faint checker pattern",
            f"a {first} checkered background",
            f"a pale checkerboard in {first}",
        ]
    else:
        options = [
            f"a {first} background with faint noise",
            f"a cloudy {first} background",
            f"a {first} background with a cloudy texture",
        ]
    return choose(rng, options)


def _item_phrase(rng: np.random.Generator, scene: Scene, i: int) -> str:
    item = scene.objects[i]
    phrase = article(f"{item.size} {item.colour} {item.shape}")
    for j, host in enumerate(scene.objects):
        if j != i and inside(scene, i, j):
            how = choose(rng, ("inside", "within", "on top of"))
            return f"{phrase} {how} the {host.colour} {host.shape}"
    return f"{phrase} {choose(rng, PLACE_PHRASES[place_of(item)])}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A picture in words. items: each object (its number) and its phrase, in order of mention."""

    text: str
    items: tuple[tuple[int, str], ...]
    backdrop: str


def caption(rng: np.random.Generator, scene: Scene) -> Caption:
    """One or two sentences that name every object with size, colour, place, and the backdrop."""
    order = rng.permutation(len(scene.objects))
    if rng.random() < 0.5:
        order = np.argsort([o.x for o in scene.objects])
    order = np.array(sorted(order, key=lambda i: _is_guest(scene, int(i))))  # hosts are named first
    items = tuple((int(i), _item_phrase(rng, scene, int(i))) for i in order)
    parts = _join([phrase for _, phrase in items])
    back = background_phrase(rng, scene.background)
    template = choose(
        rng,
        (
            "{parts}, on {back}",
            "a picture of {parts} on {back}",
            "{parts}. The backdrop is {back}.",
            "on {back} there is {parts}",
            "an image with {parts}; behind everything is {back}",
            "{back}, with {parts}",
        ),
    )
    return Caption(text=template.format(parts=parts, back=back), items=items, backdrop=back)


def _is_guest(scene: Scene, i: int) -> bool:
    return any(j != i and inside(scene, i, j) for j in range(len(scene.objects)))
