"""Bundles that are not what they say, and a small one that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engine.export.build import export_bundle, write_manifest  # noqa: E402
from engine.export.bundle import MANIFEST, Bundle, describe_part, sha256  # noqa: E402
from engine.export.errors import BackendUnavailable, BundleError, ExportError  # noqa: E402
from engine.export.parts import list_parts  # noqa: E402
from engine.export.untrained import Untrained  # noqa: E402
from engine.export.verify import verify  # noqa: E402
from engine.serve.backends import load  # noqa: E402
from engine.serve.backends.model import assemble  # noqa: E402
from focus import Focus  # noqa: E402
from tests.engine.serve.small import small_config  # noqa: E402

PART = "codes_condition"  # the quickest to export


@pytest.fixture(scope="module")
def model() -> Focus:
    return Focus.from_pretrained("focus-tiny")


@pytest.fixture(scope="module")
def exported(model: Focus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "b", only=[PART], source="x")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "b"))


def change(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def rehash(bundle: Path, name: str) -> None:
    path = bundle / name
    entry = {"sha256": sha256(path), "bytes": path.stat().st_size}
    change(bundle, lambda manifest: manifest["files"].update({name: entry}))


def test_an_exported_part_verifies(exported: Path) -> None:
    checks = verify(exported)
    assert len(checks) == 3
    assert all(check.passed for check in checks), checks


def test_half_precision_stays_within_its_limit(tmp_path: Path) -> None:
    """One of our operators in fp16, body and all, against the same weights in fp32."""
    out = export_bundle(
        Untrained(small_config()), tmp_path / "b", only=["adapter"], precision="fp16"
    )
    checks = verify(out)
    assert [check.limit for check in checks] == [4e-3] * 3
    assert all(1e-6 < check.error <= 4e-3 for check in checks), checks
    graph = onnx.load(str(out / "adapter.onnx"), load_external_data=False)
    assert {value.type.tensor_type.elem_type for value in graph.graph.input} == {10}


def test_weights_are_stored_once(exported: Path) -> None:
    graph = onnx.load(str(exported / f"{PART}.onnx"), load_external_data=False)
    external = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    locations = {e.value for t in external for e in t.external_data if e.key == "location"}
    assert locations == {"model.safetensors"}


def test_a_bundle_is_a_checkpoint(exported: Path, model: Focus) -> None:
    again = Focus.from_pretrained(exported).model.state_dict()
    weights = model.model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 1 expected, got 99"),
        (lambda m: m.update(format="zip"), "manifest of a focus-bundle expected"),
        (lambda m: m.pop("parts"), "a manifest of schema 1 expected"),
        (lambda m: m["files"].pop(f"{PART}.onnx"), "a file of the manifest expected"),
        (lambda m: m["parts"][PART]["inputs"][0].update(dtype="nn"), "manifest of schema 1"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(bundle: Path, edit: Any, message: str) -> None:
    change(bundle, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_changed_missing_and_cut_files_are_refused(bundle: Path) -> None:
    graph = bundle / f"{PART}.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"sha256 \w+ expected, got \w+; the file was changed"):
        Bundle.open(bundle)
    graph.write_bytes(data[:-9])
    with pytest.raises(BundleError, match="bytes expected, got"):
        Bundle.open(bundle)
    graph.unlink()
    with pytest.raises(BundleError, match="there is no such file"):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"a bundle with manifest\.json expected"):
        Bundle.open(bundle / "nowhere")
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="JSON expected"):
        Bundle.open(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    (bundle / "inner.data").symlink_to(outside)
    rehash(bundle, "inner.data")
    with pytest.raises(BundleError, match="a file inside the bundle expected"):
        Bundle.open(bundle)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "config.json"])
def test_external_data_outside_the_bundle_is_never_read(bundle: Path, location: str) -> None:
    path = bundle / f"{PART}.onnx"
    graph = onnx.load(str(path), load_external_data=False)
    tensor = next(
        t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
    )
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
        elif entry.key == "offset" and location == "config.json":
            entry.value = str(1 << 30)
    path.write_bytes(graph.SerializeToString())
    rehash(bundle, path.name)
    runtime = load(bundle, "onnx")
    part = runtime.bundle.part(PART)
    inputs = {
        spec.name: torch.zeros(spec.size({"batch": 1}), dtype=torch.int64) for spec in part.inputs
    }
    with pytest.raises(BundleError, match=r"a file of the manifest expected|lies at bytes"):
        runtime.run(PART, inputs)


def test_shapes_outside_the_profile_and_foreign_parts_are_refused(exported: Path) -> None:
    runtime = load(exported, "onnx")
    specs = runtime.bundle.part(PART).inputs
    many = {s.name: torch.zeros(s.size({"batch": 9}), dtype=torch.int64) for s in specs}
    with pytest.raises(ExportError, match="batch of 1 to 8 expected, got 9"):
        runtime.run(PART, many)
    one = {s.name: torch.zeros(s.size({"batch": 1}), dtype=torch.int64) for s in specs}
    wrong = {**one, "pixel_codes": one["pixel_codes"][..., :-1]}
    with pytest.raises(ExportError, match="outside the profile"):
        runtime.run(PART, wrong)
    with pytest.raises(ExportError, match="pixel_codes is missing"):
        runtime.run(PART, {"semantic_codes": one["semantic_codes"]})
    with pytest.raises(BundleError, match="a part 'unet' expected"):
        runtime.run("unet", {})


def test_refusals_list_their_reasons(exported: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no package for codes_condition"):
        load(exported, "aoti")
    with pytest.raises(BackendUnavailable, match="a backend of eager, onnx"):
        load(exported, "cuda")


def test_a_failed_export_leaves_nothing(model: Focus, tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(model, tmp_path / "b", only=[PART], say=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="it holds something else"):
        export_bundle(model, tmp_path / "notes")
    with pytest.raises(ExportError, match="a precision of fp32"):
        export_bundle(model, tmp_path / "b", precision="int3")
    with pytest.raises(ExportError, match="backends of onnx, aoti, tensorrt expected"):
        export_bundle(model, tmp_path / "b", backends=["coreml"])
    with pytest.raises(ExportError, match="parts of vanilla"):
        export_bundle(model, tmp_path / "b", only=["unnet"])


def test_stand_ins_answer_as_the_model_does(model: Focus, tmp_path: Path) -> None:
    """Every section of the pipeline goes through a part; the parts run eagerly here."""
    folder = tmp_path / "b"
    model.save_pretrained(folder)
    parts = {p.name: describe_part(p, torch.float32, {}) for p in list_parts(model.model)}
    write_manifest(folder, model, parts, backends=[], precision="fp32")
    network = assemble(load(folder, "eager"), model.config)
    other = Focus(network, model.vocabulary, model.settings)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected, got = (m.segment(image, "the red circle") for m in (model, other))
    assert got.text == expected.text
    assert np.array_equal(got.masks[0], expected.masks[0])
