"""The causal model of the attributes: graph, mechanisms, and abduct-act-predict over them."""

from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings, Mechanism
from cfssl.scm.model import StructuralCausalModel

__all__ = ["CausalGraph", "CausalModelSettings", "Mechanism", "StructuralCausalModel"]
