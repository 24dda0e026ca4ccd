"""TensorRT plans: caller-owned buffers, one block of activation memory for all parts.

Not run here: needs TensorRT and an NVIDIA GPU. Parts of one runtime run one after the other, so
they share one block as large as the hungriest of them needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.errors import BackendUnavailable, BundleError
from engine.serve.backends.base import Executable


class SharedMemory:
    """One block of device memory that grows to the largest demand."""

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> Tensor:
        """Return a block of at least `num_bytes`; contexts are told its address at every run."""
        if self.block.numel() < num_bytes or self.block.device.type != "cuda":
            self.block = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        return self.block


class TensorRTExecutable:
    """One plan with its execution context, on a stream of its own."""

    def __init__(self, engine: Any, part: BundlePart, memory: SharedMemory) -> None:
        from engine.export.tensorrt import library

        trt = library()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = engine.create_execution_context(strategy)
        self.engine, self.part, self.memory = engine, part, memory
        stream: Any = torch.cuda.Stream
        self.stream = stream()

    def __call__(
        self, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run the part; see `Executable`. Outputs that nobody owns are allocated."""
        held = {name: value.to("cuda").contiguous() for name, value in inputs.items()}
        for name, value in held.items():
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr())
        found = {}
        for spec in self.part.outputs:
            shape = tuple(self.context.get_tensor_shape(spec.name))
            target = into.get(spec.name)
            if target is None or target.device.type != "cuda":
                target = torch.empty(shape, dtype=spec.dtype, device="cuda")
            self.context.set_tensor_address(spec.name, target.data_ptr())
            found[spec.name] = target
        needed = int(self.engine.device_memory_size_v2)
        block = self.memory.reserve(needed)
        self.context.set_device_memory(block.data_ptr(), block.numel())
        self.stream.wait_stream(torch.cuda.current_stream())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise BundleError(f"{self.part.name}: TensorRT could not run the plan; see its log")
        torch.cuda.current_stream().wait_stream(self.stream)
        return {
            name: into[name].copy_(value) if name in into and into[name] is not value else value
            for name, value in found.items()
        }


class TensorRTBackend:
    """Needs TensorRT, an NVIDIA GPU and a bundle with plans built on such a GPU."""

    name = "tensorrt"

    def __init__(self) -> None:
        self.memory = SharedMemory()

    def reasons(self, bundle: Bundle) -> list[str]:
        """Return why not: no library, no GPU, no plans."""
        from engine.export import tensorrt

        found = []
        try:
            tensorrt.library()
        except BackendUnavailable as error:
            found.append(str(error))
        if not torch.cuda.is_available():
            found.append("no GPU was found")
        lacking = [name for name, part in bundle.parts.items() if "tensorrt" not in part.files]
        if lacking:
            found.append(f"no plan for {lacking[0]} (focus export --backends onnx,tensorrt)")
        return found

    def open(self, bundle: Bundle, part: BundlePart) -> Executable:
        """Read a plan."""
        from engine.export import plugins
        from engine.export.tensorrt import library

        trt = library()
        plugins.ensure(trt)  # those in Python run here; those ahead of time lie in the plan
        path = bundle.file(part.name, "tensorrt")
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BundleError(f"{path}: a plan of this TensorRT and GPU expected; export it here")
        return TensorRTExecutable(engine, part, self.memory)


BACKEND = TensorRTBackend()
