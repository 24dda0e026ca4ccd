"""Graphs without weights, and models whose weights stay on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engine.commands import load  # noqa: E402
from engine.export.build import export_bundle  # noqa: E402
from engine.export.errors import ExportError  # noqa: E402
from engine.export.graphs import REPORT, WEIGHTS, export_graphs  # noqa: E402
from engine.export.mapped import map_model  # noqa: E402
from engine.export.parts import list_parts  # noqa: E402
from engine.export.untrained import Untrained  # noqa: E402
from engine.export.verify import verify  # noqa: E402
from focus.errors import CheckpointMismatch  # noqa: E402
from tests.engine.serve.small import small_config  # noqa: E402

PART = "codes_condition"  # the quickest to export


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "m"
    Untrained(small_config()).save_pretrained(folder)
    return folder


def test_a_graph_without_weights_becomes_the_part_once_they_are_there(
    untrained: Path, tmp_path: Path
) -> None:
    config = small_config()
    (graph,) = export_graphs(config, tmp_path / "g", only=[PART])
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [f"{PART}.onnx", REPORT]
    assert json.loads((tmp_path / "g" / REPORT).read_text())["graphs"][0]["part"] == PART
    path = tmp_path / "g" / f"{PART}.onnx"
    absent = [
        t
        for t in onnx.load(str(path), load_external_data=False).graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    ]
    part = next(p for p in list_parts(map_model(untrained)) if p.name == PART)
    state = {**dict(part.module.named_parameters()), **part.module.state_dict()}
    assert graph.weights == sum(state[t.name].numel() for t in absent) > 1024
    with (tmp_path / "g" / f"{PART}{WEIGHTS}").open("wb") as file:
        for tensor in absent:
            entries = {e.key: e.value for e in tensor.external_data}
            assert file.tell() == int(entries["offset"])
            file.write(state[tensor.name].numpy().tobytes())
    inputs = dict(zip((s.name for s in part.inputs), part.example_inputs(), strict=True))
    session = onnxruntime.InferenceSession(str(path))
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    expected = part.run(inputs)["codes"]
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())


def test_untrained_weights_export_and_verify(tmp_path: Path) -> None:
    out = export_bundle(Untrained(small_config()), tmp_path / "b", only=[PART])
    checks = verify(out)
    assert len(checks) == 3
    assert all(check.passed for check in checks), checks


def test_a_mapped_model_is_the_model(untrained: Path) -> None:
    from focus import Focus

    copied, mapped = Focus.from_pretrained(untrained).model, map_model(untrained)
    expected = copied.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in mapped.state_dict().items())
    assert torch.equal(mapped.front.vanilla.mean, copied.front.vanilla.mean)  # kept in no file
    assert not any(p.requires_grad for p in mapped.parameters())
    assert not any((p == 0).all() for p in mapped.parameters())


def test_a_folder_of_another_config_is_refused(untrained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(untrained, tmp_path / "m"))
    config = json.loads((other / "config.json").read_text())
    config["segment"]["num_queries"] = 7
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="lies beside the weights"):
        map_model(other)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="it holds something else"):
        export_graphs(small_config(), tmp_path)
    with pytest.raises(ExportError, match="parts of vanilla"):
        export_graphs(small_config(), tmp_path / "g", only=["unnet"])
    with pytest.raises(ExportError, match="call save_pretrained first"):
        _ = Untrained(small_config()).model
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    from argparse import Namespace

    from engine.commands.options import UsageError

    given = Namespace(model="focus_9b", out=tmp_path / "g", parts=None, graphs_only=True, json=True)
    with pytest.raises(UsageError, match=r"the name of a config .* expected, got 'focus_9b'"):
        load("export").run(given)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["llm_decode", "unet"])
def test_the_full_model_exports_as_graphs(part: str, tmp_path: Path) -> None:
    """2.8 and 2.6 billion weights, in about a gigabyte of memory and a minute of one core."""
    from focus.presets import focus_3b

    (graph,) = export_graphs(focus_3b(), tmp_path / "g", only=[part])
    assert graph.weights > 2_500_000_000
    assert sum(p.stat().st_size for p in (tmp_path / "g").iterdir()) < 64 << 20
