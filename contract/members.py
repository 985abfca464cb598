"""Which members of a tar file are trained on: one picture of each sample, and none of its maps."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from contract.images import IMAGE_SUFFIXES
from contract.picture_files import is_data

_LOSSY_FIRST = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2")
_ORDER = (*_LOSSY_FIRST, *(suffix for suffix in IMAGE_SUFFIXES if suffix not in _LOSSY_FIRST))
"""Of several pictures of one sample the first is trained on: maps need lossless formats."""

_MAPS = frozenset(
    ("seg", "segm", "segs", "segmentation", "segmentations", "segmap", "segmask", "semseg")
    + ("semantic", "semantics", "sem", "panoptic", "instance", "instances", "instanceids")
    + ("segmentationclass", "segmentationobject", "gtfine", "gtcoarse", "groundtruth")
    + ("mask", "masks", "label", "labels", "labelids", "labelmap", "labeltrainids", "trimap", "gt")
    + ("annotation", "annotations", "ann", "anns", "anno", "annos")
    + ("depth", "depths", "depthmap", "depthmaps", "disparity", "disparities", "disp")
)
"""Words of what is drawn over a picture, or measured for it."""

_MORE_MAPS = frozenset(
    ("normal", "normals", "normalmap", "flow", "edge", "edges", "canny", "hed", "heatmap")
    + ("matte", "alpha", "saliency", "parsing", "pose", "keypoints", "thumb", "thumbnail")
    + ("thumbnails", "thumbs", "target", "targets")
)
"""Further ones, which classes of pictures are called too: {normal,pneumonia}/1.png."""

_PICTURES = frozenset(
    ("image", "images", "img", "imgs", "rgb", "input", "inputs", "photo", "photos", "picture")
    + ("pictures", "color", "colour", "orig", "original", "jpegimages", "leftimg8bit")
)
_FILLING = frozenset(("map", "maps", "dir", "sync"))
"""What stands beside the other words in one name: depth_map, ann_dir, sync_depth."""

_MANY = 3
"""Pictures of one sample that may be left out beside the one that is trained on, without a
warning, unless they are called maps."""


class Choice(NamedTuple):
    """The members to train on, in their order; a count of the other pictures, by the ends of their
    names; and of each sample with suspiciously many pictures, how many of them are left out.
    """

    names: list[str]
    left_out: Counter[str]
    crowded: dict[str, int]


def choose(names: Iterable[str]) -> Choice:
    """Choose the members to train on.

    As WebDataset reads them, members that are the same up to the first dot of their name are one
    sample. Left out are those that are called maps, as an extension (NAME.depth.png), or of a
    picture that is there: by their folder (masks/NAME.png) or a part of their name
    (NAME_mask.png).
    """
    names = list(names)
    pictures = [name for name in names if _suffix(name) in IMAGE_SUFFIXES and _is_ours(name)]
    maps = _maps_beside(pictures)
    samples: dict[str, list[str]] = defaultdict(list)
    for name in pictures:
        if name not in maps:
            folder, base = os.path.split(name)
            samples[os.path.join(folder, base.partition(".")[0])].append(name)
    chosen: set[str] = set()
    crowded = {}
    for key, members in samples.items():
        some, others = _of_sample(members)
        chosen.update(some)
        if len(others) > _MANY:
            crowded[key] = len(others)
    left_out = Counter(_ending(name) for name in pictures if name not in chosen)
    return Choice([name for name in names if name in chosen], left_out, crowded)


def _is_ours(name: str) -> bool:
    folder, base = os.path.split(name)
    parts = [part for part in folder.split(os.sep) if part and part != os.pardir]
    return all(map(is_data, parts)) and is_data(base)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _ending(name: str) -> str:
    """The last two extensions of a member's name, in lower case, with a folder of maps."""
    *folders, base = name.lower().split(os.sep)
    ending = "." + ".".join(base.split(".")[1:][-2:])
    maps = [folder for folder in folders if _word(folder) == "map"]
    return f"{maps[0]}/*{ending}" if maps else ending


@lru_cache(10_000)
def _word(text: str) -> str:
    """What a whole name, of a folder or a part between dots, says: "map", "picture" or ""."""
    pieces = set(re.split(r"[-_ ]+", text.lower()))
    if not pieces <= _MAPS | _MORE_MAPS | _PICTURES | _FILLING:
        return ""
    return "map" if pieces & (_MAPS | _MORE_MAPS) else "picture" if pieces & _PICTURES else ""


# ---- maps of other members --------------------------------------------------------------------


def _maps_beside(pictures: Sequence[str]) -> set[str]:
    """The members that are called maps of others that are there and are not."""
    about = {name: _subject(name) for name in pictures}
    plain = {subject for subject, is_map in about.values() if not is_map}
    for subject in list(plain):  # NAME_mask.png beside NAME.1.jpg
        folder, base = os.path.split(subject)
        plain.add(os.path.join(folder, base.partition(".")[0]))
    maps = {name for name, (subject, is_map) in about.items() if is_map and subject in plain}
    return maps | _maps_by_folder([name for name in pictures if name not in maps])


def _subject(name: str) -> tuple[str, bool]:
    """What a member is of, which is its path without the words for maps and pictures, and whether
    it is a map.
    """
    *folders, base = name.split(os.sep)
    said = [_word(folder) for folder in folders]
    kept = [folder for folder, word in zip(folders, said, strict=True) if not word]
    stem, words = _without_words(base)
    return os.path.join("", *kept, stem), "map" in (*said, *words)


def _without_words(base: str) -> tuple[str, list[str]]:
    """A member's name, without folders, suffix and words, and what these say."""
    stem, *extensions = os.path.splitext(base)[0].split(".")
    said = []
    while extensions and _word(extensions[-1]):
        said.append(_word(extensions.pop()))
    stem, word = _without_word(".".join((stem, *extensions)))
    return stem, [*said, word]


def _without_word(stem: str) -> tuple[str, str]:
    """A name without the words at its end or its beginning, and what they say."""
    if word := _word(stem):  # SCENE/depth.png beside SCENE/rgb.png
        return "", word
    cuts = [match.span() for match in re.finditer(r"[-_]+", stem)]
    for start, end in cuts:  # the longest end first
        if word := _word(stem[end:]):
            return stem[:start], word
    for start, end in reversed(cuts):
        if word := _word(stem[:start]):
            return stem[end:], word
    for start, end in cuts:  # NAME_mask_0.png, of one object
        if _word(re.sub(r"[-_][0-9]+$", "", stem[end:])) == "map":
            return stem[:start], "map"
    return stem, ""


def _maps_by_folder(pictures: Sequence[str]) -> set[str]:
    """Of members in folders called masks, labels and the like, those for which one other folder
    beside it has a picture of the same name.

    Only lossless files: the others, and those of several folders, are classes with numbers for
    names.
    """
    folders = {part for path in set(map(os.path.dirname, pictures)) for part in path.split(os.sep)}
    if not any(_word(folder) == "map" for folder in folders):
        return set()
    places: dict[tuple, set[str]] = defaultdict(set)
    found = []
    for name in pictures:
        *folders, base = name.split(os.sep)
        parts = (*folders, _without_words(base)[0])
        for level, folder in enumerate(folders):
            place = (*parts[:level], None, *parts[level + 1 :])
            if _word(folder) == "map" and _MAPS & set(re.split(r"[-_ ]+", folder.lower())):
                if _suffix(name) not in _LOSSY_FIRST:
                    found.append((name, place))
            else:
                places[place].add(folder)
    return {name for name, place in found if len(places.get(place, ())) == 1}


# ---- one sample -------------------------------------------------------------------------------


def _of_sample(members: list[str]) -> tuple[list[str], list[str]]:
    """The picture of a sample, several where their names only happen to have dots in them; and
    those left out that are not called maps.
    """
    words = {name: _words(name) for name in members}
    rest = [name for name in members if "map" not in words[name][-1:]]
    # further from the end only where the sample has something else: NAME.seg.0.png
    rest = [name for name in rest if "map" not in words[name]] or rest
    plain = [name for name in rest if not words[name]]
    if plain:
        some = [_first(plain)]
    else:
        named: dict[str, list[str]] = defaultdict(list)
        for name in rest:
            if words[name][-1] == "picture":
                named[_before(name)].append(name)
        some = [_first(group) for group in named.values()]
        some += [name for name in rest if _before(name) not in named]
    return some, list(set(rest) - set(some))


def _words(name: str) -> list[str]:
    """What each of the last two extensions before a member's suffix says, if it has any."""
    return [_word(part) for part in os.path.basename(name).split(".")[1:-1][-2:]]


def _before(name: str) -> str:
    """A member's name without its last two extensions."""
    return ".".join(name.split(".")[:-2])


def _first(names: Iterable[str]) -> str:
    return min(names, key=lambda name: _ORDER.index(_suffix(name)))
