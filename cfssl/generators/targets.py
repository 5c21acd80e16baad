"""Target rules of counterfactual fine-tuning: what a frozen guide is asked to see in a counterfactual image.

    hard     sum_j -log q_j(pa*_j | x*)                                         De Sousa Ribeiro et al. 2023
    soft     the same, but q_j(. | x) as target of every categorical j that do() does not affect
             (Mitigating attribute amplification, MICCAI 2024)
    reg      sum_v (r_v(x*) - a*_v)^2                                           Reg-CFT
    seg      sum_s | sum_r a_{s,r}(S(x*)) - a*_{s,r} |                          Seg-CFT (MICCAI 2025)
    pos_seg  sum_s sum_r | a_{s,r}(S(x*)) - a*_{s,r} |                          Pos-Seg-CFT (2026)

A guide is a predictor q, a regressor r or a segmentor S, trained on real images, frozen, in eval mode (in
training mode its batch statistics and dropout would be part of the target). Of the measured quantities the
intervened one is asked to take its new value and all others the value that the same guide measures on the
factual image; a recorded value would ask the generator to remove the guide's own error. Region maps come from
the factual image and are held fixed: a structure that shrinks would otherwise move its own regions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor
from torch.nn import functional as F

from cfssl.data.regions import AreaSpec, Maps, factual_maps, measure_areas
from cfssl.data.table import Attributes, ImageTable
from cfssl.errors import UserError
from cfssl.measure.predictor import AttributePredictor, PredictorSettings
from cfssl.measure.segmentor import Segmentor, SegmentorSettings
from cfssl.settings import STRICT


@settings(frozen=True, config=STRICT)
class AttributeRuleSettings:
    """`guide` predicts the attributes that are held to their targets. soft is the rule to use; hard amplifies
    attributes that were not intervened on, and is there to be compared with."""

    guide: PredictorSettings
    name: Literal["hard", "soft"] = "soft"


@settings(frozen=True, config=STRICT)
class RegressionRuleSettings:
    """`guide` regresses the measured attributes from the image."""

    guide: PredictorSettings
    name: Literal["reg"] = "reg"


@settings(frozen=True, config=STRICT)
class AreaRuleSettings:
    """`guide` segments the structures whose areas are attributes of the table. pos_seg holds every region to
    its target, seg the sum of a structure's regions."""

    guide: SegmentorSettings
    name: Literal["seg", "pos_seg"] = "pos_seg"


RuleSettings = Annotated[
    AttributeRuleSettings | RegressionRuleSettings | AreaRuleSettings, Field(discriminator="name")
]


@dataclass(frozen=True)
class Counterfactual:
    """A batch of counterfactuals as a rule sees it: images `x`, `x_cf` (B, C, H, W), attributes `pa`, `pa_cf`
    (B,) each. `intervened` and `affected` say per variable in which images it was set, and in which it was
    set or follows from what was, (B,) bool each; variables that are False everywhere may be left out."""

    x: Tensor
    x_cf: Tensor
    pa: Attributes
    pa_cf: Attributes
    intervened: Mapping[str, Tensor]
    affected: Mapping[str, Tensor]


class TargetRule(Protocol):
    """`loss` (B,) is lower, the more the guide sees what it should; gradients reach x_cf alone."""

    @property
    def fingerprint(self) -> str:
        """Of the guide."""
        ...

    def loss(self, made: Counterfactual) -> Tensor: ...
    def to(self, device: torch.device) -> None: ...


class AttributeRule:
    """hard or soft."""

    def __init__(self, guide: AttributePredictor, is_soft: bool) -> None:
        self.guide, self.is_soft = guide, is_soft

    @property
    def fingerprint(self) -> str:
        return self.guide.fingerprint

    def to(self, device: torch.device) -> None:
        self.guide.to(device)

    def loss(self, made: Counterfactual) -> Tensor:
        seen = self.guide(made.x_cf)
        factual = self.factual(made) if self.is_soft else {}
        total = torch.zeros(len(made.x), device=made.x.device)
        for name in seen:
            target = made.pa_cf[name]
            if name in factual:
                decided = F.one_hot(target, factual[name].shape[1]).to(factual[name])
                affected = _flags(made.affected, name, made.x)
                target = torch.where(affected[:, None], decided, factual[name])
            total = total + self.guide.nll(seen, name, target)
        return total

    @torch.no_grad()
    def factual(self, made: Counterfactual) -> dict[str, Tensor]:
        """What the guide sees in the factual images: probabilities (B, K) of every categorical attribute. A
        continuous attribute has a value as its target, which is soft already."""
        seen = self.guide(made.x)
        categorical = [name for name in seen if not made.pa[name].is_floating_point()]
        return {name: self.guide.probabilities(seen, name) for name in categorical}


class RegressionRule:
    """reg: squared errors in standard deviations of the attribute."""

    def __init__(self, guide: AttributePredictor) -> None:
        self.guide = guide

    @property
    def fingerprint(self) -> str:
        return self.guide.fingerprint

    def to(self, device: torch.device) -> None:
        self.guide.to(device)

    def loss(self, made: Counterfactual) -> Tensor:
        seen = self.guide(made.x_cf)
        with torch.no_grad():
            factual = self.guide(made.x)
        total = torch.zeros(len(made.x), device=made.x.device)
        for name in seen:
            value, spread = self.guide.value(factual, name), self.guide.spread(name)
            target = torch.where(_flags(made.intervened, name, made.x), made.pa_cf[name], value)
            total = total + ((self.guide.value(seen, name) - target) / spread).square()
        return total


class AreaRule:
    """seg or pos_seg, over the area attributes `specs`. `spread`: the standard deviation of each in training;
    errors are counted in it, those of a structure's sum in the spread of independent regions."""

    def __init__(
        self,
        guide: Segmentor,
        specs: Mapping[str, AreaSpec],
        spread: Mapping[str, float],
        is_positional: bool,
    ) -> None:
        self.guide, self.specs, self.spread = guide, dict(specs), dict(spread)
        self.is_positional = is_positional
        self.structures: dict[str, list[str]] = {}
        for name, spec in self.specs.items():
            self.structures.setdefault(spec.structure, []).append(name)

    @property
    def fingerprint(self) -> str:
        return self.guide.fingerprint

    def to(self, device: torch.device) -> None:
        self.guide.to(device)

    def loss(self, made: Counterfactual) -> Tensor:
        with torch.no_grad():
            masks = self.guide(made.x)
            maps = self.maps(masks)
            factual = measure_areas(masks, self.guide.structures, self.specs, maps)
        seen = measure_areas(self.guide(made.x_cf), self.guide.structures, self.specs, maps)
        errors = {}
        for name in self.specs:
            intervened = _flags(made.intervened, name, made.x)
            errors[name] = seen[name] - torch.where(intervened, made.pa_cf[name], factual[name])
        total = torch.zeros(len(made.x), device=made.x.device)
        for names in self.structures.values():
            if self.is_positional:
                for name in names:
                    total = total + errors[name].abs() / self.spread[name]
            else:
                whole = sum(self.spread[name] ** 2 for name in names) ** 0.5
                total = total + torch.stack([errors[name] for name in names]).sum(0).abs() / whole
        return total

    def maps(self, masks: Tensor) -> Maps:
        """The region maps of a segmentation (B, S, H, W) of factual images."""
        return factual_maps(masks, self.guide.structures, self.specs)


def create_rule(
    settings: AttributeRuleSettings | RegressionRuleSettings | AreaRuleSettings,
    guide: AttributePredictor | Segmentor,
    table: ImageTable,
    variables: Sequence[str],
) -> TargetRule:
    """The rule of `settings` with its trained `guide`. `variables` are those that fine-tuning intervenes on:
    an area rule measures the ones that are areas. Raises `UserError` when there is none, or when the guide
    lacks a structure that they are measured on."""
    if isinstance(settings, AttributeRuleSettings):
        assert isinstance(guide, AttributePredictor)
        return AttributeRule(guide, is_soft=settings.name == "soft")
    if isinstance(settings, RegressionRuleSettings):
        assert isinstance(guide, AttributePredictor)
        return RegressionRule(guide)
    assert isinstance(guide, Segmentor)
    specs = area_specs(settings, table, variables)
    values = table.encode(specs, table.rows("train", known=specs))
    spread = {name: max(float(value.double().std(correction=0)), 1e-6) for name, value in values.items()}
    return AreaRule(guide, specs, spread, is_positional=settings.name == "pos_seg")


def area_specs(
    settings: AreaRuleSettings, table: ImageTable, variables: Sequence[str]
) -> dict[str, AreaSpec]:
    """Those of `variables` that are areas. Raises `UserError` when there is none, or when the guide is not to
    segment a structure they need."""
    found = {name: table.areas[name] for name in variables if name in table.areas}
    if not found:
        raise UserError(
            f"finetune rule {settings.name} measures areas, and none of {', '.join(variables)} is one; the "
            f"table's areas are {', '.join(table.areas) or 'none: declare data.areas'}. Intervene on some."
        )
    needed = {part for spec in found.values() for part in (spec.structure, spec.map_structure)}
    if missing := sorted(needed - set(settings.guide.structures)):
        raise UserError(
            f"finetune rule {settings.name} measures on {', '.join(missing)}, which guide.structures lacks; "
            "add them."
        )
    return found


def _flags(flags: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = flags.get(name)
    return torch.zeros(len(like), dtype=torch.bool, device=like.device) if found is None else found
