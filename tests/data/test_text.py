# SPDX-License-Identifier: MIT
"""A user's own text: where it is cut, and what is said when it cannot be used."""

from pathlib import Path

import numpy as np
import pytest

from ablab.data import DataError, Tokenizer
from ablab.data.text import Text
from tests.section import text as text_section


def member(tmp_path, path, share=0.1):
    section = text_section(tmp_path / "out", Tokenizer.BYTE, share)
    return Text(Text.Config(path=path), section)


def split(data, name):
    (shard,) = data.manifest()["splits"][name]["shards"]
    return bytes(np.fromfile(data.folder / shard["file"], "<u2").astype(np.uint8))


def test_a_file_is_cut_at_a_line_end(tmp_path):
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = member(tmp_path, tmp_path / "a.txt")
    data.prepare()
    train, val = split(data, "train"), split(data, "val")
    assert (train[:-1] + val[:-1]).decode() == "".join(lines)
    assert train.endswith(b"\n\0") and val.startswith(b"line ") and 0.09 < len(val) / 8890 < 0.11


def test_one_long_line_is_cut_inside(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    data = member(tmp_path, tmp_path / "a.txt")
    data.prepare()
    assert len(split(data, "val")) == 101


def test_a_folder_is_read_sorted_and_cut_between_files(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden", "empty"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_text("" if name == "empty" else name + "\n")
    data = member(tmp_path, tmp_path / "in", 0.3)
    data.prepare()
    assert split(data, "train") == b"a.txt\n\0b/1.txt\n\0" and split(data, "val") == b"b/2.txt\n\0"


def test_a_huge_last_file_is_cut_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("small\n")
    (tmp_path / "in/b").write_text("long line\n" * 1000)
    data = member(tmp_path, tmp_path / "in", 0.2)
    data.prepare()
    assert 0.19 < len(split(data, "val")) / 10000 < 0.21


def test_prepared_set_outlives_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    data = member(tmp_path, tmp_path / "a.txt")
    data.prepare()
    (tmp_path / "a.txt").unlink()
    assert data.prepare() == data.folder


def test_changed_text_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    data = member(tmp_path, tmp_path / "a.txt")
    data.prepare()
    (tmp_path / "a.txt").write_text("other text\n" * 50)
    with pytest.raises(DataError, match="made from other content than DATA_TEXT finds now; delete"):
        data.prepare()


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"abc\xff", "byte 3 is not UTF-8"), (b"a\0b", "NUL"), (b"a", "split is empty"), (b"", "no text in it")],
)
def test_unusable_text_is_an_error_and_leaves_no_set(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)
    data = member(tmp_path, tmp_path / "a.txt")
    with pytest.raises(DataError, match=text):
        data.prepare()
    assert not data.folder.exists()


def test_missing_or_unset_path_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; set CONFIG_DATA_TEXT_PATH"):
        member(tmp_path, tmp_path / "none").prepare()
    with pytest.raises(DataError, match="CONFIG_DATA_TEXT_PATH is empty"):
        member(tmp_path, Path("")).prepare()
