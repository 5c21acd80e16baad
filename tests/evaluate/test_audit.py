"""The audit of the oracle, whose counterfactuals are the truth: no distance, and the whole effect alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.evaluate.audit import audit, drawn_values
from cfssl.evaluate.settings import AuditSettings
from cfssl.generators.oracle import OracleGenerator, OracleSettings
from cfssl.measure.embedding import Embedding, EmbeddingSettings, EmbeddingTrainSettings
from cfssl.measure.frozen import as_json
from cfssl.measure.predictor import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.seeds import numpy_generator

JUDGE = PredictorSettings(
    attributes=("scanner", "disease", "age"), width=4, train=PredictorTrainSettings(epochs=3, batch=16)
)
SETTINGS = AuditSettings(judge=JUDGE, rows=24, cycles=(1, 2), resamples=20)
CPU = HardwareSettings(accelerator="cpu")
DO = {"scanner": ["A", "D"], "disease": "all"}
NAMES = ("scanner=A", "scanner=D", "disease=no", "disease=yes", "scanner", "disease")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    world = chest.ChestWorld(domains={"A": 0.5, "D": 0.5})
    frame, images, masks, truth = chest.build(world, count=200, seed=0)
    folder = tmp_path_factory.mktemp("audit") / "table"
    save_prepared(
        folder,
        "phantom_chest",
        frame,
        chest.ATTRIBUTES,
        images,
        masks,
        chest.MASKS,
        group="patient",
        areas=chest.AREAS,
    )
    return ImageTable.open(folder, truth)


@pytest.fixture(scope="module")
def judge(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> AttributePredictor:
    predictor = AttributePredictor(JUDGE, table.attributes, table.images.shape)
    predictor.fit(table, Run(tmp_path_factory.mktemp("judge"), CPU, quiet=True))
    return predictor


def oracle(table: ImageTable, *parents: str) -> OracleGenerator:
    generator = OracleGenerator(OracleSettings(parents=parents), table)
    generator.fit(table, Run(Path("nowhere"), CPU, quiet=True))
    return generator


@pytest.fixture(scope="module")
def embedding(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> Embedding:
    found = Embedding(
        EmbeddingSettings(latents=4, width=4, train=EmbeddingTrainSettings(epochs=3, batch=16)),
        table.images.shape,
    )
    found.fit(table, Run(tmp_path_factory.mktemp("embedding"), CPU, quiet=True))
    return found


@pytest.fixture(scope="module")
def record(table: ImageTable, judge: AttributePredictor, embedding: Embedding) -> dict[str, Any]:
    return audit(oracle(table, "scanner", "disease"), table, DO, judge, None, embedding, SETTINGS)


@torch.no_grad()
def test_minimality_is_that_of_the_images_whose_value_changes(
    table: ImageTable, record: dict[str, Any], embedding: Embedding
) -> None:
    """Brute force over all pairs, for do(scanner=D)."""
    assert tuple(record["minimality"]) == NAMES
    audited = np.sort(numpy_generator(0, "audit").permutation(table.rows("val"))[:24])
    train, scanner = table.rows("train"), table.encode(["scanner"], np.arange(len(table)))["scanner"]

    def posterior(x: torch.Tensor) -> Normal:
        mean, log_sigma = embedding(x)
        return Normal(mean.double(), log_sigma.double().exp())

    shares = []
    for row in audited[scanner[audited] != 3]:
        assert table.truth is not None
        rendered = table.truth.counterfactual(np.array([row]), {"scanner": torch.tensor([3])})
        own = posterior(to_signed(table.images.read(np.array([row]))))
        limit = kl_divergence(posterior(to_signed(rendered)), own).sum()
        to_real = kl_divergence(posterior(to_signed(table.images.read(train))), own).sum(1)
        shares.append(float((to_real[scanner[train] == 3] <= limit).double().mean()))
    found = record["minimality"]["scanner=D"]["p1"]
    assert found["n"] == len(shares)
    assert found["value"] == pytest.approx(np.mean(shares), abs=0.02)  # ties at rounding


def test_the_oracle_meets_every_axiom(record: dict[str, Any]) -> None:
    assert {name: figure["value"] for name, figure in record["axioms"].items()} == {
        "composition 1": 0,
        "composition 2": 0,
        **{f"reversibility {cycles}, do({name})": 0 for cycles in (1, 2) for name in NAMES},
    }


def test_the_oracle_makes_the_true_change_and_no_other(record: dict[str, Any]) -> None:
    assert tuple(record["truth"]) == NAMES
    for found in record["truth"].values():
        assert found["effectiveness"]["value"] == pytest.approx(1)
        assert found["amplification"]["value"] == pytest.approx(0, abs=1e-9)
        assert found["l1"]["value"] == 0 < found["l1_unchanged"]["value"]


def test_values_drawn_from_the_images_have_an_auc_where_one_value_has_none(record: dict[str, Any]) -> None:
    matrix = record["amplification"]["matrix"]
    one, drawn = matrix["disease=yes"]["disease"], matrix["disease"]["disease"]
    assert one["relation"] == drawn["relation"] == "intervened"
    assert one["counterfactual"]["value"] is None
    assert "lack class 0" in one["counterfactual"]["reason"]
    assert 0 <= drawn["counterfactual"]["value"] <= 100


def test_drawn_values_are_those_of_the_images_in_another_order() -> None:
    pa = {"scanner": torch.arange(50) % 4, "age": torch.linspace(20, 90, 50)}
    views = [{"scanner": "A"}, {"scanner": "B"}, {"age": 40.0}]
    found = drawn_values(views, pa, seed=0)
    assert list(found) == ["scanner"]  # any value of a continuous one has an error already
    (drawn,) = found["scanner"].values()
    assert torch.equal(drawn.sort().values, pa["scanner"].sort().values)
    assert not torch.equal(drawn, pa["scanner"])
    assert torch.equal(drawn, drawn_values(views, pa, seed=0)["scanner"]["scanner"])


def test_attributes_outside_the_graph_are_judged_by_their_recorded_values(record: dict[str, Any]) -> None:
    for row in record["amplification"]["matrix"].values():
        assert row["age"]["relation"] == "unrelated"
        assert row["age"]["error"]["value"] > 0


def test_the_record_is_json_and_says_who_judged_what(
    record: dict[str, Any], table: ImageTable, judge: AttributePredictor
) -> None:
    json.dumps(record, allow_nan=False)
    assert record["judge"]["fingerprint"] == judge.fingerprint
    assert record["n"] == SETTINGS.rows
    assert record["generator"] == oracle(table, "scanner", "disease").fingerprint
    assert as_json({"scanner": {"auc": math.nan, "images": 3.0}}) == {"scanner": {"auc": None, "images": 3.0}}


def test_a_guide_is_refused_as_judge(table: ImageTable, judge: AttributePredictor) -> None:
    guides = ["another", judge.fingerprint]
    with pytest.raises(UserError, match="guide 2 of the fine-tuning"):
        audit(oracle(table, "scanner"), table, {"scanner": "all"}, judge, None, None, SETTINGS, guides)


def test_areas_need_a_segmentor(table: ImageTable, judge: AttributePredictor) -> None:
    with pytest.raises(UserError, match=r"sets left_upper_area, which are areas.*add audit\.segmentor"):
        audit(
            oracle(table, "left_upper_area"), table, {"left_upper_area": [3.2]}, judge, None, None, SETTINGS
        )
