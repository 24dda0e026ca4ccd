"""The native library: where it is, what it offers, how to build it. Loaded on first use."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

ABI_VERSION = 1
LIBRARY_ENVIRONMENT = "FOCUS_NATIVE_LIBRARY"
NAMES = ("libfocus_kernels.so", "libfocus_kernels.dylib", "focus_kernels.dll")
BUILD = "cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build"
ISA = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "vnni": 4}
STATUS = {1: "bad argument", 2: "out of memory", 3: "the processor lacks the instruction set"}


class NativeMissing(ValueError):
    """The native library is absent or belongs to another release."""


class NativeFailure(ValueError):
    """The native library refused a call."""


def candidates() -> list[Path]:
    """Return the places where the library is looked for, in order."""
    named = os.environ.get(LIBRARY_ENVIRONMENT)
    if named:
        return [Path(named)]
    here = Path(__file__).resolve().parent
    return [folder / name for folder in (here, here.parent / "build") for name in NAMES]


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    for path in candidates():
        if path.is_file():
            try:
                return _bind(ctypes.CDLL(str(path)))
            except (OSError, AttributeError, NativeMissing) as error:
                return f"{path.name} cannot be used: {error}"
    return f"the native library is not built; build it with `{BUILD}`"


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Check the version and declare the C signatures (`csrc/focus_kernels.h`)."""
    library.focus_abi_version.restype = ctypes.c_int
    found = library.focus_abi_version()
    if found != ABI_VERSION:
        raise NativeMissing(f"C interface version {ABI_VERSION} expected, got {found}; rebuild it")
    library.focus_best_isa.restype = ctypes.c_int
    library.focus_codebook_prepare.restype = ctypes.c_void_p
    library.focus_codebook_prepare.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.focus_codebook_free.restype = None
    library.focus_codebook_free.argtypes = [ctypes.c_void_p]
    library.focus_codebook_bytes.restype = ctypes.c_int64
    library.focus_codebook_bytes.argtypes = [ctypes.c_void_p]
    library.focus_codebook_lookup.restype = ctypes.c_int
    library.focus_codebook_lookup.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    return library


def missing() -> str | None:
    """Return why the library cannot be used, or None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        NativeMissing: it is not built, not loadable, or of another version.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise NativeMissing(loaded)
    return loaded


def forget() -> None:
    """Look for the library again at the next use."""
    _load.cache_clear()


def best_isa() -> str:
    """Return the name of the fastest instruction set that the library uses on this machine."""
    found = int(library().focus_best_isa())
    return next(name for name, value in ISA.items() if value == found)
