"""What to score: files, folders, globs, lists, archives and URLs as pictures that are read when their turn comes."""

import glob
import hashlib
import itertools
import mmap
import os
import re
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import fsspec

from ..image_reader import FORMATS
from .listing import IMAGE_SUFFIXES, foreign, list_files

MAX_BYTES = 100_000_000  # of one picture in an archive or behind a URL: their headings may claim anything
MAX_MEMBERS = 1_000_000  # of one archive
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


class _TooManyError(ValueError):
    """An archive has too many entries."""


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        name: What its row is called: a path, an archive's path and the member's, or a URL.
        fetch: Gives its path or its bytes; raises ValueError or OSError.
        place: Where pictures that belong to it go below an output folder, without a suffix; each has its own.
    """

    name: str
    fetch: Callable[[], Path | bytes]
    place: str = ""


@dataclass
class Inputs:
    """What was found.

    Attributes:
        sources: Pictures in order, each name once.
        left_out: Names of what is no picture, by the reason.
        archives: That are open; `close` closes them.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    archives: list[zipfile.ZipFile | tarfile.TarFile] = field(default_factory=list)

    def leave_out(self, folder: Path) -> None:
        """Leaves out what lies in a folder that is written to."""
        root, kept = folder.resolve(), []
        for source in self.sources:
            if "://" not in source.name and Path(source.name).resolve().is_relative_to(root):
                self.skip("in the output folder", source.name)
            else:
                kept.append(source)
        self.sources = kept

    def keep_apart(self, places: Mapping[str, str]) -> None:
        """Another place for pictures whose own is taken by one of another name, {place: name} of earlier runs."""
        taken = {place.lower(): name for place, name in places.items()}
        self.sources = [
            source
            if taken.get(source.place.lower(), source.name) == source.name
            else replace(source, place=f"{source.place}-{_digest(source.name)}")
            for source in self.sources
        ]

    def close(self) -> None:
        for archive in self.archives:
            archive.close()

    def skip(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)


def list_inputs(inputs: Sequence[str]) -> Inputs:
    """All pictures that inputs name; close what it returns when they have been read.

    Args:
        inputs: Each the path of a picture, of a folder (with all below it), of a zip or tar archive or of a text file
            with one of these on each line, relative to it; a glob, in which ** crosses folders; or a URL of a file,
            folder or glob that fsspec opens, such as s3://, gs:// and hf://, whose own packages it asks for.

    Raises:
        FileNotFoundError: One is none of these.
        ValueError: There is no picture, an archive is damaged or too large, or a URL cannot be opened.
    """
    found = Inputs()
    for each in inputs:
        _add(each, found)
    by_name: dict[str, Source] = {}
    for source in found.sources:
        by_name.setdefault(source.name, source)
    found.sources = _placed(list(by_name.values()))
    if not found.sources:
        told = "; ".join(f"{len(names)} {reason}" for reason, names in found.left_out.items())
        raise ValueError(f"There are no pictures in {', '.join(inputs)}{f' ({told})' if told else ''}.")
    return found


def _placed(sources: list[Source]) -> list[Source]:
    """The sources with places that are harmless whatever their names are, and each another's."""
    places = []
    for source in sources:
        *folders, name = [part for part in re.split(r"[/\\]", source.place or source.name) if part.strip(".")][-8:]
        parts = [*(folder.replace(".", "_") for folder in folders), name.rsplit(".", 1)[0]]
        places.append("/".join(_harmless(part) for part in parts))
    counts = Counter(place.lower() for place in places)
    marked = [
        place if counts[place.lower()] == 1 else f"{place}-{_digest(source.name)}"
        for source, place in zip(sources, places, strict=True)
    ]
    return [replace(source, place=place) for source, place in zip(sources, marked, strict=True)]


def _harmless(part: str) -> str:
    """A file's name that is like another, of at most 120 bytes."""
    plain = re.sub(r"[^\w.-]+", "_", part).encode(errors="replace")[-120:].decode(errors="ignore")
    return plain.strip(".") or "picture"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]


def _add(name: str, found: Inputs, from_list: bool = False) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        _add_url(name, found)
        return
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        listing = list_files(path)
        found.sources += [Source(str(each), lambda each=each: each, _below(each, path)) for each in listing.images]
        for reason, paths in listing.left_out.items():
            for each in paths:
                found.skip(reason, str(each))
    elif path.name.lower().endswith(_ARCHIVES) and path.is_file():
        found.sources += _members(path, found)
    elif path.suffix.lower() == ".txt" and path.is_file() and not from_list:
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if (entry := line.strip()) and not entry.startswith("#"):
                is_whole = "://" in entry or os.path.isabs(os.path.expanduser(entry))
                _add_listed(entry if is_whole else str(path.parent / entry), found)
    elif path.is_file():  # named by someone: what is wrong with it stands in its row
        found.sources.append(Source(str(path), lambda: path, path.name))
    elif matches := sorted(glob.glob(str(path), recursive=True)):
        for match in map(Path, matches):
            if match.is_file() and not (reason := _why_not(match.name)):
                found.sources.append(Source(str(match), lambda match=match: match, match.name))
            elif match.is_file():
                found.skip(reason, str(match))
    else:
        raise FileNotFoundError(f"There is no file or folder {name}, and as a glob it matches nothing.")


def _add_listed(entry: str, found: Inputs) -> None:
    """A line of a list: what is wrong with it stands in its row."""

    def refuse(error: Exception) -> bytes:
        raise error

    try:
        _add(entry, found, from_list=True)
    except (ValueError, OSError) as error:
        found.sources.append(Source(entry, lambda error=error: refuse(error), entry))


def _add_url(url: str, found: Inputs) -> None:
    try:
        system, path = fsspec.core.url_to_fs(url)
        if any(sign in path for sign in "*?["):
            paths = [each for each in system.glob(path) if system.isfile(each)]
        else:
            paths = system.find(path) if system.isdir(path) else [path]
    except Exception as error:  # each protocol has errors of its own
        raise ValueError(f"{url} cannot be opened ({error}).") from error

    def fetch(path: str) -> bytes:
        try:
            with system.open(path, "rb") as file:
                return _limited(file.read(MAX_BYTES + 1))
        except ValueError:
            raise
        except Exception as error:
            raise OSError(f"It cannot be fetched ({error}).") from error

    for each in sorted(paths):
        name = system.unstrip_protocol(each)
        if len(paths) > 1 and (reason := _why_not(each.removeprefix(path).lstrip("/"))):
            found.skip(reason, name)
        else:
            place = each.removeprefix(path).lstrip("/") or PurePosixPath(each).name
            found.sources.append(Source(name, lambda each=each: fetch(each), place))


def _members(path: Path, found: Inputs) -> Iterator[Source]:
    """The pictures in an archive; nothing is unpacked to the disk."""
    try:
        if path.suffix.lower() == ".zip":
            members: list = list_members(path, MAX_MEMBERS)
            found.archives.append(archive := zipfile.ZipFile(path))
        else:
            found.archives.append(archive := tarfile.open(path))
            entries = list(itertools.islice(archive, MAX_MEMBERS + 1))
            if len(entries) > MAX_MEMBERS:
                raise _TooManyError(f"{path} has more than {MAX_MEMBERS:,} entries.")
            members = [entry for entry in entries if entry.isfile()]
            for entry in entries:
                if entry.issym() or entry.islnk():
                    found.skip("links in an archive", f"{path}/{entry.name}")
    except _TooManyError:
        raise
    except Exception as error:  # zipfile, tarfile and each compression have errors of their own
        raise ValueError(f"{path} is damaged, or no archive ({error}).") from error
    lock = threading.Lock()  # an archive has one position

    def fetch(member: zipfile.ZipInfo | tarfile.TarInfo) -> bytes:
        try:
            with lock:
                file = archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)
                with file:
                    content = file.read(MAX_BYTES + 1)
        except Exception as error:  # zipfile and each compression have errors of their own
            raise ValueError(f"It cannot be taken from the archive ({error}).") from error
        return _limited(content)

    for member in members:
        inner = member.filename if isinstance(member, zipfile.ZipInfo) else member.name
        if reason := _why_not(inner):
            found.skip(reason, f"{path}/{inner}")
        else:
            yield Source(f"{path}/{inner}", lambda member=member: fetch(member), f"{path.stem}/{inner}")


def _below(path: Path, folder: Path) -> str:
    return f"{folder.resolve().name}/{path.relative_to(folder)}"


def list_members(path: Path, most: int) -> list[zipfile.ZipInfo]:
    """The files in a zip archive, without folders.

    Raises:
        zipfile.BadZipFile: It is none.
        ValueError: It has more than so many entries.
    """
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("it has no directory")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # Before zipfile makes an object of each of the millions of entries that a hostile one may have
        entries = sum(1 for _ in itertools.islice(re.finditer(b"PK\x01\x02", content), most + 1))
    if entries > most:
        raise _TooManyError(f"{path.name} has more than {most:,} entries.")
    with zipfile.ZipFile(path) as archive:
        return [member for member in archive.infolist() if not member.is_dir()]


def _why_not(name: str) -> str | None:
    """Why a member of an archive, or a file that a pattern matches, is no picture; None where it may be one."""
    path = PurePosixPath(name)
    if reason := foreign(path):
        return reason
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    return f"{path.suffix.lower() or 'files without a suffix'}: no format that is read ({', '.join(FORMATS)})"


def _limited(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise ValueError(f"It has more than {MAX_BYTES / 1e6:.0f} MB.")
    return content
