"""Which attributes cause the image, as a recipe says it."""

from collections.abc import Mapping

from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attribute
from cfssl.scm.graph import CausalGraph, refuse_unknown
from cfssl.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class GraphSettings:
    """`parents`: the attributes that cause the image. `graph`: child attribute -> its parents; other
    attributes are roots."""

    parents: tuple[str, ...]
    graph: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    def causal_graph(self, attributes: Mapping[str, Attribute]) -> CausalGraph:
        """The graph over the image's parents and whatever they descend from. Raises `UserError` for names not
        in `attributes`."""
        variables = dict.fromkeys(self.parents)
        for child, causes in self.graph.items():
            variables.update(dict.fromkeys((*causes, child)))
        refuse_unknown(variables, attributes, "generator.parents or generator.graph")
        return CausalGraph(self.graph, tuple(variables), self.parents)
