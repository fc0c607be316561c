"""Where data may come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class DataSource:
    """Where data may come from: the folder that ``--data-dir`` names, and whether downloading is allowed."""

    data_dir: Path = Path("data")
    download: bool = False

    def folders(self, *names: str) -> list[Path]:
        """Folders of these names in the data folder; an absolute path stays as it is."""
        return [self.data_dir.expanduser() / name for name in names]


def missing(name: str, looked: Iterable[Path], *ways: str) -> DataError:
    """The error that a set is not on this machine, with every way to get it."""
    return DataError(f"{name} is not on this machine (looked in {', '.join(map(str, looked))}): {', or '.join(ways)}")


def fetch(name: str, source: DataSource, download: Callable[[Any, Path], object]) -> None:
    """Run ``download(torchvision, data folder)``.

    Raises:
        DataError: if torchvision is not installed, or for whatever keeps the files from coming.
    """
    try:
        import torchvision
    except ImportError as error:
        raise DataError("--download needs torchvision: pip install 'sao-prune[lab]'") from error
    folder = source.data_dir.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download(torchvision, folder)
    except (OSError, RuntimeError) as error:
        raise DataError(f"downloading {name} into {folder} failed: {error}") from error
