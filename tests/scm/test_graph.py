"""Properties of the causal graph; the oracle is networkx, or a graph small enough to read off."""

import networkx as nx
import pytest

from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph
from cfssl.seeds import numpy_generator


def chest() -> CausalGraph:
    return CausalGraph(
        {"disease": ["age", "sex"]}, ["disease", "scanner", "sex", "age"], ["scanner", "sex", "disease"]
    )


def test_variables_stand_in_topological_order_with_ties_as_given():
    assert chest().variables == ("scanner", "sex", "age", "disease")


def test_parents_keep_the_order_of_the_edges():
    assert chest().parents("disease") == ("age", "sex")
    assert chest().parents("age") == ()


def test_affected_and_invariant_divide_the_variables():
    graph = chest()
    assert graph.affected(["age"]) == {"age", "disease"}
    assert graph.invariant(["age"]) == {"scanner", "sex"}
    assert graph.affected([]) == frozenset()
    assert graph.affected(["disease", "scanner"]) == {"disease", "scanner"}


def test_an_intervention_concerns_what_it_sets_what_follows_and_the_parents_of_that():
    graph = chest()
    assert graph.concerned(["age"]) == ("sex", "age", "disease")
    assert graph.concerned(["disease"]) == ("disease",)  # cut from its parents
    assert graph.concerned(["scanner", "sex"]) == ("scanner", "sex", "age", "disease")
    assert graph.concerned(["age", "disease"]) == ("age", "disease")
    assert graph.concerned([]) == ()


def test_descendants_and_order_agree_with_networkx_on_random_graphs():
    rng = numpy_generator("random graphs")
    for _ in range(20):
        names = [f"v{i}" for i in range(9)]
        shuffled = list(rng.permutation(names))
        edges = {shuffled[j]: [shuffled[i] for i in range(j) if rng.random() < 0.3] for j in range(9)}
        graph = CausalGraph(edges, names, [])
        oracle = nx.DiGraph([(parent, child) for child, parents in edges.items() for parent in parents])
        oracle.add_nodes_from(names)
        place = {name: i for i, name in enumerate(graph.variables)}
        assert all(place[parent] < place[child] for parent, child in oracle.edges)
        for name in names:
            assert graph.descendants(name) == nx.descendants(oracle, name)
            assert graph.affected([name]) | graph.invariant([name]) == set(names)


def test_json_round_trip_gives_an_equal_graph():
    graph = chest()
    assert CausalGraph(**graph.to_json()) == graph
    assert hash(CausalGraph(**graph.to_json())) == hash(graph)
    assert CausalGraph({}, graph.variables, graph.image_parents) != graph


@pytest.mark.parametrize(
    ("edges", "variables", "image_parents", "message"),
    [
        ({"a": ["b"], "b": ["a"]}, ["a", "b"], [], "cycle"),
        ({"a": ["a"]}, ["a"], [], "cycle a -> a"),
        ({"a": ["c"]}, ["a", "b"], [], "'c'"),
        ({"c": ["a"]}, ["a", "b"], [], "'c'"),
        ({}, ["a", "b"], ["x"], "parents of the image"),
        ({}, ["a", "a"], [], "more than once"),
        ({"a": ["b", "b"]}, ["a", "b"], [], "more than once"),
        ({"a": "b"}, ["a", "b"], [], r"write \[b\]"),
    ],
)
def test_impossible_graphs_are_refused_with_the_name_that_is_wrong(edges, variables, image_parents, message):
    with pytest.raises(UserError, match=message):
        CausalGraph(edges, variables, image_parents)


def test_questions_about_unknown_variables_are_refused():
    for question in (chest().parents, chest().descendants, lambda name: chest().affected([name])):
        with pytest.raises(UserError, match="'weight'"):
            question("weight")
