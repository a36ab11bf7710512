"""Signs that a folder is not one of good images alone, and the sentence that refuses it."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_reader import FORMATS
from .listing import Listing, foreign, is_companion
from .roles import Meaning, meaning_of, says_no_photo

FLAGS = "--dataset_format folder --good GLOB --bad GLOB --masks GLOB, or --all_good if every image shows a good part"
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".html")
LABEL_WORDS = r"\b(labels?|class|classes|class ?id|categor(y|ies)|annotations?|shapes|bbox|defects?|target|verdict)\b"
MAX_CHARACTERS = 2_000_000  # of a file that is searched for the names of images
MAX_VALUES = 8  # of masks' pixels
VIEWS = "left right top bottom front back side copy kopie copia edited".split()
MAX_KINDS = 50  # names of more kinds are taken for names without a system


def refusal(root: Path, reason: str) -> ValueError:
    """The sentence that says what is not clear, and how to say it."""
    return ValueError(f"It is not clear which images in {root} are good: {reason}. Say it with {FLAGS}.")


def telling_words(path: Path) -> str:
    """Which words a file's name bears, such as "scratch" of "scratch_12.png", without those that say image, camera or
    lot only."""
    words = re.findall(r"[^\W\d_]{2,}", path.stem.casefold())
    return "_".join(word for word in words if meaning_of(word) != Meaning())


def kinds_of_names(paths: Sequence[Path]) -> dict[str, int]:
    """How many files bear which telling words or, without any, which letter, sign, or 0 and 1 as of classes; empty
    where all bear the same, or other words each."""
    kinds = Counter(map(telling_words, paths))
    kinds = {kind: count for kind, count in kinds.items() if count > 1}
    is_system = 1 < len(kinds) <= MAX_KINDS and sum(kinds.values()) > 0.9 * len(paths)
    return kinds if is_system else classes_of_names(paths)


def classes_of_names(paths: Sequence[Path]) -> dict[str, int]:
    """How many files bear which letter, sign, or number from 0 to 2 in one place of their names, as of classes: "g_1"
    and "b_1", "000_0" and "001_1". Views are no classes: left and right, what follows a word such as camera or row,
    and what ends the name of each part in turn ("000_a" and "000_b")."""
    names = [re.findall(r"^[-+]|[^\W\d_]+|\d+|[-+]$", path.stem.casefold()) for path in paths]
    shortest = min(map(len, names), default=0)
    for place in range(shortest + 1):
        kinds = Counter(name[place] if place < len(name) else "" for name in names)
        if place == shortest and any(len(name) > shortest + 1 for name in names):
            break
        if len(kinds) < 2 or min(kinds.values()) <= len(kinds):
            continue
        before = Counter(tuple(name[:place]) for name in names)
        ends = all(len(name) <= place + 1 for name in names)
        words = {meaning_of(name[place - 1]) for name in names if place and name[place - 1].isalpha()}
        if words == {Meaning()} or (place > 0 and ends and set(before.values()) == {len(kinds)}):
            continue
        are_letters = all(re.fullmatch(r"[^\W\d_]|[-+]|", kind) for kind in kinds) and not set(kinds) <= {
            "l",
            "r",
            "m",
        }
        if are_letters or set(kinds) in ({"0", "1"}, {"0", "1", "2"}):
            return {kind or "without a letter": count for kind, count in kinds.items()}
    return {}


def named_otherwise(paths: Sequence[Path], are_good: bool = True) -> list[Path]:
    """Those of some images of one kind, good or bad, whose own names say another kind as others' do not, or no photo
    at all: a defect, a heatmap, "unsure", or "0_x" beside "0". A single "broken.png" that cannot be opened is just
    that."""

    def says(path: Path) -> bool:
        found = meaning_of(path.stem).quality
        return found in (("bad", "both") if are_good else ("good", "both"))

    odd = [path for path in paths if says(path)]
    if len(odd) == 1 and not can_be_opened(odd[0]):
        odd = []
    odd = odd if len({telling_words(path) for path in paths}) > 1 else []
    stems = {(path.parent, path.stem.casefold()) for path in paths}

    def is_derived(path: Path) -> bool:
        found = re.fullmatch(r"(.+)[-_. ]([^\W\d_]{2,})|([^\W\d_]{2,})[-_. ](.+)", path.stem.casefold())
        stem, word = (found[1] or found[4], found[2] or found[3]) if found else ("", "")
        return (path.parent, stem) in stems and word not in VIEWS

    derived = [path for path in paths if is_derived(path)]
    return odd or [path for path in paths if says_no_photo(path.stem)] or (derived if len(derived) > 1 else [])


def classes_of_folders(folders: Collection[tuple[str, ...]]) -> bool:
    """Whether folders are told apart by a letter, a sign, or a number from 0 on, as classes are: "A1" and "A2", "+"
    and "-", "00" and "01". Serial numbers, of three digits or more, are none."""
    is_bare = re.compile(r"[^\W\d_]?[-_ .]*\d{0,2}|\d+|[-+]\d+|\W+").fullmatch
    bare = {tuple(filter(is_bare, path)) for path in folders}
    letters = {tuple(f for f in path if not f.isdigit()) for path in bare}
    numbers = {int(path[0]) if len(path) == 1 and path[0].isdigit() else None for path in bare}
    return len(letters) > 1 or (len(numbers) > 1 and numbers == set(range(len(numbers))))


def label_files(root: Path, listing: Listing) -> list[Path]:
    """Files that tell of the images: named like one, like labels or like good and bad, or with an image's name or the
    words of labels in them."""
    names = {path.name for path in listing.images}
    stems = {path.stem for path in listing.images} | names

    def tells(path: Path) -> bool:
        words = [meaning_of(path.stem), *map(meaning_of, path.relative_to(root).parts[:-1])]
        if path.stem in stems or any(word.mask for word in words) or words[0].quality or speaks(path.stem):
            return True
        suffix = path.suffix.lower()
        if suffix not in TABLES:
            return False
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_CHARACTERS)
        keys = text.partition("\n")[0] if suffix in (".csv", ".tsv") else "" if suffix == ".txt" else text[:10_000]
        tokens = re.findall(r"[^\n\r\t,;\"'/\\<>|]+", text)  # names may hold spaces
        return speaks(keys) or any(not names.isdisjoint((token, *token.split())) for token in tokens)

    def speaks(text: str) -> bool:
        return re.search(LABEL_WORDS, text.replace("_", " "), re.IGNORECASE) is not None

    paths = sorted(path for group in listing.left_out.values() for path in group)
    return [p for p in paths if p.is_file() and not foreign(p.relative_to(root)) and not is_companion(p) and tells(p)]


def check_pictures(root: Path, paths: Sequence[Path]) -> None:
    """Raises ValueError if some images look like masks."""
    with ThreadPoolExecutor() as pool:
        binary = [path for path, found in zip(paths, pool.map(is_binary, paths), strict=True) if found]
    if binary:
        raise refusal(
            root,
            f"{len(binary)} of {len(paths)} pictures are of few values as masks are (such as "
            f"{binary[0].relative_to(root)})",
        )


def is_photo(path: Path) -> bool:
    """Whether a file is too large for a mask of its size: photographs have other values at most pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            is_large = path.stat().st_size > 4096 + 0.25 * image.width * image.height
            return is_large and (image.format not in ("BMP", "TIFF", "PPM") or has_many_values(path))
    except Exception:  # what cannot be read is told by who decodes it
        return False


def is_binary(path: Path) -> bool:
    """Whether a picture has few values, black among them, or next to only black and white, as masks do.

    Only what is small for its pixels, as such pictures are when they are compressed, or has few values is decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            small = path.stat().st_size < 2048 + 0.1 * image.width * image.height
            if not small and (image.format not in ("BMP", "TIFF", "PPM") or has_many_values(path)):
                return False
            if image.mode in ("P", "PA", "LA", "RGBA"):
                image = image.convert("RGB")
            pixels = np.asarray(image)
    except Exception:  # what cannot be read is told by who decodes it
        return False
    if pixels.ndim == 3:  # a number for each colour
        is_grey = (pixels == pixels[..., :1]).all()
        pixels = pixels[..., 0] if is_grey else pixels[..., :3].astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    values = np.unique(pixels.ravel()[::101])
    if len(values) <= MAX_VALUES:
        values = np.unique(pixels)
    if len(values) == 1:
        return False
    if values[0] == 0 and len(values) <= max(2, min(MAX_VALUES, pixels.size // 64)):
        return True
    has_both = pixels.dtype == np.uint8 and values[0] <= 8 and values[-1] >= 247
    return has_both and bool(((pixels <= 8) | (pixels >= 247)).mean() > 0.98)


def has_many_values(path: Path) -> bool:
    """Whether a file, of pixels as they are, has more values in its middle than masks have."""
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return len(set(file.read(1 << 16))) > 16


def can_be_opened(path: Path) -> bool:
    """Whether a file's header is an image's."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:
        return False
