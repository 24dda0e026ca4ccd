"""Where weights lie on disk, so that graphs refer to them instead of carrying copies.

A bundle keeps the model's weights once, as safetensors. An initializer of an ONNX graph that equals
one of them, as it is or transposed, becomes a reference (file, offset, length) into that file; all
parts and the eager model share it, and the file may be mapped into memory. What a graph needs
besides goes to `<part>.data`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

INLINE = 1024  # bytes up to which a constant stays inside the graph
ALIGNMENT = 4096
DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    file: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def reference(self, folder: Path) -> ir.ExternalTensor:
        """Return it as an external tensor of a graph in the same folder."""
        return ir.ExternalTensor(
            self.file,
            self.offset,
            self.length,
            self.dtype,
            shape=ir.Shape(self.shape),
            name=self.name,
            base_dir=folder,
        )


def read_shelf(files: list[Path]) -> dict[str, Stored]:
    """Return every floating tensor of safetensors files by name, without reading values."""
    found: dict[str, Stored] = {}
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in DTYPES:
                continue
            begin, end = entry["data_offsets"]
            found[name] = Stored(
                name=name,
                file=path.name,
                offset=8 + size + begin,
                length=end - begin,
                dtype=DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
            )
    return found


class References:
    """Replaces the initializers of one graph by references into a shelf.

    names: the shelf's name of each of the module's tensors. tensors: their values as exported.
    """

    def __init__(
        self,
        folder: Path,
        shelf: Mapping[str, Stored],
        names: Mapping[str, str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.folder = folder
        self._stored: dict[str, tuple[Stored, Tensor]] = {}
        self._transposed: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
        for own, tensor in tensors.items():
            stored = shelf.get(names.get(own, ""))
            if stored is None or DTYPE_OF.get(tensor.dtype) != stored.dtype:
                continue
            self._stored[own] = (stored, tensor)
            if tensor.dim() == 2:
                self._transposed.setdefault(_sample(tensor.t()), []).append(own)

    def find(self, name: str, value: Tensor) -> tuple[Stored, bool] | None:
        """Return what holds a value, and whether it holds it transposed."""
        if name in self._stored:
            stored, tensor = self._stored[name]
            if tensor.shape == value.shape and torch.equal(tensor, value):
                return stored, False
        if value.dim() != 2:
            return None
        for own in self._transposed.get(_sample(value), ()):
            stored, tensor = self._stored[own]
            if torch.equal(tensor.t(), value):
                return stored, True
        return None

    def apply(self, model: ir.Model, part: str) -> list[str]:
        """Rewrite a graph's initializers; return the files it refers to."""
        graph, files, rest = model.graph, set(), {}
        for name, value in list(graph.initializers.items()):
            constant = value.const_value
            if constant is None or constant.nbytes <= INLINE:
                continue
            numbers = torch.from_numpy(np.array(constant.numpy()))
            found = self.find(name, numbers) if constant.dtype in DTYPES.values() else None
            if found is None:
                rest[name] = value
                continue
            stored, transposed = found
            files.add(stored.file)
            if transposed:
                _insert_transpose(graph, value, stored, self.folder)
            else:
                value.const_value = stored.reference(self.folder)
        if rest:
            files.add(_write_rest(self.folder, f"{part}.data", rest))
        return sorted(files)


DTYPE_OF = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


def _sample(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    """Shape and a few values: what two equal matrices certainly share."""
    rows = tensor.detach()[:2, :8].float().contiguous()
    return tuple(tensor.shape), rows.numpy().tobytes()


def _insert_transpose(graph: ir.Graph, value: ir.Value, stored: Stored, folder: Path) -> None:
    """Feed the users of `value` from a Transpose of the stored matrix."""
    source = graph.initializers.get(stored.name)
    if source is None:
        source = ir.Value(
            name=stored.name,
            shape=ir.Shape(stored.shape),
            type=ir.TensorType(stored.dtype),
            const_value=stored.reference(folder),
        )
        graph.initializers[stored.name] = source
    node = ir.node("Transpose", [source], {"perm": [1, 0]})
    turned = node.outputs[0]
    turned.shape, turned.type = value.shape, value.type
    name = value.name
    assert name is not None
    graph.initializers.pop(name)
    turned.name = name
    for user, index in tuple(value.uses()):
        user.replace_input_with(index, turned)
    graph.insert_before(graph[0], node)


def _write_rest(folder: Path, file: str, values: Mapping[str, ir.Value]) -> str:
    """Write constants that no weight file holds, aligned for mapping."""
    with (folder / file).open("wb") as out:
        for name, value in values.items():
            constant = value.const_value
            assert constant is not None
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
            offset, data = out.tell(), constant.tobytes()
            out.write(data)
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                len(data),
                constant.dtype,
                shape=ir.Shape([int(axis) for axis in constant.shape.numpy()]),
                name=name,
                base_dir=folder,
            )
    return file


def constants_of(model: ir.Model) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of every initializer."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value.nbytes
