"""The causal graph over the attributes of a table. The image is implicit: its parents are named apart.

What enters: `edges` as in a recipe, child -> parents, e.g. `{disease: [age]}`. What leaves: an order in which
to predict, and the two sets an intervention divides the attributes into, affected and invariant.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx

from cfssl.errors import UserError


@dataclass(frozen=True, init=False)
class CausalGraph:
    """A directed acyclic graph over attributes; equal when variables, edges and image parents are.

    `variables` stand in topological order (parents first; ties in the order they were given), `edges` holds
    every variable, roots with an empty tuple. Raises UserError for unknown or repeated names and for cycles.
    """

    variables: tuple[str, ...]
    image_parents: tuple[str, ...]
    edges: Mapping[str, tuple[str, ...]] = field(hash=False)

    def __init__(
        self, edges: Mapping[str, Sequence[str]], variables: Sequence[str], image_parents: Sequence[str]
    ) -> None:
        _refuse_repeated(variables, "the variables of the graph")
        _refuse_repeated(image_parents, "the parents of the image")
        for child, parents in edges.items():
            if isinstance(parents, str):
                raise UserError(
                    f"graph.{child} is the text {parents!r}, expected a list of parents; write [{parents}]."
                )
            _refuse_repeated(parents, f"graph.{child}")
            refuse_unknown([child, *parents], variables, f"graph.{child}")
        refuse_unknown(image_parents, variables, "the parents of the image")

        network = nx.DiGraph()
        network.add_nodes_from(variables)
        network.add_edges_from((parent, child) for child, parents in edges.items() for parent in parents)
        if not nx.is_directed_acyclic_graph(network):
            cycle = nx.find_cycle(network)
            path = " -> ".join([*(edge[0] for edge in cycle), cycle[0][0]])
            raise UserError(f"The graph has the cycle {path}, expected none; remove one of these edges.")
        given = {name: place for place, name in enumerate(variables)}
        order = tuple(nx.lexicographical_topological_sort(network, key=given.__getitem__))
        object.__setattr__(self, "variables", order)
        object.__setattr__(self, "image_parents", tuple(image_parents))
        object.__setattr__(self, "edges", {name: tuple(edges.get(name, ())) for name in order})

    def parents(self, variable: str) -> tuple[str, ...]:
        """The direct causes of `variable`, in the order the edges gave them."""
        refuse_unknown([variable], self.variables, "a question for parents")
        return self.edges[variable]

    def descendants(self, variable: str) -> frozenset[str]:
        """Everything `variable` causes, directly or not; not itself."""
        refuse_unknown([variable], self.variables, "a question for descendants")
        return self._descendants[variable]

    def affected(self, do: Iterable[str]) -> frozenset[str]:
        """The intervened variables and all their descendants: all that a counterfactual may change."""
        intervened = tuple(do)
        refuse_unknown(intervened, self.variables, "an intervention")
        return frozenset(intervened).union(*(self._descendants[name] for name in intervened))

    def invariant(self, do: Iterable[str]) -> frozenset[str]:
        """The variables an intervention must leave as they are."""
        return frozenset(self.variables) - self.affected(do)

    def concerned(self, do: Iterable[str]) -> tuple[str, ...]:
        """The variables whose factual values decide what an intervention makes of the attributes: the
        intervened ones, what descends from them, and the parents of that; in the order of `variables`."""
        affected, intervened = self.affected(do), set(do)
        found = affected.union(*(self.edges[name] for name in affected - intervened))
        return tuple(name for name in self.variables if name in found)

    def to_json(self) -> dict[str, Any]:
        """A canonical JSON form, for fingerprints and provenance; `CausalGraph(**graph.to_json())` restores
        it.
        """
        edges = {name: list(parents) for name, parents in self.edges.items() if parents}
        return {"edges": edges, "variables": list(self.variables), "image_parents": list(self.image_parents)}

    @cached_property
    def _descendants(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for name in reversed(self.variables):
            children = [child for child, parents in self.edges.items() if name in parents]
            found[name] = frozenset(children).union(*(found[child] for child in children))
        return found


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError, which says `where`, for the first of `names` that is not among `known`."""
    variables = tuple(known)
    for name in names:
        if name not in variables:
            raise UserError(
                f"{where} names {name!r}, expected one of {', '.join(variables)}; correct or declare it."
            )


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(
                f"{where} names {name!r} more than once, expected each name once; remove the repetition."
            )
