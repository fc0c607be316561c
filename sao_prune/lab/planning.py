"""Plan an architecture by its name, without memory for its weights."""

from __future__ import annotations

import warnings

from ..algorithms import Method
from ..model import plan
from ..naming import nearest
from ..options import PlanOptions
from ..reporting import Report, SparsityWarning
from .errors import LabError
from .zoo import Architecture, architectures


def _find_architecture(name: str) -> Architecture:
    """The architecture of a name, timm's before torchvision's; ``timm/NAME`` and ``torchvision/NAME`` choose.

    Raises:
        LabError: if there is none, naming the nearest ones.

    Example:
        >>> _find_architecture("resnet18").library, _find_architecture("torchvision/resnet18").library
        ('timm', 'torchvision')
    """
    library, _, wanted = name.rpartition("/")
    every = [a for a in architectures() if library in ("", a.library)]
    bare = wanted.partition(".")[0]
    for architecture in sorted(every, key=lambda a: a.library != "timm"):
        if architecture.name == bare:
            return architecture
    hint = nearest(bare, {a.name for a in every}, 4) or "; `sao-prune zoo --filter '*'` lists all"
    raise LabError(f"no architecture {name!r} in timm or torchvision{hint}")


def plan_by_name(
    name: str, sparsity: float | None, method: str | Method, options: PlanOptions
) -> tuple[Report, str | None]:
    """The plan of a named architecture, and a warning about layers off target if there are any.

    Raises:
        LabError: if there is no such architecture, or an option is out of range.
    """
    model = _find_architecture(name).build_on_meta()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsityWarning)
            report = plan(model, sparsity, method=method, **options)
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from error
    return report, report.warning()
