"""docs/tour.ipynb runs from top to bottom with the shipped model."""

from __future__ import annotations

import io
import json
import os
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"


def test_tour_is_stored_without_results() -> None:
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_tour_runs_and_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: no kernel to run in")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,
        startup_timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises at the first cell that fails
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 8
    images = [np.asarray(Image.open(io.BytesIO(b64decode(x))).convert("RGB")) for x in pictures]
    contrast = sorted(image.std() for image in images)
    assert contrast[1] > 5  # something was drawn
    assert contrast[0] > 1  # what is left where the only object was removed: shades
    told = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "IoU" in told
