"""Which files of a folder are its images, and why others are none."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePath

from ..image_reader import FORMATS

_SUFFIXES = {  # of the formats that can be read
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif",),
}
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_HAS_HEIF = find_spec("pillow_heif") is not None
IMAGE_SUFFIXES = tuple(suffix for name, suffixes in _SUFFIXES.items() if name in FORMATS for suffix in suffixes)
IMAGE_SUFFIXES += _HEIF_SUFFIXES if _HAS_HEIF else ()
_UNREAD_SUFFIXES = set(  # pictures all the same
    """.avif .heic .heif .hif .dng .raw .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .jp2 .j2k .jxl .psd .exr .hdr .dcm .npy
    .svg .eps .ico .pcx .tga .fits .mp4 .avi .mov .mkv""".split()
)
_COMPANIONS = (_UNREAD_SUFFIXES - {".npy"}) | set(".xmp .aae .thm .pp3 .dop .md .pdf .log .py .zip".split())
_THUMBNAILS = {"@eadir", ".@__thumb", "@__thumb", "thumb", "thumbs", "thumbnails", ".thumbnails"}
_SYSTEM_FOLDERS = {"__macosx", "system volume information", "lost+found", "$recycle.bin", "#recycle", "@recycle"}
_SYSTEM_FOLDERS |= {"#snapshot", "@recently-snapshot"}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}

LINKS = "links to a folder that is read already"


@dataclass
class Listing:
    """What a folder and its subfolders hold.

    Attributes:
        images: Sorted.
        left_out: What is no image, by the reason.
    """

    images: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, []).append(path)


def foreign(path: PurePath) -> str | None:
    """Why a relative path is a thing of the system's and no file of a data set; None for those that may be."""
    for part in map(str.lower, path.parts):
        if part in _THUMBNAILS:
            return f"thumbnails in {part}" if part.startswith("@") else "thumbnails"
        if part in _SYSTEM_FOLDERS or part in _SYSTEM_FILES or part.startswith("~$"):
            return "files of the system's"
        if part.startswith(".") and part not in (".", ".."):
            return "hidden files"
    return None


def is_image(path: Path) -> bool:
    """Whether a path is a file that bears an image's name."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not foreign(Path(path.name)) and path.is_file()


def is_companion(path: Path) -> bool:
    """Whether a file is one that lies beside photos and tells nothing of them: a raw picture, a film, notes."""
    return path.suffix.lower() in _COMPANIONS


def list_images(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted by name."""
    return sorted(filter(is_image, folder.iterdir()))


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, links to folders too, sorted by name; without hidden ones and the system's."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not foreign(Path(path.name)))


def images_under(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted."""
    return list_files(folder).images


def list_files(root: Path) -> Listing:
    """All that a folder holds. Links are followed; a folder that several paths lead to is read once, so that no image
    counts twice and no loop is endless."""
    found, seen = Listing(), {os.path.realpath(root)}
    folders, links = [root], []

    def search(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in seen:  # in what a link leads to
            found.skip(LINKS, folder)
        else:
            seen.add(real)
            folders.append(folder)

    while folders or links:
        if not folders:  # what can be reached without a link has been
            search(links.pop(0))
            continue
        folder = folders.pop()
        if not os.access(folder, os.R_OK | os.X_OK):
            found.skip("folders that may not be read", folder)
            continue
        for path in sorted(folder.iterdir()):
            reason = foreign(Path(path.name))
            if path.is_dir():
                if reason:
                    inside = path.rglob("*") if path.name.lower() in _THUMBNAILS else [path]
                    for hidden in (each for each in inside if each == path or not each.is_dir()):
                        found.skip(reason, hidden)
                elif path.is_symlink():
                    links.append(path)
                else:
                    search(path)
            elif reason or not is_image(path):
                found.skip(reason or _why_no_image(path), path)
            else:
                found.images.append(path)
    found.images.sort()
    return found


def _why_no_image(path: Path) -> str:
    suffix = path.suffix.lower()
    if not path.exists():
        return "broken links"
    if not path.is_file():
        return "no regular files"
    if suffix in _HEIF_SUFFIXES:
        return f"{suffix}: need pillow-heif, pip install pillow-heif"
    if suffix in _UNREAD_SUFFIXES:
        return f"{suffix}: no format that is read ({', '.join(FORMATS)})"
    return f"{suffix}: no images" if suffix else "files without a suffix"
