"""Whether a file is the one that was published."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import DataError

# SHA-256 of the content after unpacking; keys are data set and file.
_SHA256 = {
    ("mnist", "train-images-idx3-ubyte"): "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ("mnist", "train-labels-idx1-ubyte"): "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ("mnist", "t10k-images-idx3-ubyte"): "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ("mnist", "t10k-labels-idx1-ubyte"): "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ("fashion-mnist", "train-images-idx3-ubyte"): "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ("fashion-mnist", "train-labels-idx1-ubyte"): "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ("fashion-mnist", "t10k-images-idx3-ubyte"): "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ("fashion-mnist", "t10k-labels-idx1-ubyte"): "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# Of the archive; what torchvision publishes for CIFAR's files is read from torchvision.
CINIC_ARCHIVE_MD5 = "6ee4d0c996905fe93221de577967a372"


def verify(dataset: str, path: Path, content: bytes, md5: str | None = None) -> None:
    """Compare the content of a known file with its published checksum; a file that is not known passes.

    Args:
        path: where ``content`` was read from; a name ending in .gz stands for the file inside.
        md5: the checksum, where torchvision publishes one.

    Raises:
        DataError: naming the file, if it differs.
    """
    sha256 = _SHA256.get((dataset, path.name.removesuffix(".gz")))
    for wanted, kind in ((sha256, "sha256"), (md5, "md5")):
        if wanted is not None and hashlib.new(kind, content, usedforsecurity=False).hexdigest() != wanted:
            raise DataError(
                f"{path}: damaged, or not the published file of {dataset} (its {kind} differs); "
                f"delete it and fetch it again, with --download if you like"
            )
