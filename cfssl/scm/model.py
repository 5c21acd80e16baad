"""The attribute side of the causal model: abduct, act, predict (Pearl 2009, section 7.1) over the graph.

What enters: encoded attributes (see `cfssl.data.table.Attributes`) and an intervention. What leaves: their
counterfactuals, in which only the affected variables may differ. The image has its own mechanism, the
generator.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cfssl.data.table import Attribute, Attributes
from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph, refuse_unknown
from cfssl.scm.mechanisms import CausalModelSettings, Mechanism, Randomness, create_mechanism
from cfssl.seeds import torch_generator


class StructuralCausalModel(nn.Module):
    """One mechanism per variable of `graph`: learned as `settings` say, or given by the caller in `known`.

    Raises UserError when a variable has no attribute, or a setting names no variable or a mechanism that does
    not fit it.
    """

    is_fitted: Tensor

    def __init__(
        self,
        graph: CausalGraph,
        attributes: Mapping[str, Attribute],
        settings: CausalModelSettings | None = None,
        known: Mapping[str, Mechanism] | None = None,
    ) -> None:
        super().__init__()
        settings = settings or CausalModelSettings()
        known = known or {}
        refuse_unknown(graph.variables, attributes, "the graph")
        refuse_unknown(settings.mechanisms, graph.variables, "mechanisms")
        refuse_unknown(known, graph.variables, "the known mechanisms")
        self.graph = graph
        self.attributes = {name: attributes[name] for name in graph.variables}
        self.modules_by_key = nn.ModuleDict()
        for name in graph.variables:
            parents = [attributes[parent] for parent in graph.parents(name)]
            mechanism = (
                known[name] if name in known else create_mechanism(attributes[name], parents, settings)
            )
            self.modules_by_key[_key(name)] = cast(nn.Module, mechanism)
        self.register_buffer("is_fitted", torch.tensor(set(known) >= set(graph.variables)))

    def mechanism(self, name: str) -> Mechanism:
        """The mechanism of a variable of the graph."""
        return cast(Mechanism, self.modules_by_key[_key(name)])

    def fit(self, values: Attributes, rng: torch.Generator) -> None:
        """Fits every mechanism to training rows, (N,) each, on the CPU; the same `rng` state gives the same
        weights.

        Each variable has a random stream of its own, so that adding a variable does not change the fit of
        another.
        """
        refuse_missing(values, self.graph.variables)
        for name in self.graph.variables:
            if not len(values[name]):
                raise UserError(
                    f"{name!r} has no training rows, expected at least one; check the splits of the table."
                )
            if not torch.isfinite(values[name]).all():
                raise UserError(
                    f"{name!r} has values that are not finite in training, expected numbers; drop or repair "
                    "those rows."
                )
        seed = int(torch.randint(2**62, (), generator=rng))
        for name in self.graph.variables:
            mechanism, parents = self.mechanism(name), self._parents(name, values)
            mechanism.fit(values[name], parents, torch_generator(seed, "mechanism", name))
            _refuse_diverged(name, mechanism, values[name], parents)
        self.is_fitted.fill_(True)

    @torch.no_grad()
    def counterfactual(self, values: Attributes, do: Mapping[str, Tensor], rng: Randomness) -> Attributes:
        """What `values`, (B,) each, would have been under `do`, codes or physical units, (B,) or () each.

        Affected variables are abducted and predicted anew in topological order; all others, those outside the
        graph too, are returned bit-equal. `rng` serves the abduction of discrete variables. Raises UserError
        for values that no attribute can take, and for an unfitted model that has something to predict.
        """
        affected = self.graph.affected(do)
        to_predict = [name for name in self.graph.variables if name in affected and name not in do]
        if to_predict:
            self._refuse_unfitted()
        refuse_missing(values, self.graph.concerned(do))
        noise = {
            name: self.mechanism(name).abduct(values[name], self._parents(name, values), rng)
            for name in to_predict
        }
        result = values | as_values(do, self.attributes, like=values)
        for name in to_predict:
            result[name] = self.mechanism(name).predict(noise[name], self._parents(name, result))
        return result

    @torch.no_grad()
    def sample(self, count: int, rng: torch.Generator) -> Attributes:
        """`count` rows from the joint distribution of the attributes."""
        self._refuse_unfitted()
        result: Attributes = {}
        for name in self.graph.variables:
            mechanism = self.mechanism(name)
            result[name] = mechanism.predict(mechanism.noise(count, rng), self._parents(name, result))
        return result

    def _parents(self, name: str, values: Attributes) -> Attributes:
        return {parent: values[parent] for parent in self.graph.parents(name)}

    def _refuse_unfitted(self) -> None:
        if not self.is_fitted:
            raise UserError(
                "The causal model of the attributes has no fitted mechanisms; fit it or load its weights "
                "first."
            )


def as_values(
    do: Mapping[str, Tensor], attributes: Mapping[str, Attribute], like: Mapping[str, Tensor]
) -> Attributes:
    """An intervention, (B,) or () each, as new tensors of the dtype and shape that the factual values `like`
    have. Raises UserError for values that an attribute cannot take."""
    found = {}
    for name, value in do.items():
        attribute, factual = attributes[name], like[name]
        if value.shape not in (factual.shape, ()):
            raise UserError(
                f"do({name}) has shape {tuple(value.shape)}, expected {tuple(factual.shape)} or (); give one "
                "value per row."
            )
        if attribute.kind == "continuous":
            if not torch.isfinite(value).all():
                raise UserError(
                    f"do({name}) has values that are not finite, expected numbers; leave those rows out."
                )
        elif value.is_floating_point() or not ((value >= 0) & (value < len(attribute.categories))).all():
            raise UserError(
                f"do({name}) has values that are no category codes, expected whole numbers from 0 to "
                f"{len(attribute.categories) - 1} for {', '.join(attribute.categories)}; encode the "
                "intervention."
            )
        found[name] = value.to(factual).expand(factual.shape).clone()
    return found


def refuse_missing(values: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raises UserError when `values` lack some of the variables `names`."""
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(
            f"The attributes given lack {', '.join(missing)}, which the causal model needs; encode them too."
        )


@torch.no_grad()
def _refuse_diverged(name: str, mechanism: Mechanism, values: Tensor, parents: Attributes) -> None:
    some = slice(0, 1000)
    likelihood = mechanism.log_prob(values[some], {parent: value[some] for parent, value in parents.items()})
    numbers = [*cast(nn.Module, mechanism).state_dict().values(), likelihood]
    if not all(torch.isfinite(number).all() for number in numbers):
        raise UserError(
            f"The mechanism of {name!r} has diverged while it was fitted: its weights or likelihoods are no "
            "finite numbers; lower generator.attributes.lr or look at the values of its parents."
        )


def _key(name: str) -> str:
    # A column may be called "type" or "a.b", which a ModuleDict refuses as such.
    return "of_" + name.replace("%", "%25").replace(".", "%2E")
