"""Which attributes cause the image, as a recipe says it."""

from collections.abc import Mapping

from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attribute
from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings
from cfssl.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class GraphSettings:
    """`parents`: the attributes that cause the image. `graph`: child attribute -> its parents; other
    attributes are roots. `attributes`: how the mechanisms of the attributes are built and fitted."""

    parents: tuple[str, ...]
    graph: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    attributes: CausalModelSettings = Field(default_factory=CausalModelSettings)

    def causal_graph(self, attributes: Mapping[str, Attribute]) -> CausalGraph:
        """The graph over the image's parents and whatever they descend from. Raises `UserError` for names not
        in `attributes`."""
        variables = dict.fromkeys(self.parents)
        for child, causes in self.graph.items():
            variables.update(dict.fromkeys((*causes, child)))
        unknown = [name for name in variables if name not in attributes]
        if unknown:
            raise UserError(
                f"generator.parents and generator.graph name {unknown}, which the table does not have; "
                f"its attributes are {sorted(attributes)}."
            )
        return CausalGraph(self.graph, tuple(variables), self.parents)
