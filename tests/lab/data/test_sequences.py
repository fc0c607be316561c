import tarfile
from pathlib import Path

import pytest
import torch

from sao_prune.lab.data import DataSource, DataSpec, load_dataset
from sao_prune.lab.data.dataset import IGNORED
from sao_prune.lab.errors import DataError

TEXT = "To be, or not to be: that is the question.\n" * 40


def test_copying_asks_for_the_symbols_at_the_end_and_for_nothing_else() -> None:
    data = load_dataset(DataSpec("copying", length=7, subset=50, test_subset=20))
    assert data.train_x.shape == data.train_y.shape == (50, 27)
    assert data.test_x.shape == (20, 27)
    assert (data.sizes, len(data.classes)) == ({"tokens": 10}, 8)
    assert torch.equal(data.train_y[:, -10:], data.train_x[:, :10].long())
    assert (data.train_y[:, :-10] == IGNORED).all()
    assert data.train_x[:, 10:].unique().tolist() == [8, 9]
    assert (data.train_x[:, -11] == 9).all()
    again = load_dataset(DataSpec("copying", length=7, subset=50, test_subset=20))
    assert torch.equal(again.train_x, data.train_x)
    assert not torch.equal(data.train_x[:20], data.test_x)


def test_text_is_cut_into_windows_whose_labels_are_the_next_characters(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text(TEXT)
    data = load_dataset(DataSpec("text:play.txt", length=16), DataSource(tmp_path))
    assert torch.equal(data.train_x[:, 1:].long(), data.train_y[:, :-1])
    letters = "".join(data.classes[i] for i in data.train_x[0].tolist())
    assert letters in TEXT
    assert len(data.test_x) == (len(TEXT) - 1) // 16 // 10
    assert data.tokens == len(data.classes) == len(set(TEXT))
    held = data.holdout(0.25)
    assert len(held.test_x) == round(0.25 * len(data.train_x))
    assert len(held.train_x) + len(held.test_x) == len(data.train_x)
    assert data.example.dtype == torch.long
    assert data.batch(torch.tensor([3, 1]))[0].dtype == torch.long


def test_a_folder_and_an_archive_hold_the_same_text(tmp_path: Path) -> None:
    folder = tmp_path / "plays"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT.encode() + "caf\u00e9\r\n".encode())
    (folder / "b.txt").write_text(TEXT[::-1])
    (folder / "c.md").write_text("no text")
    with tarfile.open(tmp_path / "plays.tar.gz", "w:gz") as archive:
        archive.add(folder, "plays-1.0")
    one, two = (load_dataset(DataSpec(f"text:{tmp_path / name}", length=8)) for name in ("plays", "plays.tar.gz"))
    assert torch.equal(one.train_x, two.train_x)
    assert "?" in one.classes
    assert "\r" not in one.classes


@pytest.mark.parametrize(
    ("text", "length", "subset", "message"),
    [
        ("", 8, None, "has 0 training windows of 8 characters, one or more are asked for"),
        (TEXT, 8, 1000, "training windows of 8 characters, 1000 are asked for: give a longer text"),
    ],
)
def test_texts_that_are_too_short(tmp_path: Path, text: str, length: int, subset: int | None, message: str) -> None:
    (tmp_path / "play.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(DataSpec("text:play.txt", length=length, subset=subset), DataSource(tmp_path))


def test_texts_that_are_missing_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"the text play.txt is not on this machine .* give a file, a folder"):
        load_dataset(DataSpec("text:play.txt", length=8), DataSource(tmp_path))
    (tmp_path / "play.txt").write_text(TEXT)
    monkeypatch.setattr("sao_prune.lab.data.sequences._LARGEST", 100)
    with pytest.raises(DataError, match="at most 0 MiB are read"):
        load_dataset(DataSpec("text:play.txt", length=8), DataSource(tmp_path))


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (DataSpec("copying"), "length"),
        (DataSpec("digits", length=8), "length"),
        (DataSpec("copying", length=8, augment=("flip",)), "augment"),
        (DataSpec("text:", length=8), "name"),
    ],
)
def test_what_a_specification_of_sequences_may_say(spec: DataSpec, key: str) -> None:
    problem = spec.problem()
    assert problem is not None
    assert problem[0] == key
