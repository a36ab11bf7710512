"""The one atomic write: whole or not at all."""

import pytest

from rad.files import remove_partials, whole


def test_a_file_appears_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "table.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with whole(path) as partial:
            partial.write_text(text)
            assert partial.parent == tmp_path and partial.name.startswith(".") and partial.suffix == ".json"
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_the_one_before_and_is_not_merged_with_it(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        with whole(str(path)) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
        assert [file.name for file in path.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "kept").touch()
    (tmp_path / "table.json").write_text("kept")
    with pytest.raises(error), whole(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise error
    with pytest.raises(error), whole(tmp_path / "table.json") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "model" / "kept").exists() and (tmp_path / "table.json").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_folder_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "kept").touch()
    with pytest.raises(FileNotFoundError), whole(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".partial-7-model").mkdir()
    (tmp_path / ".partial-7-model" / "half").touch()
    (tmp_path / ".partial-old-8-table.json").touch()
    (tmp_path / ".partial-8-table.json").touch()
    (tmp_path / "table.json").touch()
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path):
    """Between the two renames; but not where the new one is there."""
    for name, replaced in (("model-a", False), ("model-b", True)):
        (tmp_path / f".partial-old-123-{name}").mkdir()
        (tmp_path / f".partial-old-123-{name}" / "old").touch()
        if replaced:
            (tmp_path / name).mkdir()
            (tmp_path / name / "new").touch()
        (tmp_path / f".partial-123-{name}").mkdir()
    remove_partials(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["model-a", "model-a/old", "model-b", "model-b/new"]
