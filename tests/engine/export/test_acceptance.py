"""A whole bundle: export, verify and edit, as the command line does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engine.cli import main
from engine.data.scenes import sample


@pytest.mark.slow
def test_export_verify_edit_gives_the_eager_mask_and_picture(tmp_path: Path) -> None:
    bundle, source = str(tmp_path / "bundle"), str(tmp_path / "scene.png")
    assert main(["export", "focus-tiny", "--out", bundle]) == 0
    assert main(["verify", bundle]) == 0
    image = sample("editing", "test", 0, 1, (128, 128)).image
    assert image is not None
    Image.fromarray(image).save(source)
    found = {}
    for backend in ("eager", "onnx"):
        out = tmp_path / backend
        arguments = ["--model", bundle, "--backend", backend, "--out", str(out), "--seed", "5"]
        text = "change the background to plain dark grey"
        assert main(["edit", source, text, *arguments]) == 0
        found[backend] = [
            np.asarray(Image.open(out / f"scene.{name}.png").convert("RGB")).astype(float)
            for name in ("mask", "edited")
        ]
    masks = [found[backend][0] > 127 for backend in found]
    assert masks[0].any()
    assert (masks[0] & masks[1]).sum() >= 0.99 * (masks[0] | masks[1]).sum()
    error = ((found["eager"][1] - found["onnx"][1]) ** 2).mean()
    assert error <= 255**2 / 10**4  # 40 dB
