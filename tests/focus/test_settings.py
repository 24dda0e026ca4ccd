"""generation_config.json: what is written is what is read, and what is wrong is said."""

from pathlib import Path

import pytest

from focus import settings
from focus.errors import CheckpointMismatch
from focus.sampling import Sampling
from focus.segment.refine import Refinement
from focus.settings import Settings


def test_settings_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert settings.read(tmp_path) == Settings()
    told = Settings(
        words=12,
        generation=Sampling(temperature=(1.0, 0.3), top_k=(64, None), guidance=1.5),
        editing=Sampling(temperature=0.0),
        keep_tokens=True,
        refinement=Refinement(rounds=2),
    )
    (tmp_path / settings.FILE).write_text(settings.write(told))
    assert settings.read(tmp_path) == told


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"word": 3}',
        '{"generation": {"temperature": [1.0, -1.0]}}',
        '{"refinement": {"rounds": 0}}',
        "[]",
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / settings.FILE).write_text(text)
    with pytest.raises(CheckpointMismatch, match=settings.FILE):
        settings.read(tmp_path)
