"""The native library, built once for the tests where a compiler is there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kernels import dispatch, native
from tests.kernels.native_build import built


@pytest.fixture(scope="session")
def native_library() -> Iterator[None]:
    """Use a library of the sources as they are now, whatever else lies about."""
    before = os.environ.get(native.LIBRARY_ENVIRONMENT)
    folder = built("focus_kernels", "-DCMAKE_BUILD_TYPE=Release")
    os.environ[native.LIBRARY_ENVIRONMENT] = str(folder / native.NAMES[0])
    native.forget()
    dispatch.forget()
    assert native.missing() is None
    yield
    if before is None:
        del os.environ[native.LIBRARY_ENVIRONMENT]
    else:
        os.environ[native.LIBRARY_ENVIRONMENT] = before
    native.forget()
    dispatch.forget()
