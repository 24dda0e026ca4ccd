"""ONNX Runtime: the parts' graphs on a CPU, or on a GPU where its CUDA provider is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.errors import BundleError
from engine.serve.backends.base import Executable

NUMPY = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.bool: "bool",
}
# Where a graph in memory finds the files it refers to.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxExecutable:
    """One session over a graph; inputs are read and outputs written where they lie."""

    def __init__(self, path: Path, part: BundlePart, graph: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        offered = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider",) if p in offered]
        try:
            self.session: Any = onnxruntime.InferenceSession(
                graph, options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{path}: a graph for ONNX Runtime expected: {reason}") from error
        self.part = part
        self.dtypes = {spec.name: spec.dtype or torch.float32 for spec in part.inputs}

    def __call__(
        self, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run the part; see `Executable`."""
        binding = self.session.io_binding()
        held = {name: value.detach().cpu() for name, value in inputs.items()}
        for name, value in held.items():
            _bind(binding.bind_input, name, value)
        names = [spec.name for spec in self.part.outputs]
        for name in names:
            if name in into:
                _bind(binding.bind_output, name, into[name])
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs(), strict=True))
        return {
            name: into[name] if name in into else torch.from_numpy(value.numpy())
            for name, value in found.items()
        }


def _bind(bind: Any, name: str, value: Tensor) -> None:
    bind(name, "cpu", 0, NUMPY[value.dtype], tuple(value.shape), value.data_ptr())


class OnnxBackend:
    """Needs onnxruntime and a bundle with ONNX graphs in fp32 or fp16."""

    name = "onnx"

    def reasons(self, bundle: Bundle) -> list[str]:
        """Return why not: no library, no graphs, or a precision that it lacks."""
        found = []
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            found.append("onnxruntime is not installed (pip install focus-vl[export])")
        lacking = [name for name, part in bundle.parts.items() if "onnx" not in part.files]
        if lacking:
            found.append(
                f"no ONNX graph for {', '.join(lacking[:4])} (focus export --backends onnx)"
            )
        if bundle.precision == "bf16":
            found.append("ONNX Runtime has no bf16 convolution (export in fp32 or fp16)")
        return found

    def open(self, bundle: Bundle, part: BundlePart) -> Executable:
        """Open a session, after making sure that the graph refers to the bundle's files alone."""
        from engine.export.graph_check import check_external_data
        from engine.serve.backends.onnx_graph import rewrite

        path = bundle.file(part.name, "onnx")
        graph = check_external_data(bundle, path)
        rewrite(graph)
        return OnnxExecutable(path, part, graph.SerializeToString())


BACKEND = OnnxBackend()
