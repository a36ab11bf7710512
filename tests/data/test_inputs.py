"""What a command is given to score: files, folders, globs, lists, archives and URLs."""

import contextlib
import io
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from rad.data import inputs
from rad.data.inputs import list_inputs


def png(value=0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a/1.png", "a/deep/2.png", "b/3.PNG")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / ".hidden.png").write_bytes(png())
    (tmp_path / "a" / "notes.md").write_text("none")
    return tmp_path


def names(found, root):
    return [source.name.removeprefix(f"{root}/") for source in found.sources]


def test_a_folder_is_read_with_all_below_it_and_foreign_files_are_named(folder):
    found = list_inputs([str(folder)])
    assert names(found, folder) == ["a/1.png", "a/deep/2.png", "b/3.PNG"]
    left_out = {Path(name).name: reason for reason, paths in found.left_out.items() for name in paths}
    assert left_out == {
        "Thumbs.db": "files of the system's",
        ".hidden.png": "hidden files",
        "notes.md": ".md: no images",
    }
    assert found.sources[0].fetch() == folder / "a" / "1.png"


def test_globs_lists_and_files_name_each_picture_once(folder):
    (folder / "list.txt").write_text("# mine\n\na/1.png\nb/*\n", encoding="utf-8")
    found = list_inputs([f"{folder}/**/*.png", str(folder / "list.txt"), str(folder / "a" / "1.png")])
    assert names(found, folder) == ["a/1.png", "a/deep/2.png", "b/3.PNG"]


def test_a_file_that_is_named_is_taken_whatever_its_name(folder):
    (folder / "picture.bin").write_bytes(png())
    (folder / "list.txt").write_text("gone.png\n")
    found = list_inputs([str(folder / "picture.bin"), str(folder / "list.txt")])
    assert names(found, folder) == ["picture.bin", "gone.png"]
    with pytest.raises(FileNotFoundError, match="gone.png"):  # in its row
        found.sources[1].fetch()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_archives_are_read_member_by_member(tmp_path, suffix):
    members = {"in/1.png": png(1), "2.png": png(2), "__MACOSX/._1.png": b"x", "read.me": b"x"}
    path = tmp_path / f"photos{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, {".tar": "w", ".tar.xz": "w:xz"}.get(suffix, "w:gz")) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    found = list_inputs([str(path)])
    assert names(found, path) == ["in/1.png", "2.png"]
    assert [source.fetch() for source in found.sources] == [png(1), png(2)]
    assert sorted(Path(name).name for paths in found.left_out.values() for name in paths) == ["._1.png", "read.me"]
    assert not list(tmp_path.glob("**/*.png"))
    found.close()


def test_urls_of_files_folders_and_globs_are_fetched():
    system = fsspec.filesystem("memory")
    for name in ("shop/1.png", "shop/more/2.png", "shop/notes.md"):
        system.pipe(f"/{name}", png())
    found = list_inputs(["memory://shop"])
    assert [source.name for source in found.sources] == ["memory:///shop/1.png", "memory:///shop/more/2.png"]
    assert found.sources[0].fetch() == png()
    assert len(list_inputs(["memory://shop/*.png"]).sources) == 1
    assert list_inputs(["memory://shop/1.png"]).sources[0].fetch() == png()
    with pytest.raises(OSError, match="cannot be fetched"):
        list_inputs(["memory://gone.png"]).sources[0].fetch()


def test_bad_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(FileNotFoundError, match="no file or folder .*gone"):
        list_inputs([str(tmp_path / "gone")])
    with pytest.raises(ValueError, match="no pictures in .*empty"):
        list_inputs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"bad.zip is damaged, or no archive"):
        list_inputs([str(tmp_path / "bad.zip")])
    (tmp_path / "bad.tar.xz").write_bytes(b"\xfd7zXZ\x00" + bytes(100))
    with pytest.raises(ValueError, match=r"bad.tar.xz is damaged, or no archive"):
        list_inputs([str(tmp_path / "bad.tar.xz")])
    with pytest.raises(ValueError, match="nosuch://a cannot be opened"):
        list_inputs(["nosuch://a"])


def test_what_claims_to_be_small_and_is_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", b"0" * 10_000)
    with contextlib.closing(list_inputs([str(tmp_path / "bomb.zip")])) as found:
        with pytest.raises(ValueError, match="more than"):
            found.sources[0].fetch()
    monkeypatch.setattr(inputs, "MAX_MEMBERS", 0)
    with pytest.raises(ValueError, match="more than 0 entries"):
        list_inputs([str(tmp_path / "bomb.zip")])


def test_each_picture_has_a_harmless_place_of_its_own(folder):
    (folder / "a" / "1.jpg").write_bytes(png())
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for name in ("../../../1.png", "C:\\1.png", "..", "a b/ü.png"):
            archive.writestr(name, png())
    found = list_inputs([str(folder / "a"), str(folder / "photos.zip")])
    found.close()
    places = [source.place for source in found.sources]
    assert len(set(places)) == len(places) == 6
    assert "a/deep/2" in places and "photos/a_b/ü" in places and "photos/C_/1" in places
    for place in places:
        assert (folder / place).resolve().is_relative_to(folder) and ".." not in place
