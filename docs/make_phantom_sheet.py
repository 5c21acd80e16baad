"""Draws docs/images/phantom_chest.png and phantom_tube.png: patients by interventions (true counterfactuals),
then their masks.

Run from the repository: python docs/make_phantom_sheet.py
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from cfssl.data.phantoms.chest import SCANNERS, ChestWorld
from cfssl.data.phantoms.tube import KERNELS, TubeWorld
from cfssl.data.phantoms.world import Rendering, World
from cfssl.seeds import torch_generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATIENTS = 5
CHEST_COLOURS = ((0.3, 0.6, 1.0), (0.3, 1.0, 0.6), (1.0, 0.4, 0.4), (1.0, 0.9, 0.2))  # one per mask
TUBE_COLOURS = ((1.0, 0.3, 0.3), (1.0, 0.9, 0.2))  # lumen and plaque


class Patients:
    """The same patients under interventions, each given as a number for all."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.parents, self.u = world.sample(PATIENTS, torch_generator("sheet", 2), "train")

    def do(self, **values: float) -> Rendering:
        fixed = {name: torch.full((PATIENTS,), value) for name, value in values.items()}
        return self.world.render(self.parents | fixed, self.u)


def overlay(rendered: Rendering, colours: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, H, W, 3): the images with their first masks painted over them at a third of their strength."""
    painted = np.repeat(rendered.images[:, 0, :, :, None] / 255, 3, axis=3)
    for channel, colour in enumerate(colours):
        mask = rendered.masks[:, channel, :, :, None]
        painted = np.where(mask == 1, 0.67 * painted + 0.33 * np.array(colour), painted)
    return painted


def save_sheet(name: str, columns: Mapping[str, np.ndarray]) -> None:
    """Titles to pictures (n, H, W) or (n, H, W, 3), a column each."""
    figure, axes = plt.subplots(
        PATIENTS, len(columns), figsize=(1.6 * len(columns), 1.6 * PATIENTS), layout="constrained"
    )
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row in range(PATIENTS):
            axes[row, column].imshow(pictures[row], cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_axis_off()
    path = Path(__file__).parent / "images" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


def main() -> None:
    chest = Patients(ChestWorld(size=128))
    sick = chest.do(scanner=0, disease=1)
    save_sheet(
        "phantom_chest",
        {
            f"do(scanner={name})": chest.do(scanner=code, disease=0).images[:, 0]
            for code, name in enumerate(SCANNERS)
        }
        | {"A, do(disease=yes)": sick.images[:, 0], "its masks": overlay(sick, CHEST_COLOURS)},
    )
    tube = Patients(TubeWorld())
    full = tube.do(kernel=0, plaque_middle=0.9)
    save_sheet(
        "phantom_tube",
        {f"do(kernel={name})": tube.do(kernel=code).images[:, 0] for code, name in enumerate(KERNELS)}
        | {
            "soft, do(calibre_middle=0.7)": tube.do(kernel=0, calibre_middle=0.7).images[:, 0],
            "soft, do(plaque_middle=0)": tube.do(kernel=0, plaque_middle=0.0).images[:, 0],
            "soft, do(plaque_middle=0.9)": full.images[:, 0],
            "its masks": overlay(full, TUBE_COLOURS),
        },
    )


if __name__ == "__main__":
    main()
