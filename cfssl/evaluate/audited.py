"""What an audit looks at: real images, their counterfactuals, and what frozen networks see in either."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cfssl.data.table import Attributes, ImageTable
from cfssl.evaluate.minimality import Gaussians
from cfssl.evaluate.settings import AuditSettings
from cfssl.generators.base import Generator, counterfactual
from cfssl.measure.embedding import Embedding
from cfssl.measure.predictor import AttributePredictor
from cfssl.measure.segmentor import Segmentor
from cfssl.seeds import torch_generator

BATCH = 100


@dataclass(frozen=True)
class Audited:
    """What is audited: images (N, C, H, W) in [-1, 1], their attributes (N,) each, and by the name of the
    do() what every image is set to, (N,) each; on the CPU, the generator on `device`."""

    generator: Generator
    table: ImageTable
    rows: np.ndarray
    x: torch.Tensor
    pa: Attributes
    do: Mapping[str, Attributes]
    settings: AuditSettings
    device: torch.device

    @property
    def patients(self) -> np.ndarray | None:
        """Groups that are resampled together."""
        group = self.table.group
        return None if group is None else self.table.frame[group].to_numpy()[self.rows]

    def batches(self) -> Iterator[tuple[slice, torch.Tensor, Attributes]]:
        """Places, images and their own attributes, on the device."""
        for start in range(0, len(self.rows), BATCH):
            part = slice(start, min(start + BATCH, len(self.rows)))
            yield part, self.x[part].to(self.device), self.part_of(self.pa, part)

    def part_of(self, values: Attributes, part: slice) -> Attributes:
        return {name: value[part].to(self.device) for name, value in values.items()}


def counterfactuals(audited: Audited, name: str) -> tuple[torch.Tensor, Attributes]:
    """All images and attributes under the do() `name`."""
    generator, images, attributes = audited.generator, [], []
    for part, x, pa in audited.batches():
        do, rng = (
            audited.part_of(audited.do[name], part),
            torch_generator(audited.settings.seed, name, part.start),
        )
        made, pa_cf = counterfactual(generator, x, pa, do, rng)
        images.append(made.cpu())
        attributes.append({name: value.cpu() for name, value in pa_cf.items()})
    return torch.cat(images), {n: torch.cat([pa[n] for pa in attributes]) for n in attributes[0]}


def null_images(audited: Audited) -> torch.Tensor:
    """What the generator makes of every image under its own attributes."""
    made = []
    for _, x, pa in audited.batches():
        made.append(audited.generator.predict(audited.generator.abduct(x, pa), pa).cpu())
    return torch.cat(made)


@torch.no_grad()
def seen_by(judge: AttributePredictor, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Probabilities (N, classes) or values (N,) of every attribute."""
    found: dict[str, list[np.ndarray]] = {}
    device = next(judge.parameters()).device
    for start in range(0, len(images), BATCH):
        outputs = judge(images[start : start + BATCH].to(device))
        for name in judge.settings.attributes:
            is_continuous = judge.attributes[name].kind == "continuous"
            read = judge.value if is_continuous else judge.probabilities
            found.setdefault(name, []).append(read(outputs, name).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@torch.no_grad()
def segmented(segmentor: Segmentor, images: torch.Tensor) -> torch.Tensor:
    """Hard masks (N, S, H, W) float32 of 0 and 1."""
    device = next(segmentor.parameters()).device
    parts = [
        segmentor(images[start : start + BATCH].to(device)).cpu() >= 0.5
        for start in range(0, len(images), BATCH)
    ]
    return torch.cat(parts).float()


@torch.no_grad()
def embedded(embedding: Embedding, images: torch.Tensor) -> Gaussians:
    """The posterior of every image, (N, latents) each."""
    device = next(embedding.parameters()).device
    parts = [embedding(images[i : i + BATCH].to(device)) for i in range(0, len(images), BATCH)]
    mean, log_sigma = (torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True))
    return Gaussians(mean, log_sigma)
