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

# MD5 is what torchvision publishes for CIFAR's files and what CINIC-10's archive has.
_MD5 = {
    ("cifar-10", "data_batch_1"): "c99cafc152244af753f735de768cd75f",
    ("cifar-10", "data_batch_2"): "d4bba439e000b95fd0a9bffe97cbabec",
    ("cifar-10", "data_batch_3"): "54ebc095f3ab1f0389bbae665268c751",
    ("cifar-10", "data_batch_4"): "634d18415352ddfa80567beed471001a",
    ("cifar-10", "data_batch_5"): "482c414d41f54cd18b22e5b47cb7c3cb",
    ("cifar-10", "test_batch"): "40351d587109b95175f43aff81a1287e",
    ("cifar-10", "batches.meta"): "5ff9c542aee3614f3951f8cda6e48888",
    ("cifar-100", "train"): "16019d7e3df5f24257cddd939b257f8d",
    ("cifar-100", "test"): "f0ef6b0ae62326f3e7ffdfab6717acfc",
    ("cifar-100", "meta"): "7973b15100ade9c7d40fb424638fde48",
}

CINIC_ARCHIVE_MD5 = "6ee4d0c996905fe93221de577967a372"


def verify(dataset: str, path: Path, content: bytes) -> None:
    """Compare the content of a known file with its published checksum; a file that is not known passes.

    Args:
        path: where ``content`` was read from; a name ending in .gz stands for the file inside.

    Raises:
        DataError: naming the file, if it differs.
    """
    key = dataset, path.name.removesuffix(".gz")
    for known, kind in ((_SHA256, "sha256"), (_MD5, "md5")):
        wanted = known.get(key)
        if wanted is not None and hashlib.new(kind, content, usedforsecurity=False).hexdigest() != wanted:
            raise DataError(
                f"{path}: damaged, or not the published file of {dataset} (its {kind} differs); "
                f"delete it and fetch it again, with --download if you like"
            )
