"""Parents as one vector, to condition a mechanism of an attribute or of the image, and a network on it."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cfssl.data.table import Attribute, Attributes
from cfssl.seeds import torch_generator


class ParentEncoder(nn.Module):
    """Attributes -> context (B, `width`) float32: one-hot categories, -1/1, standardised reals.

    Means and standard deviations are buffers, set by `fit` from the training rows, so they travel with the
    weights. Needs a parent.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, names: Sequence[str], attributes: Mapping[str, Attribute]) -> None:
        super().__init__()
        self.attributes = [attributes[name] for name in names]
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("std", torch.ones(len(names)))
        self.width = sum(len(a.categories) if a.kind == "categorical" else 1 for a in self.attributes)

    def fit(self, values: Attributes) -> None:
        """Sets the standardisation of the continuous parents from `values`, (N,) each."""
        for index, attribute in enumerate(self.attributes):
            if attribute.kind == "continuous":
                column = values[attribute.name].double()
                self.mean[index] = column.mean()
                self.std[index] = column.std(correction=0).clamp_min(1e-6)

    def forward(self, values: Attributes) -> Tensor:
        columns = []
        for index, attribute in enumerate(self.attributes):
            column = values[attribute.name]
            if attribute.kind == "categorical":
                columns.append(nn.functional.one_hot(column, len(attribute.categories)).float())
            elif attribute.kind == "binary":
                columns.append(column.float()[:, None] * 2 - 1)
            else:
                columns.append(((column.float() - self.mean[index]) / self.std[index])[:, None])
        return torch.cat(columns, dim=1)


class ConditionalNetwork(nn.Module):
    """Parents -> parameters (B, outputs) float64, from float32 weights. Without parents they are constants.

    The last layer starts at zero: equal logits, identity flows.
    """

    def __init__(self, parents: Sequence[Attribute], hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        attributes = {attribute.name: attribute for attribute in parents}
        self.encoder = ParentEncoder(list(attributes), attributes) if parents else None
        widths = [self.encoder.width, *hidden, outputs] if self.encoder else [1, outputs]
        self.weights = nn.ParameterList(torch.empty(after, before) for before, after in pairwise(widths))
        self.biases = nn.ParameterList(torch.empty(after) for after in widths[1:])
        self._initialise(torch_generator("mechanism"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.biases[0].device

    def fit(self, parents: Attributes, rng: torch.Generator) -> None:
        """Standardises the parents and draws the weights anew."""
        if self.encoder:
            self.encoder.fit(parents)
        self._initialise(rng)

    def forward(self, parents: Attributes, count: int) -> Tensor:
        if self.encoder:
            x = self.encoder(parents).double()
        else:
            x = torch.ones(count, 1, dtype=torch.float64, device=self.device)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(nn.functional.gelu(x) if layer else x, weight.double(), bias.double())
        return x

    def _initialise(self, rng: torch.Generator) -> None:
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=rng)
                nn.init.zeros_(bias)
            nn.init.zeros_(self.weights[-1])
