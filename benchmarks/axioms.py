"""The axioms of counterfactual digits (Morpho-MNIST), for the benchmarks that report them.

What enters: a fitted generator of digits conditioned on thickness, intensity and digit. What leaves: numbers
per image. Distances are mean absolute differences over the 32x32 pixels in grey levels of 0..255; errors of
attributes are in pixels and grey levels, against the counterfactual values, which are exact: the recorded
values are those of the known causal model, so its mechanism stands in for the fitted one.

Definitions as in Melistas et al. 2024 (composition, effectiveness, the interventions' values) and Monteiro
et al. 2023 (reversibility: values from the training marginal). Done otherwise: predictors see the image
alone and have no batch statistics; images are clamped to the range that images have, unless `Way` says so.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from arms import finished, in_batches, plain
from torch import Tensor

from cfssl.data.morphomnist import abduct_intensity_noise, intensity_given_thickness, prepare_morphomnist
from cfssl.data.pixels import to_signed
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attributes, ImageTable
from cfssl.evaluate.counterfactual import composition, reversibility
from cfssl.evaluate.minimality import bin_edges, changed_values, value_bins
from cfssl.evaluate.morphology import Calibration, calibrate, intensity, thickness
from cfssl.generators.base import Exogenous
from cfssl.generators.hvae import HVAEGenerator
from cfssl.measure.predictor import AttributePredictor
from cfssl.seeds import numpy_generator, torch_generator
from cfssl.stages import TABLE_CODE, keyed_stage

VARIABLES = ("thickness", "intensity", "digit")
SPLIT = SplitSettings(fractions=(0.75, 0.05, 0.2), stratify=("digit",))  # 7,500 / 500 / 2,000
RANGES = {"thickness": (0.87598526, 6.255515), "intensity": (66.601204, 254.90317)}  # of the published bins
CALIBRATED_ON = 2000  # training digits
UNITS = {"thickness": "pixels", "intensity": "grey levels", "digit": "fraction"}
Scores = dict[str, np.ndarray]


class Way(NamedTuple):
    """How an image is made: noise of the posterior and pixel residual are multiplied by these."""

    temperature: float
    residual: float
    clamped: bool = True


WAYS = {
    "network": Way(0.0, 0.0),  # what the network alone says
    "sampled": Way(0.1, 0.1),  # the temperature of the published evaluation
    "full_residual": Way(0.0, 1.0),  # a null intervention returns the image
    "unclamped": Way(0.0, 0.0, clamped=False),  # as network; the published code does not clamp
}


class KnownCauses:
    """A generator of digits whose attributes follow the known mechanism, and whose images are made in one
    `way`."""

    def __init__(self, generator: HVAEGenerator, way: str, start: int = 0) -> None:
        """`start`: the first image of the batch, so that batches have noise of their own."""
        self.inner, self.way, self.graph = generator, WAYS[way], generator.graph
        self.rng = torch_generator("axioms", "posterior", start)

    def abduct(self, x: Tensor, pa: Attributes) -> Exogenous:
        if self.way.temperature == 0:
            return self.inner.abduct(x, pa)
        noise = torch.randn(len(x), self.inner.network.noise_size, generator=self.rng)
        return self.inner.abduct(x, pa, self.way.temperature * noise)

    def act(self, u: Exogenous, pa: Attributes, do: Mapping[str, Tensor], rng: object) -> Attributes:
        """See `known_counterfactual`; nothing is drawn."""
        return known_counterfactual(pa, do)

    @torch.no_grad()
    def predict(self, u: Exogenous, pa_cf: Attributes) -> Tensor:
        if self.way.clamped:
            return self.inner.predict(u, pa_cf, residual=self.way.residual)
        latents = [u[f"z{level}"] for level in range(len(self.inner.network.latent_shapes))]
        return self.inner.network.decode(latents, self.inner.context(pa_cf)).mean


def known_counterfactual(pa: Attributes, do: Mapping[str, Tensor]) -> Attributes:
    """The attributes under `do`: intensity follows thickness with the noise that it has in `pa`."""
    changed = {**pa, **do}
    if "thickness" in do and "intensity" not in do:
        eps = abduct_intensity_noise(pa["intensity"], pa["thickness"])
        changed["intensity"] = intensity_given_thickness(eps, do["thickness"])
    return changed


def digits_table(runs: Path, data_root: str | None) -> ImageTable:
    """The 10,000 digits of the test part in splits of their own. Raises SystemExit without `data_root` where
    the table is not there yet."""
    stage = keyed_stage(runs, "table", "morphomnist", plain(SPLIT), code=TABLE_CODE)

    def make(folder: Path) -> None:
        if data_root is None:
            raise SystemExit("--data-root is needed: the folder that holds morphomnist/")
        prepare_morphomnist(Path(data_root) / "morphomnist", folder / "table", split=SPLIT)

    return ImageTable.open(finished(stage, make).parent)


class Digits(NamedTuple):
    """Images x (N, 1, 32, 32) in [-1, 1] of a split, their attributes, and per variable the values that an
    intervention sets: `other` of another bin of the same split, `marginal` of training digits. `edges` of the
    bins of thickness and intensity."""

    x: Tensor
    pa: Attributes
    other: Attributes
    marginal: Attributes
    edges: dict[str, np.ndarray]

    def bins(self, name: str, values: Tensor) -> np.ndarray:
        """The bin of each value of a variable; digits are their own bins."""
        return value_bins(values.numpy(), self.edges[name]) if name in self.edges else values.numpy()


def digits_of(table: ImageTable, split: str) -> Digits:
    """The same interventions for every generator and seed."""
    rows, train = table.rows(split), table.rows("train")
    pa, known = table.encode(VARIABLES, rows), table.encode(VARIABLES, train)
    edges = {name: bin_edges(pa[name].numpy(), *limits) for name, limits in RANGES.items()}
    digits = Digits(to_signed(table.images.read(rows)), pa, {}, {}, edges)
    for name in VARIABLES:
        rng, bins = numpy_generator("axioms", split, name), digits.bins(name, pa[name])
        digits.other[name] = torch.from_numpy(changed_values(pa[name].numpy(), bins, rng))
        digits.marginal[name] = known[name][torch.from_numpy(rng.integers(len(train), size=len(rows)))]
    return digits


class Rulers:
    """What measures digits: two measures without a learned model, calibrated on real training digits, and
    predictors (`judges`) that were trained on real training digits."""

    def __init__(self, table: ImageTable, judges: Iterable[AttributePredictor]) -> None:
        rows = table.rows("train")[:CALIBRATED_ON]
        x, pa = to_signed(table.images.read(rows)), table.encode(VARIABLES, rows)
        self.thickness: Calibration = calibrate(thickness(x, "skeleton"), pa["thickness"].numpy())
        self.intensity: Calibration = calibrate(intensity(x), pa["intensity"].numpy())
        self.judges = list(judges)

    def measured(self, images: Tensor) -> Scores:
        """Thickness and intensity (B,), NaN for a blank image."""
        return {
            "thickness": self.thickness(thickness(images, "skeleton")),
            "intensity": self.intensity(intensity(images)),
        }

    @torch.no_grad()
    def errors(self, images: Tensor, target: Attributes) -> Scores:
        """Per image: `thickness_mae`, `intensity_mae`, both also `..._by_predictor`, and `digit_accuracy`."""
        wanted = {name: value.double().numpy() for name, value in target.items()}
        found = {f"{name}_mae": np.abs(value - wanted[name]) for name, value in self.measured(images).items()}
        for judge in self.judges:
            seen = judge(images)
            for name in judge.attributes:
                if name == "digit":
                    right = judge.probabilities(seen, name).argmax(1) == target[name]
                    found["digit_accuracy"] = right.numpy().astype(np.float64)
                else:
                    error = judge.value(seen, name).double().numpy() - wanted[name]
                    found[f"{name}_mae_by_predictor"] = np.abs(error)
        return found


def compositions(generator: HVAEGenerator, digits: Digits, cycles: Mapping[str, Iterable[int]]) -> Scores:
    """`composition_M/WAY` (N,) for the numbers M of `cycles` per way."""
    return _collected(
        digits,
        lambda x, pa, part: {
            f"composition_{count}/{way}": composition(KnownCauses(generator, way, part.start), x, pa, count)
            for way, counts in cycles.items()
            for count in counts
        },
    )


def reversibilities(generator: HVAEGenerator, digits: Digits, cycles: Mapping[str, Iterable[int]]) -> Scores:
    """`reversibility_M_do_K/WAY` (N,), as `compositions`."""
    return _collected(
        digits,
        lambda x, pa, part: {
            f"reversibility_{count}_do_{name}/{way}": reversibility(
                KnownCauses(generator, way, part.start), x, pa, {name: digits.marginal[name][part]}, count
            )
            for way, counts in cycles.items()
            for count in counts
            for name in VARIABLES
        },
    )


def effects(generator: HVAEGenerator, digits: Digits, rulers: Rulers, ways: Iterable[str]) -> Scores:
    """`under(FIGURE, K)/WAY` (N,), for every figure of `Rulers.errors`, under the interventions `other`."""

    def errors(x: Tensor, pa: Attributes, part: slice) -> Scores:
        found: Scores = {}
        for way in ways:
            known = KnownCauses(generator, way, part.start)
            u = known.abduct(x, pa)
            for name in VARIABLES:
                pa_cf = known_counterfactual(pa, {name: digits.other[name][part]})
                seen = rulers.errors(known.predict(u, pa_cf), pa_cf)
                found |= {f"{under(figure, name)}/{way}": value for figure, value in seen.items()}
        return found

    return _collected(digits, errors)


def under(figure: str, variable: str) -> str:
    """The name of a figure of `Rulers.errors` under an intervention: thickness_mae_do_digit_by_predictor."""
    measure, by, source = figure.partition("_by_")
    return f"{measure}_do_{variable}{by}{source}"


def counterfactuals(generator: HVAEGenerator, digits: Digits, name: str, way: str = "network") -> Tensor:
    """The images (N, 1, 32, 32) under the interventions `other` on `name`."""
    known = KnownCauses(generator, way)

    def made(part: slice) -> Tensor:
        pa = {variable: value[part] for variable, value in digits.pa.items()}
        pa_cf = known_counterfactual(pa, {name: digits.other[name][part]})
        return known.predict(known.abduct(digits.x[part], pa), pa_cf)

    return torch.cat(in_batches(len(digits.x), made))


def _collected(digits: Digits, make: Callable[[Tensor, Attributes, slice], Scores]) -> Scores:
    """`make(x, pa, part)` of every batch, joined."""

    def batch(part: slice) -> Scores:
        return make(digits.x[part], {name: value[part] for name, value in digits.pa.items()}, part)

    parts = in_batches(len(digits.x), batch)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
