"""Compile the kernels once for a processor, keep the result, and load it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = ("rows.c", "planes.c", "mlp.c", "stack.c", "norm.c", "pool.c", "few.c")
_HEADERS = ("panel.h", "inner.h", "geometry.h", "moments.h", "act.h", "vector.h")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SWITCH = "SAO_PRUNE_NATIVE"
_log = logging.getLogger(__name__)

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_GEOMETRY = [_long] * 16 + [_pointer] * 2
_FORWARD = [_int] + [_pointer] * 7 + [ctypes.c_float]
_MLP = [_long] * 5 + ([_long] * 3 + [_pointer] * 2) * 2 + [_int, _long, _int, _int]
_SIGNATURES = {
    "rows_forward": [_pointer] * 4 + _GEOMETRY + [_int] * 2 + [_long, _int] + _FORWARD,
    "rows_backward": [_pointer] * 6 + _GEOMETRY + [_int] * 3 + [_long, _int] + [_pointer, _int, _int, _pointer],
    "planes_forward": [_pointer] * 4 + _GEOMETRY + [_int] + _FORWARD,
    "planes_backward": [_pointer] * 6 + _GEOMETRY + [_int] + [_pointer, _int, _pointer],
    "few_forward": [_pointer] * 4 + [_long] * 6 + [_pointer] * 2 + [_int] * 2,
    "mlp_forward": [_pointer] * 6 + _MLP,
    "mlp_backward": [_pointer] * 10 + _MLP,
    "stack_forward": [_pointer, _long] + [_pointer] * 4 + [_long, _int, _long, _int],
    "stack_backward": [_pointer, _long] + [_pointer] * 7 + [_long, _int, _long, _int, _long],
    "norm_forward": [_pointer] * 4 + [_int] + [_long] * 3 + [_int] * 2,
    "norm_sums": [_pointer] * 5 + [_int, _pointer] + [_long] * 3 + [_int] * 2,
    "norm_moments": [_pointer] * 3 + [_long] * 3 + [_int] * 2,
    "norm_backward": [_pointer] * 4 + [_int] + [_long] * 3 + [_int] * 2,
    "pool_forward": [_pointer] * 3 + [_long] * 12 + [_int],
    "pool_backward": [_pointer] * 3 + [_long] * 12 + [_int],
}


class Unavailable(Exception):
    """Why there are no native kernels."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` where they cannot be had; `why_unavailable` tells the reason.

    Looks for ``$CC``, else ``cc``. The result is kept in ``$XDG_CACHE_HOME/sao_prune`` (``~/.cache/sao_prune``) under
    a name that tells source, compiler and instruction set apart. ``SAO_PRUNE_NATIVE=0`` does without.
    """
    global _reason
    try:
        return _built()
    except (Unavailable, OSError, ValueError, subprocess.SubprocessError) as error:
        _reason = str(error)
        _log.info("no native kernels: %s", error)
        return None


_reason: str | None = None


def version() -> str:
    """What tells these kernels from others: source, compiler and instruction set; ``""`` where there are none."""
    loaded = library()
    return "" if loaded is None else Path(loaded._name).stem


def why_unavailable() -> str | None:
    """Why there are no compiled kernels; ``None`` where there are."""
    return None if library() is not None else _reason


def is_switched_off() -> bool:
    """Whether the user wants none."""
    return os.environ.get(SWITCH, "1") == "0"


def _built() -> ctypes.CDLL:
    if is_switched_off():
        raise Unavailable(f"{SWITCH}=0")
    if platform.system() == "Windows":
        raise Unavailable("they are compiled with the options of gcc and clang")
    command = shlex.split(os.environ.get("CC") or "cc")
    if not command or shutil.which(command[0]) is None:
        raise Unavailable(f"no C compiler: {' '.join(command) or 'CC is empty'} is not on the path")
    # What the compiler itself defines for this machine tells its instruction set, on every system.
    version = _run([*command, "--version"]) + _run([*command, *_FLAGS[:2], "-dM", "-E", "-x", "c", os.devnull])
    texts = [(_FOLDER / name).read_text() for name in (*_SOURCES, *_HEADERS)]
    described = "\0".join((*texts, version, platform.machine(), *command, *_FLAGS))
    name = f"kernels-{hashlib.sha256(described.encode()).hexdigest()[:24]}.so"
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="sao_prune-") as scratch:
            return _load(_compile(command, Path(scratch) / name))
    if not (folder / name).is_file():
        # Written elsewhere and moved, so that two processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(command, Path(scratch) / name).replace(folder / name)
    return _load(folder / name)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def cache_folder() -> Path | None:
    """A folder that only this user can write to, as code is loaded from it; ``None`` if there is none."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(root) if root and os.path.isabs(root) else Path.home() / ".cache") / "sao_prune"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if mine and os.access(folder, os.W_OK) else None


def _compile(command: list[str], target: Path) -> Path:
    sources = [str(_FOLDER / name) for name in _SOURCES]
    _run([*command, *_FLAGS, *sources, "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    if done.returncode:
        raise Unavailable(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return loaded
