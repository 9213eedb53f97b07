import pytest
from tersor.formats.errors import TersorError
from tersor.formats.output import check_output, output_folder, partial_path


def test_check_output(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    check_output(out, source, force=False, resume=False)
    out.mkdir()
    check_output(out, source, force=False, resume=False)
    (out / "x").write_text("mine")
    with pytest.raises(TersorError, match="not empty"):
        check_output(out, source, force=False, resume=True)
    with pytest.raises(TersorError, match="holds no checkpoint"):
        check_output(out, source, force=True, resume=False)
    (out / "config.json").write_text("{}")
    check_output(out, source, force=True, resume=False)
    (tmp_path / "link").symlink_to(source)
    for path in (source, tmp_path / "link", tmp_path / "out" / ".." / "source"):
        with pytest.raises(TersorError, match="is the input"):
            check_output(path, source, force=True, resume=False)
    with pytest.raises(TersorError, match="not a folder"):
        check_output(out / "x", source, force=True, resume=False)
    partial_path(tmp_path / "new").mkdir()
    with pytest.raises(TersorError, match="did not finish"):
        check_output(tmp_path / "new", source, force=False, resume=False)
    check_output(tmp_path / "new", source, force=False, resume=True)


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(out) as folder:
        (folder / "a.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a.json"] and not partial_path(out).exists()
    with output_folder(out) as folder:
        (folder / "b.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["b.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, TersorError("x")])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, TersorError)), output_folder(out) as folder:
        (folder / "a.json").write_text("{}")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TersorError, match="cannot be written"), output_folder(tmp_path / "file" / "out"):
        pass
