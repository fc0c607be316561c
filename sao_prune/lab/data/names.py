"""Which names a data set may have, without loading what reads it."""

from __future__ import annotations

from ..schema import unknown

_NAMED = ("digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "cinic-10")
_SEQUENCES = ("copying",)
_TEXT = "text:"

# torchvision's classification sets by class name: how the training and the test part are asked for; no test part means
# that one fifth of every class becomes it. Sets whose files are unpickled are not among them.
TORCHVISION: dict[str, tuple[dict[str, object], dict[str, object] | None]] = {
    **{name: ({"train": True}, {"train": False}) for name in ("KMNIST", "QMNIST", "USPS")},
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    **{
        name: ({"split": "train"}, {"split": "test"})
        for name in ("Country211", "DTD", "Flowers102", "Food101", "GTSRB", "PCAM", "RenderedSST2", "STL10", "SVHN")
    },
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "StanfordCars": ({"split": "train"}, {"split": "test"}),
    **{name: ({}, None) for name in ("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397")},
}

# The same sets under other libraries' names are read by this package, which verifies them and unpickles nothing.
_SAME = {
    "torchvision/mnist": "mnist",
    "torchvision/fashionmnist": "fashion-mnist",
    "torchvision/cifar10": "cifar-10",
    "torchvision/cifar100": "cifar-100",
    "timm/torch/mnist": "mnist",
    "timm/torch/fashion_mnist": "fashion-mnist",
    "timm/torch/cifar10": "cifar-10",
    "timm/torch/cifar100": "cifar-100",
    "timm/folder": "folder:.",
    "timm/torch/folder": "folder:.",
    "timm/torch/image_folder": "folder:.",
}
_TIMM_PREFIXES = ("torch", "tfds", "hfds", "hfids", "wds")


def dataset_names() -> tuple[str, ...]:
    """The sets with a name of their own; ``torchvision/NAME``, ``timm/NAME``, ``folder:PATH``, ``text:PATH`` are more.

    Example:
        >>> dataset_names()
        ('digits', 'mnist', 'fashion-mnist', 'cifar-10', 'cifar-100', 'cinic-10', 'copying')
    """
    return (*_NAMED, *_SEQUENCES)


def is_sequences(name: str) -> bool:
    """Whether a name stands for sequences rather than images.

    Example:
        >>> is_sequences("text:hamlet.txt"), is_sequences("mnist")
        (True, False)
    """
    return name in _SEQUENCES or name.startswith(_TEXT)


def own_name(name: str) -> str:
    """The name under which this package reads a set: ``torchvision/CIFAR10`` is ``cifar-10``."""
    return _SAME.get(name.lower(), name)


def torchvision_class(name: str) -> str | None:
    """The class that ``torchvision/NAME`` means, whatever its capitals; None if there is none."""
    wanted = name.partition("/")[2].lower()
    return next((cls for cls in TORCHVISION if cls.lower() == wanted), None)


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a data set, or None."""
    name = own_name(name)
    if name in dataset_names():
        return None
    if name.startswith("torchvision/"):
        known = [*TORCHVISION, "MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]
        return None if torchvision_class(name) else unknown("data set", name, [f"torchvision/{cls}" for cls in known])
    if name.startswith("timm/"):
        prefix, _, rest = name.removeprefix("timm/").partition("/")
        if prefix in _TIMM_PREFIXES and rest:
            return None
        allowed = ("timm/folder", *(f"timm/{prefix}/NAME" for prefix in _TIMM_PREFIXES))
        return unknown("data set", name, allowed)
    if name.startswith("folder:"):
        return None if name.removeprefix("folder:").strip() else "folder: needs a path, as in folder:images"
    if name.startswith(_TEXT):
        return None if name.removeprefix(_TEXT).strip() else "text: needs a path, as in text:hamlet.txt"
    return unknown("data set", name, (*dataset_names(), "torchvision/NAME", "timm/NAME", "folder:PATH", "text:PATH"))
