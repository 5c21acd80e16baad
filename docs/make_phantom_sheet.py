"""Draws docs/images/phantom_chest.png: patients by scanners (true counterfactuals), then masks and the
disease switched off and on.

Run from the repository: python docs/make_phantom_sheet.py
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from cfssl.data.phantoms.chest import SCANNERS, ChestWorld, Rendered, render, sample
from cfssl.seeds import torch_generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATIENTS = 5
COLOURS = np.array(
    [[0.3, 0.6, 1.0], [0.3, 1.0, 0.6], [1.0, 0.4, 0.4], [1.0, 0.9, 0.2]]
)  # masks, in their order


def overlay(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(H, W, 3): the image with its masks (4, H, W) painted over it at a third of their strength."""
    painted = np.repeat(image[..., None] / 255, 3, axis=2)
    for mask, colour in zip(masks, COLOURS, strict=True):
        painted = np.where(mask[..., None] == 1, 0.67 * painted + 0.33 * colour, painted)
    return painted


def main() -> None:
    world = ChestWorld(size=128)
    parents, u = sample(world, PATIENTS, torch_generator("sheet", 2))

    def do(**values: int) -> Rendered:
        fixed = {name: torch.full((PATIENTS,), value) for name, value in values.items()}
        return render(world, parents | fixed, u)

    columns = [
        (f"do(scanner={name})", do(scanner=code, disease=0).images[:, 0])
        for code, name in enumerate(SCANNERS)
    ]
    sick = do(scanner=0, disease=1)
    columns.append(("A, do(disease=yes)", sick.images[:, 0]))
    columns.append(
        ("its masks", np.stack([overlay(*pair) for pair in zip(sick.images[:, 0], sick.masks, strict=True)]))
    )
    figure, axes = plt.subplots(
        PATIENTS, len(columns), figsize=(1.6 * len(columns), 1.6 * PATIENTS), layout="constrained"
    )
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for row in range(PATIENTS):
            axes[row, column].imshow(pictures[row], cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_axis_off()
    path = Path(__file__).parent / "images" / "phantom_chest.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
