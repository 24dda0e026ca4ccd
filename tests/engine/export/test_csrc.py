"""The optional C++ parts: what is absent is named and skipped; what is there is built and right."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]

cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def configure(folder: Path, *options: str) -> str:
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cmake
def test_absent_libraries_are_named_and_skipped(tmp_path: Path) -> None:
    nowhere = "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"
    printed = configure(tmp_path, *nowhere, "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY")
    assert "ONNX Runtime headers: not found; its operator library is skipped" in printed
    assert "NvInfer.h, libnvinfer" in printed
    assert "focus_runner is skipped" in printed
    targets = (tmp_path / "CMakeCache.txt").read_text()
    assert "focus_kernels" in targets


@cmake
def test_found_headers_are_named(tmp_path: Path) -> None:
    """A folder with the header is enough to plan the library; nothing is compiled here."""
    headers = tmp_path / "onnxruntime" / "include"
    headers.mkdir(parents=True)
    (headers / "onnxruntime_c_api.h").write_text("#error only for configuring\n")
    printed = configure(tmp_path / "build", f"-DONNXRUNTIME_ROOT={headers.parent}")
    assert f"ONNX Runtime headers: {headers}; libfocus_onnxruntime is built" in printed


def test_the_operator_library_is_the_native_search() -> None:
    """Runs where somebody has built it: `cmake -S . -B build -DONNXRUNTIME_ROOT=...`."""
    library = ROOT / "build" / "libfocus_onnxruntime.so"
    if not library.is_file():
        pytest.skip("build/libfocus_onnxruntime.so is not built: no ONNX Runtime headers here")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    x, codes = (rng.standard_normal(s, dtype=np.float32) for s in ((2, 5, 8), (64, 8)))
    helper, kinds = onnx.helper, onnx.TensorProto
    node = helper.make_node("focus_codebook_lookup", ["x", "c"], ["d", "i"], domain="focus")
    graph = helper.make_graph(
        [node],
        "lookup",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["a", "b", 8])],
        [
            helper.make_tensor_value_info("d", kinds.FLOAT, ["a", "b"]),
            helper.make_tensor_value_info("i", kinds.INT64, ["a", "b"]),
        ],
        [onnx.numpy_helper.from_array(codes, "c")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("focus", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = runtime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = runtime.InferenceSession(model.SerializeToString(), options)
    distance, index = session.run(None, {"x": x})
    expected = ((x[:, :, None] - codes) ** 2).sum(-1)
    assert np.array_equal(index, expected.argmin(-1))
    np.testing.assert_allclose(distance, expected.min(-1), rtol=1e-5)
