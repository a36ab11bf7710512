"""Any folder of images whose names tell good from bad: what an engineer with a camera has.

A folder without a hint is one of good images, searched with its subfolders (days, cameras, lots). Else the words of
`rad.data.roles` in the names of folders, or of files, say what is good and bad, train and test, image and mask:

    good/**/*.png, <defect>/**/*.png, ground_truth/<defect>/**/*_mask.png
    train/normal/*.png, test/normal/*.png, test/abnormal/*.png
    <category>/OK/*.png, <category>/NG/*.png, and many others

- Beside a folder of good images any other is a kind of defect.
- Good images of test folders are for the test. Where no folder says train or test and there are defects, every fifth
  good image, in order of names, is a test image like the defects, and the others are for training.
- What is not clear is refused; globs (`good`, `bad`, `masks`) or `all_good` say it then.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from .dataset import Sample, check_masks_found
from .doubts import (
    can_be_opened,
    classes_of_folders,
    is_binary,
    is_photo,
    kinds_of_names,
    label_files,
    named_otherwise,
    refusal,
)
from .listing import LINKS, Listing, list_files
from .masks import MaskFinder, is_mask_alone
from .roles import Meaning, mask_stem, meaning_of


@dataclass(frozen=True)
class Entry:
    """An image and what is known of it.

    Attributes:
        folders: Of the image, relative to the data folder, without those that all images share.
        quality: "good", "bad", "mask", or None; what says "both" or "aside", neither, is refused.
        split: "train", "validation", "test" or None.
    """

    path: Path
    folders: tuple[str, ...]
    quality: str | None = None
    split: str | None = None
    category: str = ""
    defect: str = "good"


def load_folder(
    root: Path,
    split: str,
    categories: list[str] | None = None,
    good: Sequence[str] = (),
    bad: Sequence[str] = (),
    masks: Sequence[str] = (),
    all_good: bool = False,
) -> list[Sample]:
    """Images under `root` as samples of `split` ("train" or "test").

    Categories are folders above or below those of good and bad; without such folders there is one, named after `root`.

    Args:
        good, bad, masks: Globs, relative to `root`, of files and of folders, which count with their subfolders. What
            they name is what they say; names decide on the rest, but where `good` is given only it is good.
        all_good: Every image is a good one, whatever its name says.

    Raises:
        ValueError: It is not clear which images are good, a glob finds nothing or two say different things, other
            categories are asked for, or there are no defects for a test split.
    """
    entries = read_folder(root, good, bad, masks, all_good)
    available = sorted({entry.category for entry in entries if entry.quality != "mask"})
    missing = sorted(set(categories or []) - set(available))
    if missing and len(available) == 1:
        raise ValueError(f"{root} has no categories but {available[0]!r}; got {', '.join(missing)}.")
    if missing:
        raise ValueError(f"{root} has no category {', '.join(missing)}; it has {', '.join(available)}.")
    if split == "test" and not any(entry.quality == "bad" or entry.split == "test" for entry in entries):
        raise ValueError(
            f"{root} has no 'test' split: all of its {len(entries)} images are good ones to train on. To measure, put "
            "bad ones beside them, in a folder bad or one for each kind of defect."
        )
    masks, photos = ([e.path for e in entries if (e.quality == "mask") == is_mask] for is_mask in (True, False))
    find = MaskFinder(masks, photos, root)
    samples = [
        Sample(entry.path, entry.category, entry.defect, find(entry.path) if entry.quality == "bad" else None)
        for category in (categories or available)
        for entry in divide([entry for entry in entries if entry.category == category and entry.quality != "mask"])
        if entry.split == split
    ]
    if entries and not samples and split == "train":
        why = "all lie in folders of tests" if photos else "all are called masks"
        raise ValueError(f"{root} has no good images to train on: {why}.")
    check_masks_found(root, samples, find.without_image([e.path for e in entries if e.quality == "bad"]))
    return samples


def read_folder(
    root: Path, good: Sequence[str] = (), bad: Sequence[str] = (), masks: Sequence[str] = (), all_good: bool = False
) -> list[Entry]:
    """All images under a folder, with what each is; arguments and errors as `load_folder`."""
    listing = list_files(root)
    parts = [path.relative_to(root).parts[:-1] for path in listing.images]
    shared = 0  # folders that all images lie in tell none from another
    while parts and all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    entries = [Entry(path, p[shared:]) for path, p in zip(listing.images, parts, strict=True)]
    above = parts[0][:shared] if parts else ()
    name = root.resolve().name
    if all_good:
        return [replace(entry, quality="good", category=name) for entry in entries]

    # 1. What globs and the names of folders say
    said: dict[Path, str] = {}
    for role, globs in (("good", good), ("bad", bad), ("mask", masks)):
        for path in named(root, listing.images, globs):
            if said.setdefault(path, role) != role:
                raise ValueError(
                    f"{path.relative_to(root)} is named by two of --good, --bad and --masks: name it in one."
                )
    entries = [told(entry, said.get(entry.path)) for entry in entries]
    if any(meaning_of(folder).split == "test" for folder in above):
        entries = [replace(entry, split="test") for entry in entries]
    if good:
        entries = [e for e in entries if e.path in said or e.quality == "mask" or (not bad and e.quality == "bad")]
    for quality, reason in (("both", "says both good and bad"), ("aside", "says neither good nor bad")):
        unclear = [place(e) for e in entries if e.quality == quality]
        if quality == "aside" and not good:
            unclear += [folder for folder in above if meaning_of(folder).aside]
        if unclear:
            raise refusal(root, f"{unclear[0]} {reason}")
    entries = same_stem_masks(by_file_names(entries))
    pictures = [e.path for e in entries if e.quality == "mask" and e.path not in said and is_photo(e.path)]
    if pictures:
        shown = pictures[0].relative_to(root)
        raise refusal(root, f"{len(pictures)} pictures are called masks (such as {shown}), but look like photographs")

    # 2. What lies beside them
    photos = [entry for entry in entries if entry.quality != "mask"]
    if not any(entry.quality for entry in photos):
        check_plain(root, entries, listing, above)
        check_names(root, [entry.path for entry in photos], label_files(root, listing))
        entries = [entry if entry.quality else replace(entry, quality="good") for entry in entries]
        return [replace(entry, category=name) for entry in entries]
    if not good:
        entries = loose_train(beside(entries))
        lost = [entry for entry in entries if entry.quality is None]
        if lost:
            folders = ", ".join(f"{count} in {folder}" for folder, count in Counter(map(place, lost)).most_common(5))
            names = sorted({place(e) if e.folders else e.path.name for e in photos if e.quality})[:5]
            raise refusal(root, f"some names tell good or bad ({', '.join(names)}), but not of the images {folders}")
    if not any(entry.quality == "good" for entry in entries):
        raise refusal(root, f"all images seem to be defects ({place(photos[0])}), none good")
    if not good:
        labels = [path for path in label_files(root, listing) if is_below_good(path.relative_to(root))]
        check_names(root, [entry.path for entry in entries if entry.quality == "good"], labels)
        check_names(root, [e.path for e in entries if e.quality == "bad" and e.path not in said], are_good=False)
        called = {f: meaning_of(f) for e in entries if e.quality == "good" for f in e.folders}
        called = {folder: word.unknown for folder, word in called.items() if word.quality == "good"}
        if len(set(called.values())) > 1:
            folder = next(folder for folder, is_unknown in called.items() if is_unknown)
            raise refusal(root, f"{folder} says more than good, beside {next(f for f in called if not called[f])}")
    if good:
        return [replace(entry, category=name) for entry in entries]
    entries = with_categories(entries, name)
    known = {entry.category for entry in entries if entry.quality == "good"}
    lost = [entry for entry in entries if entry.quality == "bad" and entry.category not in known]
    if lost:
        folders = ", ".join(sorted(known)[:5])
        raise refusal(root, f"{place(lost[0])} is of no category that has good images ({folders})")
    return entries


def named(root: Path, images: list[Path], globs: Sequence[str]) -> list[Path]:
    """Those of the images that globs, relative to a folder, name, or in a folder that they name.

    Raises:
        ValueError: One names no images, or leads out of the folder.
    """
    found = []
    for glob in globs:
        if Path(glob).is_absolute() or ".." in Path(glob).parts:
            raise ValueError(f"The glob {glob!r} must be relative to the data folder {root}.")
        matching = [path for path in images if glob and matches(path.relative_to(root).parts, Path(glob).parts)]
        if not matching:
            raise ValueError(f"The glob {glob!r} finds no images in {root}.")
        found += matching
    return found


def matches(parts: tuple[str, ...], globs: tuple[str, ...]) -> bool:
    """Whether a path, or a folder above it, matches a glob; links are followed, other than by `Path.glob`."""
    if not globs:
        return True
    if globs[0] == "**":
        return any(matches(parts[i:], globs[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], globs[0]) and matches(parts[1:], globs[1:])


def told(entry: Entry, said: str | None) -> Entry:
    """What globs or, without, the names of folders say of an image."""
    words = [meaning_of(folder) for folder in entry.folders]
    splits = [word.split for word in words if word.split]
    qualities = {word.quality for word in words if word.quality}
    is_mask = any(word.mask for word in words) or mask_stem(entry.path.stem) is not None or is_mask_alone(entry.path)
    found = "both" if len(qualities) > 1 else next(iter(qualities), None)
    quality = said or ("mask" if is_mask else "aside" if any(word.aside for word in words) else found)
    return replace(entry, quality=quality, split=splits[-1] if splits else None, defect=kind(entry, quality, words))


def kind(entry: Entry, quality: str | None, words: list[Meaning]) -> str:
    """The kind of defect that an image's folders name: the first that is a kind; else what lies below "bad"."""
    if quality != "bad":
        return "good"
    named_bad = [i for i, word in enumerate(words) if word.quality == "bad"]
    kinds = [i for i in named_bad if words[i].kind]
    if named_bad:
        kinds += [i for i in range(named_bad[0] + 1, len(words)) if words[i].unknown] + named_bad[-1:]
    return entry.folders[kinds[0]] if kinds else (entry.folders[-1] if entry.folders else "bad")


def by_file_names(entries: list[Entry]) -> list[Entry]:
    """Takes files' names for those that no folder tells of: "good_1.png" and "NG_2.png" in one folder.

    A single "broken.png" that cannot be opened is just that.
    """
    words = [meaning_of(entry.path.stem) for entry in entries]
    told = [i for i, word in enumerate(words) if word.quality and not word.kind and entries[i].quality is None]
    if len(told) == 1 and not can_be_opened(entries[told[0]].path):
        return entries
    found = list(entries)
    for i in told:
        quality = words[i].quality
        found[i] = replace(entries[i], quality=quality, defect="good" if quality == "good" else "bad")
    return found


def same_stem_masks(entries: list[Entry]) -> list[Entry]:
    """Of two pictures of a defect with one name and other suffixes, the nearly binary one is the mask."""
    groups: dict[tuple[Path, str], list[Entry]] = {}
    for entry in entries:
        if entry.quality == "bad":
            groups.setdefault((entry.path.parent, entry.path.stem), []).append(entry)
    twins = [entry.path for group in groups.values() if len(group) == 2 for entry in group]
    masks = {path for path in twins if is_binary(path)}
    return [replace(entry, quality="mask") if entry.path in masks else entry for entry in entries]


def core(entry: Entry) -> tuple[str, ...]:
    """An image's folders without those that only say train, test, images, a day, a number."""
    words = map(meaning_of, entry.folders)
    return tuple(f for f, word in zip(entry.folders, words, strict=True) if word.quality or word.unknown)


def beside(entries: list[Entry]) -> list[Entry]:
    """Images that no word tells of are defects if their folder lies beside that of good images."""
    good = [entry for entry in entries if entry.quality == "good"]
    parents = {_until_good(entry) for entry in good if core(entry) or not entry.split}
    has_splits = all(entry.split for entry in good)  # then what lies in no split lies beside these, not beside good
    found = []
    for entry in entries:
        own = core(entry)
        at = next((i for i in range(len(own)) if own[:i] in parents), None)
        is_defect = entry.quality is None and at is not None and (entry.split is not None or not has_splits)
        found.append(replace(entry, quality="bad", defect=own[at]) if is_defect else entry)
    return found


def loose_train(entries: list[Entry]) -> list[Entry]:
    """Images that no word tells of are good if they lie loose in a train folder, without any that words call good, and
    all of the test are told."""
    tested = [entry for entry in entries if entry.split in ("test", "validation")]
    is_told = any(entry.quality == "good" and entry.split == "train" for entry in entries)
    if is_told or not tested or not all(entry.quality for entry in tested):
        return entries
    loose = [not entry.quality and entry.split == "train" and not core(entry) for entry in entries]
    return [replace(e, quality="good") if is_loose else e for e, is_loose in zip(entries, loose, strict=True)]


def _until_good(entry: Entry) -> tuple[str, ...]:
    """The folders that hold that of a good image."""
    own = core(entry)
    return own[: next((i for i, folder in enumerate(own) if meaning_of(folder).quality), len(own))]


def with_categories(entries: list[Entry], name: str) -> list[Entry]:
    """Categories are folders above good and bad, or below both by the same names; `name` where there are none."""

    def around(entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
        own = core(entry)
        place = next((i for i, f in enumerate(own) if meaning_of(f).quality or f == entry.defect), len(own))
        return own[:place], own[place + 1 :]

    photos = [entry for entry in entries if entry.quality != "mask"]
    below = {
        quality: {around(entry)[1][:1] for entry in photos if entry.quality == quality} for quality in ("good", "bad")
    }
    is_below = () not in below["good"] | below["bad"] and bool(below["bad"]) and below["bad"] <= below["good"]
    found = []
    for entry in entries:
        above, rest = around(entry)
        category = "/".join([*above, *(rest[:1] if is_below else ())]) or name
        defect = entry.defect
        if is_below and entry.quality == "bad" and rest[:1] == (defect,):
            defect = next(f for f in entry.folders if meaning_of(f).quality == "bad")
        found.append(replace(entry, category=category, defect=defect))
    return found


def divide(entries: list[Entry]) -> list[Entry]:
    """Says of each image of one category which split it is part of."""
    good, bad = ([e for e in entries if e.quality == quality] for quality in ("good", "bad"))
    has_test = any(e.split == "test" for e in entries)
    if any(e.split for e in good):
        good = [e if e.split else replace(e, split="train") for e in good]
    elif bad:
        good = [replace(e, split="train" if number % 5 else "test") for number, e in enumerate(good, start=1)]
    else:
        good = [replace(e, split="train") for e in good]
    if not any(e.split == "test" for e in bad):  # defects in train are for the test only where it has none of its own
        bad = [replace(e, split="test") for e in bad]
    bad = [e if e.split else replace(e, split="test") for e in bad]
    if not has_test:
        good = [replace(e, split="test") if e.split == "validation" else e for e in good]
    return good + bad


def place(entry: Entry) -> str:
    """Where an image lies, to be told."""
    return "/".join(entry.folders) or "the folder itself"


def check_plain(root: Path, entries: list[Entry], listing: Listing, above: tuple[str, ...]) -> None:
    """Raises ValueError if a folder whose names say nothing of good or bad holds a sign that not all are good."""
    over = [meaning_of(folder) for folder in above]
    says_good = [word.quality for word in over][-1:] == ["good"] or any(word.quality == "good" for word in over)
    bad = [folder for folder, word in zip(above, over, strict=True) if word.quality in ("bad", "both")]
    if bad and not says_good:
        raise refusal(root, f"all of them lie in {bad[0]}")
    masks = [entry for entry in entries if entry.quality == "mask"]
    if masks and not says_good:
        raise refusal(root, f"{len(masks)} of them seem to be masks (such as {masks[0].path.relative_to(root)})")
    tests = [entry for entry in entries if entry.split == "test"]
    if tests:
        folder = tests[0].path.parent.relative_to(root)
        raise refusal(root, f"{folder} tells train or test, but nothing tells good from bad")
    links = [path.name for path in listing.left_out.get(LINKS, ()) if meaning_of(path.name).quality]
    if links:
        raise refusal(root, f"the link {links[0]} tells good or bad of a folder that is read by another name")
    if says_good:
        return
    groups = {core(entry) for entry in entries}
    if len(groups) > 1 or classes_of_folders({entry.folders for entry in entries}):
        names = Counter(map(place, entries))
        raise refusal(root, f"it holds {', '.join(f'{n} in {p}' for p, n in sorted(names.items())[:8])}")
    kinds = kinds_of_names([entry.path for entry in entries])
    if kinds:
        told = ", ".join(f"{count} {kind or 'others'}" for kind, count in sorted(kinds.items())[:8])
        raise refusal(root, f"its files bear the names of several kinds: {told}")


def check_names(root: Path, paths: list[Path], labels: Sequence[Path] = (), are_good: bool = True) -> None:
    """Raises ValueError if some of images that are all good, or all bad, bear other names, or there are labels."""
    odd = named_otherwise(paths, are_good)
    if odd:
        kind = "good images" if are_good else "defects"
        raise refusal(root, f"{odd[0].relative_to(root)} lies among {kind}, but its name says otherwise")
    if labels:
        raise refusal(root, f"the file {labels[0].relative_to(root)} seems to hold labels, which are not read")


def is_below_good(path: Path) -> bool:
    """Whether a file lies in a folder that says good."""
    return any(meaning_of(folder).quality == "good" for folder in path.parts[:-1])
