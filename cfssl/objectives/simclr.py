"""SimCLR (Chen et al. 2020), and with counterfactual views CF-SimCLR and SimCLR+ (Roschewitz et al. 2024,
2025).

For the 2N embeddings z of N items with two views each, with s_ij the cosine similarity of z_i and z_j and tau
the temperature,

    l_i = -log( exp(s_{i,pos(i)} / tau) / sum_{j != i} exp(s_ij / tau) ),      loss = mean_i l_i .

With `false_negatives` the sum leaves out the views of other items that share the value of that column (e.g.
the patient) with item i: they may look alike, and should not be pushed apart.

Nothing here knows whether a view is counterfactual: the pairs are made by the view plan. The published code
never passes its configured temperature to the loss; here it is passed, and a test shows that it acts.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.models.backbone import feature_size
from cfssl.models.heads import simclr_head
from cfssl.settings import STRICT, Count, Positive


@dataclass(frozen=True, config=STRICT)
class SimCLRSettings:
    """`temperature` is tau; `hidden` and `output` are the widths of the projection head. `false_negatives`: a
    discrete attribute or the group column; images that share its value are no negatives of each other, and
    images where it is missing share it with nobody.

    `batch_norm`: normalise behind both of its layers, as SimCLR's own code does; the head of the
    counterfactual papers has none.
    """

    name: Literal["simclr"] = "simclr"
    temperature: Positive = 0.1
    hidden: Count = 512
    output: Count = 128
    batch_norm: bool = True
    false_negatives: str | None = None


class SimCLR(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss", "alignment"}; `student` is what
    gets exported."""

    views = 2

    def __init__(self, encoder: nn.Module, settings: SimCLRSettings, seed: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss

        self.student = encoder
        self.head = simclr_head(
            feature_size(encoder), settings.hidden, settings.output, settings.batch_norm, seed
        )
        self.temperature, self.false_negatives = settings.temperature, settings.false_negatives
        self.loss = NTXentLoss(temperature=settings.temperature, gather_distributed=True)

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (2B, C, H, W)
        z = self.head(self.student(images)).unflatten(0, (-1, 2))  # (B, 2, output)
        # bf16 moves this loss by about a percent; it stays in float32.
        with torch.autocast(z.device.type, enabled=False):
            first, second = z.float().unbind(1)
            if self.false_negatives is None:
                loss = self.loss(first, second)
            else:
                codes = batch.attributes[self.false_negatives]
                loss = masked_nt_xent(first, second, codes, self.temperature)
            alignment = nn.functional.cosine_similarity(first.detach(), second.detach()).mean()
        return {"loss": loss, "alignment": alignment}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


def masked_nt_xent(
    first: torch.Tensor, second: torch.Tensor, codes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """NT-Xent of the views (n, d) each of n items, with the items of all processes as negatives except those
    whose code (n,) is the same; -1 is the same as nothing."""
    from lightly.utils import dist

    own = nn.functional.normalize(torch.cat([first, second]), dim=1)  # (2n, d)
    z, others = own, codes
    if dist.world_size() > 1:
        # Gathered with their gradients, first views before second ones, as they are here.
        z = torch.cat([torch.cat(dist.gather(views)) for views in own.chunk(2)])
        others = torch.cat(dist.gather(codes))
    similarity = own @ z.T / temperature  # (2n, 2m) with the m items of all processes
    places = torch.arange(len(codes), device=codes.device) + dist.rank() * len(codes)
    itself, positive = torch.cat([places, places + len(others)]), torch.cat([places + len(others), places])
    left_out = ((codes[:, None] == others) & (codes[:, None] >= 0)).repeat(2, 2)
    left_out.scatter_(1, itself[:, None], True).scatter_(1, positive[:, None], False)
    return nn.functional.cross_entropy(similarity.masked_fill(left_out, -torch.inf), positive)
