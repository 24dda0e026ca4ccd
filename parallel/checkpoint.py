"""A folder of checkpoints that survives kills, full disks and flipped bytes.

`step-N.tmp/` is written and flushed, renamed to `step-N/`, and only then does `latest` name it.
A manifest holds the SHA-256 of every file and is checked before anything is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from parallel.mesh import Mesh

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another model, run or format."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint whose files differ from its manifest."""


class CheckpointFolder:
    """Checkpoints of one run; the newest `keep` stay (0 keeps all)."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Published steps, newest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def path(self, step: int) -> Path:
        """Folder of one published checkpoint."""
        return self.folder / f"step-{step}"

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith("step-") and path.suffix in (".tmp", ".old"):
                    shutil.rmtree(path, ignore_errors=True)

    def unfinished(self, step: int) -> Path:
        """Folder that step N is written into before it has its name."""
        return self.folder / f"step-{step}.tmp"

    def begin(self, step: int, mesh: Mesh | None = None) -> Path:
        """Make an empty folder for step N and return it; every process of `mesh` calls it."""
        unfinished = self.unfinished(step)

        def make() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

        together(mesh, make if mesh is None or mesh.leader else nothing)
        return unfinished

    @contextmanager
    def guarded(self, step: int, mesh: Mesh | None = None) -> Iterator[None]:
        """Remove the unfinished folder on any failure; an `OSError` becomes `CheckpointError`."""
        try:
            yield
        except BaseException as error:
            if mesh is None or mesh.leader:
                shutil.rmtree(self.unfinished(step), ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(_reason(step, self.folder, error)) from error
            raise

    def save(self, step: int, write: Callable[[Path], None], mesh: Mesh | None = None) -> Path:
        """Publish what `write(folder)` writes as step N; every process of `mesh` calls it.

        On any failure the unfinished folder is removed, earlier checkpoints stay as they are, and
        an `OSError` becomes one `CheckpointError` (a full disk says so) on every process.
        """
        leader = mesh is None or mesh.leader
        with self.guarded(step, mesh):
            unfinished = self.begin(step, mesh)
            together(mesh, lambda: write(unfinished))
            together(mesh, (lambda: self.publish(step, unfinished)) if leader else nothing)
        return self.path(step)

    def publish(self, step: int, unfinished: Path) -> None:
        """Give a completely written folder its name, point `latest` at it, drop the oldest."""
        write_manifest(unfinished)
        final = self.path(step)
        retired = self.folder / f"step-{step}.old"
        if final.exists():
            shutil.rmtree(retired, ignore_errors=True)
            final.rename(retired)
        unfinished.rename(final)
        _flush(self.folder)
        replace_text(self.folder / "latest", final.name + "\n")
        shutil.rmtree(retired, ignore_errors=True)
        if self.keep:
            for old in self.steps()[self.keep :]:
                if old != step:
                    shutil.rmtree(self.path(old), ignore_errors=True)

    def load(
        self, read: Callable[[Path], T], say: Callable[[str], None], mesh: Mesh | None = None
    ) -> tuple[int, T] | None:
        """Return (step, `read(folder)`) of the newest sound checkpoint, or None when there is none.

        A damaged one is named through `say` and the one before it is taken. Raises
        `CheckpointCorrupt` when checkpoints exist and none is sound. The leader of `mesh` decides.
        """
        found: tuple[int | None, str] = (None, "")
        if mesh is None or mesh.leader:
            found = self._sound(say)
        if mesh is not None:
            found = mesh.share(found)
        step, problem = found
        if problem:
            raise CheckpointCorrupt(problem)
        return None if step is None else (step, read(self.path(step)))

    def _sound(self, say: Callable[[str], None]) -> tuple[int | None, str]:
        """Return the step of the newest sound checkpoint, or why there is none."""
        problems = []
        for step in self._order():
            try:
                verify_manifest(self.path(step))
            except CheckpointCorrupt as error:
                problems.append(str(error))
                say(f"{error}; trying the checkpoint before it")
                continue
            return step, ""
        if not problems:
            return None, ""
        return None, (
            f"none of the {len(problems)} checkpoints in {self.folder} is sound: "
            f"{'; '.join(problems)}; restore one or start in another folder"
        )

    def _order(self) -> list[int]:
        steps = self.steps()
        pointer = self.folder / "latest"
        named = _NAME.fullmatch(pointer.read_text().strip()) if pointer.is_file() else None
        first = int(named[1]) if named and int(named[1]) in steps else None
        if first is None:
            return steps
        return [first] + [s for s in steps if s < first] + [s for s in steps if s > first]


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A state that can be written: `write` touches files alone, so any thread may call it.

    `finish` follows on the main thread of every process, once all have written; it may talk to
    other processes.
    """

    write: Callable[[], None] = nothing
    finish: Callable[[], None] = nothing


def together(mesh: Mesh | None, work: Callable[[], None]) -> None:
    """Do `work` on every process; raise on all when it failed on one."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        if mesh is None or mesh.size == 1:
            raise
        failure = error
    if mesh is not None and mesh.any(failure is not None):
        if failure is not None:
            raise failure
        raise CheckpointError("another process could not save its share; see its log")


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file of `folder` and flush all of it to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    sums = {p.relative_to(folder).as_posix(): _sha256(p) for p in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
    for path in [*files, folder / MANIFEST]:
        _flush(path)
    for path in sorted({p.parent for p in files} | {folder}):
        _flush(path)


def verify_manifest(folder: Path) -> None:
    """Raise `CheckpointCorrupt` naming the first file that differs from the manifest."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
        items = [(str(name), str(digest)) for name, digest in sums.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{folder / MANIFEST} is not readable ({error})") from error
    for name, digest in items:
        path = folder / name
        if not path.is_file():
            raise CheckpointCorrupt(f"{path}, named in {MANIFEST}, is missing")
        if _sha256(path) != digest:
            raise CheckpointCorrupt(f"{path} differs from its SHA-256 in {MANIFEST}")


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(step: int, folder: Path, error: OSError) -> str:
    kept = "earlier checkpoints are untouched"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room to save step {step} in {folder} ({error.strerror}); free space; {kept}"
    return f"could not save step {step} in {folder}: {error}; {kept}"
