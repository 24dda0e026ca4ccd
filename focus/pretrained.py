"""Models on disk: config.json, safetensors, the vocabulary and the generation defaults.

Large models lie in shards with an index. Models of earlier format versions are migrated as they are
read. Pickles are refused: a checkpoint is data and must not be able to run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from focus.config import FORMAT_VERSION, FocusConfig, from_json, to_json
from focus.errors import CheckpointMismatch, TargetError
from focus.folder import fresh_folder
from focus.migration import migrate_config, migrate_name, version_of
from focus.shards import (
    MAX_SHARD,
    PICKLES,
    ShardWriter,
    Weights,
    is_weights,
    narrow,
    pickle_advice,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ASSETS = Path(__file__).resolve().parents[1] / "assets"  # of a checkout


def find_model(name: str | Path) -> Path:
    """Return the directory that `name` means: a directory, or a model that ships with FOCUS.

    Raises `CheckpointMismatch` when there is none, or when it holds pickles only.
    """
    for path in (Path(name), ASSETS / str(name), *_installed(str(name))):
        if (path / CONFIG).is_file():
            return path
    if Path(name).is_dir():
        pickled = sorted(p.name for p in Path(name).iterdir() if p.suffix in PICKLES)
        advice = f"; {pickle_advice(pickled[0])}" if pickled else ""
        raise CheckpointMismatch(f"{name}: expected {CONFIG} and {WEIGHTS}, found neither{advice}")
    raise CheckpointMismatch(
        f"no model {str(name)!r}: expected a directory with {CONFIG} and {WEIGHTS}, or focus-tiny"
    )


def _installed(name: str) -> list[Path]:
    """Where a wheel puts the shipped models."""
    try:
        import focus_assets  # type: ignore[import-not-found]
    except ImportError:
        return []
    return [Path(root) / name for root in focus_assets.__path__]


def read_config(directory: Path) -> FocusConfig:
    """Read the config of a model directory; raises `CheckpointMismatch`."""
    try:
        return from_json(migrate_config(json.loads((directory / CONFIG).read_text())))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError and wrong JSON among them
        raise CheckpointMismatch(f"{directory / CONFIG}: {error}") from error


RANDOM_FILLS = (  # those of nn.init hide the tensor's own from a mode
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)


class SkipRandom(TorchFunctionMode):
    """Leaves new parameters unfilled: for models that `load_weights` fills whole right after.

    At full scale drawing seven billion numbers takes longer than reading them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run anything but random fills in place."""
        given = kwargs or {}
        if func in RANDOM_FILLS:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def parameters_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Build modules whose parameters have `dtype` from the start (None: as modules want them).

    A large model then never lies in memory at twice its size. Buffers (codebooks, tables of angles)
    stay as they are.
    """

    def cast(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
            return None
        return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)

    if dtype is None:
        yield
        return
    handle = register_module_parameter_registration_hook(cast)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint into `model`; every tensor must be there and fit.

    path: a safetensors file, an index or a model directory. Tensors are read one at a time; each
    is brought to the precision of the model, names of earlier format versions translated. Raises
    `CheckpointMismatch`, before anything is copied.
    """
    weights = Weights.open(path)
    version = _version_beside(weights.path)
    today = {migrate_name(name, version): name for name in weights}
    own = model.state_dict()
    shapes = {name: weights.shape(saved) for name, saved in today.items()}
    _compare(path, {n: tuple(t.shape) for n, t in own.items()}, shapes, _ties(own))
    with torch.no_grad():
        for name, saved in today.items():
            own[name].copy_(weights[saved])


def _version_beside(path: Path) -> int:
    """Format version of the config that lies beside a weight file; today's without one."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return FORMAT_VERSION
    try:
        return version_of(json.loads(config.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{config}: {error}") from error


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for every tensor that shares memory with an earlier one, the earlier one's name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            owner = first.setdefault(tensor.data_ptr(), name)
            if owner != name:
                ties[name] = owner
    return ties


def _compare(
    path: Path, own: dict[str, Any], saved: dict[str, Any], ties: Mapping[str, str]
) -> None:
    missing = sorted(set(own) - set(saved) - {n for n, o in ties.items() if o in saved})
    unknown = sorted(set(saved) - set(own))
    wrong = [f"{n} {saved[n]} for {own[n]}" for n in own if n in saved and saved[n] != own[n]]
    if missing or unknown or wrong:
        raise CheckpointMismatch(
            f"{path} is not of this config: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shapes {wrong[:3]}; use the config.json that lies beside the weights"
        )


def save_model(
    directory: str | Path,
    model: nn.Module,
    config: FocusConfig,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD,
) -> None:
    """Write config and weights (and `extra` text files by name) atomically.

    Everything is written to a temporary directory beside, then renamed; a model that was there
    before is replaced only at the end, other files beside it are kept. `dtype` narrows floating
    parameters, not buffers. Weights of more than `max_shard_bytes` are written as shards with an
    index. Raises `TargetError`, `OSError`.
    """
    directory = check_target(directory)
    with fresh_folder(directory) as temporary:
        carry_over(directory, temporary)
        state = model.state_dict()
        ties = _ties(state)
        buffers = {name for name, _ in model.named_buffers()}
        writer = ShardWriter(temporary, max_bytes=max_shard_bytes)
        for name, tensor in state.items():
            if name not in ties:
                writer.add(name, narrow(tensor.detach(), None if name in buffers else dtype))
        writer.finish()
        (temporary / CONFIG).write_text(json.dumps(to_json(config), indent=2) + "\n")
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def check_target(directory: str | Path) -> Path:
    """Return the real path of a folder that a model may be written to.

    It is new, empty, or holds a model of ours and files, no folders: the files outlive the writing.
    Raises `TargetError` for anything else, so that nobody's work is replaced by a mistyped path.
    """
    directory = Path(directory).resolve()
    if not directory.exists():
        return directory
    if not directory.is_dir():
        raise TargetError(f"{directory}: a folder expected, got a file; give another name")
    names = sorted(path.name for path in directory.iterdir())
    if names and not _is_ours(directory / CONFIG):
        raise TargetError(
            f"{directory}: a new or empty folder, or one with a FOCUS model expected, got "
            f"{names[:3]}; give a folder of the model's own"
        )
    odd = [name for name in names if not (directory / name).is_file()]
    if odd:
        raise TargetError(
            f"{directory}: a model's folder without folders inside expected, got {odd[:3]}; move "
            "them elsewhere or give another folder"
        )
    return directory


def _is_ours(path: Path) -> bool:
    """Whether a config.json is of FOCUS, of any version; other libraries have one as well."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format_version" in values


def carry_over(directory: Path, temporary: Path, *, without: Collection[str] = ()) -> None:
    """Copy the files of a model's folder that are neither its weights nor named in `without`."""
    if directory.is_dir():
        for file in directory.iterdir():
            if not is_weights(file.name) and file.name not in without:
                shutil.copy2(file, temporary / file.name, follow_symlinks=False)
