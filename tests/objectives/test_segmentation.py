"""Training on silver labels: the loss is its formula, and what is outside of the image says nothing."""

from dataclasses import replace

import pytest
import torch
from dense_toys import CROPS, SIZE, scene

from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings
from cfssl.objectives import comparison, create_objective, labelling_masks, takes_views
from cfssl.objectives.segmentation import Segmentation, SegmentationSettings, mask_loss
from cfssl.seeds import torch_generator

SETTINGS = SegmentationSettings(
    structures=("left", "right"), decoder=DecoderSettings(widths=(16, 8, 8, 8, 8), stride=2)
)


def objective() -> Segmentation:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, SIZE, 0)
    found = create_objective(SETTINGS, encoder, 0, images=100, steps=10, channels=1)
    assert isinstance(found, Segmentation)
    return found


def test_the_loss_is_dice_plus_binary_cross_entropy_of_every_structure() -> None:
    generator = torch_generator("masks")
    logits = 2 * torch.randn(3, 2, 5, 6, generator=generator).double()
    true = (torch.rand(3, 2, 5, 6, generator=generator) > 0.6).double()
    true[0, 1] = 0
    found = mask_loss(logits, true, torch.ones(3, 1, 5, 6, dtype=torch.bool))
    losses = []
    for structure in range(2):
        p, y = logits[:, structure].sigmoid(), true[:, structure]
        overlap, sizes = (p * y).sum((1, 2)), p.sum((1, 2)) + y.sum((1, 2))
        entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        losses.append((1 - (2 * overlap + 1) / (sizes + 1)).mean() + entropy)
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


def test_what_is_outside_of_the_image_changes_nothing() -> None:
    generator = torch_generator("outside")
    logits, other = torch.randn(2, 2, 2, 8, 8, generator=generator)
    true = torch.rand(2, 2, 8, 8, generator=generator) > 0.5
    valid = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    valid[:, :, :3] = False
    mixed = torch.where(valid, logits, other)
    flipped = torch.where(valid, true, ~true)
    assert torch.equal(mask_loss(logits, true.float(), valid), mask_loss(mixed, flipped.float(), valid))
    assert mask_loss(-logits, true.float(), valid) != mask_loss(logits, true.float(), valid)


def test_it_learns_the_masks_of_its_views() -> None:
    network, batch = objective(), scene(8, 2, CROPS)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    dices = []
    for step in range(25):
        found = network(batch, step)
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        dices.append(found["dice"].item())
    assert dices[-1] > max(0.7, dices[0] + 0.2)


def test_what_it_takes() -> None:
    assert labelling_masks(SETTINGS) == ("left", "right")
    assert takes_views(SETTINGS) == (1, None)
    assert comparison(SETTINGS) is None
    assert objective()(replace(scene(3, 1, CROPS)), 0)["loss"].isfinite()
