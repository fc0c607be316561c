"""What a run has finished, kept in its folder: the same command goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deployed import Row
from torch import nn

import sao_prune


class Kept:
    """Rows and weights of models that are trained.

    Args:
        folder: holds ``kept.json`` and a file of weights for every row.
        options: what the rows depend on; rows that were made with others are not used.
        dense: the model that all rows come from; rows of other weights are not used either.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], dense: nn.Module) -> None:
        self._folder, self._file = folder, folder / "kept.json"
        self._options = json.loads(json.dumps({**options, "weights": _digest(dense)}, default=str))
        found = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._rows: dict[str, Any] = found["rows"] if found.get("options") == self._options else {}

    def row(self, name: str, make: Callable[[], tuple[nn.Module, Row]], again: Callable[[], nn.Module]) -> Any:
        """A model and its row: made and put away, or of the kind that ``again`` gives with the weights of the file."""
        path = self._folder / f"{name}.safetensors"
        if name in self._rows and path.is_file():
            model = again()
            sao_prune.load(model, path)
            print(f"{name}: from {path}", flush=True)
            return model.eval(), Row(**self._rows[name])
        model, row = make()
        sao_prune.save(model, path)
        self._rows[name] = asdict(row)
        # In one step: a run that is killed leaves the file of the row before.
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"options": self._options, "rows": self._rows}, indent=1) + "\n")
        new.replace(self._file)
        return model, row


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
