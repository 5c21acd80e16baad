"""Amplification against scikit-learn, closed forms and simulation: it is 0 where nothing changes, and found
where an attribute is pushed towards its recorded label."""

import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from cfssl.errors import UserError
from cfssl.evaluate.amplification import (
    Judged,
    Verdicts,
    amplification,
    amplification_difference,
    mismatch,
    single_images,
)
from cfssl.scm.graph import CausalGraph
from cfssl.seeds import numpy_generator

GRAPH = CausalGraph({"finding": ["age"]}, ("age", "sex", "race", "finding"), ("sex", "race", "finding"))


def two(logits: np.ndarray) -> np.ndarray:
    probability = 1 / (1 + np.exp(-logits))
    return np.stack([1 - probability, probability], axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def world(count: int = 400, seed: int = 0, push: float = 0.0) -> Verdicts:
    """do(sex) and do(age) obeyed; `push` moves the logits of race and finding towards their labels."""
    rng = numpy_generator("world", seed)
    target = {
        "age": rng.uniform(20, 80, count),
        "sex": rng.integers(0, 2, count),
        "race": rng.integers(0, 3, count),
        "finding": rng.integers(0, 2, count),
    }
    logits = {
        "sex": rng.normal(0, 1, count) + 2 * (2 * target["sex"] - 1),
        "race": rng.normal(0, 1, (count, 3)) + np.eye(3)[target["race"]],
        "finding": rng.normal(0, 1, count) + 0.5 * (2 * target["finding"] - 1),
    }
    age = target["age"] + rng.normal(0, 5, count)
    real = Judged(
        {
            "age": age,
            "sex": two(logits["sex"]),
            "race": softmax(logits["race"]),
            "finding": two(logits["finding"]),
        },
        target,
    )
    pushed = {
        "race": softmax(logits["race"] + push * np.eye(3)[target["race"]]),
        "finding": two(logits["finding"] + push * (2 * target["finding"] - 1)),
    }
    new_sex, new_age = 1 - target["sex"], target["age"] + 10
    do_sex = Judged(
        {**real.seen, **pushed, "sex": two(logits["sex"] * -2)}, {**target, "sex": new_sex}, ("sex",)
    )
    new_finding = np.where(new_age > 60, 1, target["finding"])
    do_age = Judged(
        {**real.seen, **pushed, "age": age + 13}, {**target, "age": new_age, "finding": new_finding}, ("age",)
    )
    return Verdicts(real, {"sex": do_sex, "age": do_age})


def test_every_change_is_scikit_learns_auc_on_the_counterfactuals_minus_that_on_the_real_images() -> None:
    verdicts = world(push=1.0)
    result = amplification(GRAPH, verdicts, resamples=20)
    for do, judged in verdicts.counterfactual.items():
        for name in ("sex", "race", "finding"):
            pairs = [(source.target[name], source.seen[name]) for source in (verdicts.real, judged)]
            before, after = (
                100 * roc_auc_score(y, p if p.shape[1] > 2 else p[:, 1], multi_class="ovr") for y, p in pairs
            )
            cell = result["matrix"][do][name]
            assert cell["real"]["value"] == pytest.approx(before, abs=1e-9)
            assert cell["change"]["value"] == pytest.approx(after - before, abs=1e-9)
    age = result["matrix"]["age"]["age"]
    real, judged = verdicts.real, verdicts.counterfactual["age"]
    errors = [np.abs(source.seen["age"] - source.target["age"]).mean() for source in (real, judged)]
    assert age["change"]["value"] == pytest.approx(errors[1] - errors[0])
    assert age["error"]["value"] == pytest.approx(errors[1])
    assert age["unit"] == "units of age"
    assert result["attributes"]["age"]["error"]["value"] == pytest.approx(errors[0])
    recognised = real.seen["race"].argmax(1) == real.target["race"]
    assert result["attributes"]["race"]["accuracy"]["value"] == pytest.approx(recognised.mean())
    json.dumps(result, allow_nan=False)


def test_descendants_and_the_intervened_attribute_have_no_part_in_amplification() -> None:
    result = amplification(GRAPH, world(push=1.0), resamples=20)
    relations = {
        do: {name: cell["relation"] for name, cell in row.items()} for do, row in result["matrix"].items()
    }
    assert relations["sex"] == {
        "age": "unrelated",
        "sex": "intervened",
        "race": "unrelated",
        "finding": "unrelated",
    }
    assert relations["age"]["finding"] == "descendant"
    counted = [("sex", "race"), ("sex", "finding"), ("age", "sex"), ("age", "race")]
    changes = [abs(result["matrix"][do][name]["change"]["value"]) for do, name in counted]
    assert result["amplification"]["value"] == pytest.approx(np.mean(changes))
    assert result["amplification"]["cells"] == 4


def test_amplification_of_identical_predictions_is_zero_with_an_interval_of_zero() -> None:
    result = amplification(GRAPH, world(push=0.0), resamples=50)
    cell = result["matrix"]["sex"]["race"]
    assert cell["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for kind in ("shift", "sharpness", "towards_target"):
        assert (cell[kind]["value"], cell[kind]["low"], cell[kind]["high"]) == (0, 0, 0)
    assert {key: result["amplification"][key] for key in ("value", "low", "high", "by_chance")} == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "by_chance": 0.0,
    }


def test_sharper_probabilities_leave_the_auc_and_raise_sharpness() -> None:
    """The AUC ranks images; twice the logits are the same ranking."""
    verdicts = world()
    logit = np.log(verdicts.real.seen["finding"][:, 1] / verdicts.real.seen["finding"][:, 0])
    sharper = {**verdicts.real.seen, "finding": two(2 * logit)}
    judged = Judged(sharper, verdicts.counterfactual["sex"].target, ("sex",))
    cell = amplification(GRAPH, Verdicts(verdicts.real, {"sex": judged}), resamples=50)["matrix"]["sex"][
        "finding"
    ]
    assert cell["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    before, after = verdicts.real.seen["finding"][:, 1], sharper["finding"][:, 1]
    assert cell["sharpness"]["value"] == pytest.approx(
        np.abs(after - 0.5).mean() - np.abs(before - 0.5).mean()
    )
    assert cell["sharpness"]["low"] > 0
    assert cell["shift"]["value"] == pytest.approx(np.abs(after - before).mean())
    label = verdicts.real.target["finding"]
    for what, seen in (("real", verdicts.real.seen), ("counterfactual", sharper)):
        shares = cell["recorded_class"][what]
        assert len(shares) == 20
        assert sum(shares) == pytest.approx(1)
        own = seen["finding"][np.arange(400), label]
        assert shares[19] == pytest.approx(np.mean(own >= 0.95))


def test_a_push_towards_the_labels_is_its_size_in_log_odds_and_raises_the_auc() -> None:
    cell = amplification(GRAPH, world(push=1.0), resamples=100)["matrix"]["sex"]["finding"]
    assert cell["towards_target"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert cell["change"]["low"] > 5
    eroded = amplification(GRAPH, world(push=-1.0), resamples=100)["matrix"]["sex"]["finding"]
    assert eroded["towards_target"]["value"] == pytest.approx(-1.0, abs=1e-6)
    assert eroded["change"]["high"] < -5


def test_certain_probabilities_have_finite_log_odds() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    rows = single_images(certain, certain[::-1], np.array([0, 0]))
    assert np.isfinite(rows["towards_target"]).all()
    assert rows["towards_target"][0] < -20


def test_mismatch_counts_the_images_that_turn_from_their_true_class_to_the_recorded_one() -> None:
    recorded, true = np.array([1, 1, 1, 0, 0]), np.array([0, 0, 0, 0, 1])
    real = np.eye(2)[[0, 0, 1, 0, 1]]
    made = np.eye(2)[[1, 0, 1, 1, 0]]
    assert mismatch(real, made, recorded, true).tolist() == pytest.approx([1, 0, 0, np.nan, 1], nan_ok=True)
    verdicts = Verdicts(
        Judged({"finding": real}, {"finding": recorded}),
        {"sex": Judged({"finding": made}, {"finding": recorded}, ("sex",))},
    )
    result = amplification(GRAPH, verdicts, true_classes={"finding": true}, resamples=20)
    found = result["matrix"]["sex"]["finding"]["mismatch"]
    assert (found["value"], found["n"], found["without"]) == (0.5, 4, 1)
    nobody = amplification(GRAPH, verdicts, true_classes={"finding": recorded}, resamples=20)
    assert nobody["matrix"]["sex"]["finding"]["mismatch"]["value"] is None


def test_labels_flipped_with_probability_rho_have_the_ceiling_one_minus_rho() -> None:
    """A judge that sees the true class perfectly reaches AUC 1 - rho against balanced recorded labels; images
    that show the recorded labels exceed it by 100 rho points."""
    rng, rho, count = numpy_generator("ceiling"), 0.2, 20_000
    true = np.arange(count) % 2
    recorded = np.where(rng.random(count) < rho, 1 - true, true)
    real = Judged({"finding": two(9.0 * (2 * true - 1))}, {"finding": recorded})
    amplified = Judged({"finding": two(9.0 * (2 * recorded - 1))}, {"finding": recorded}, ("sex",))
    faithful = Judged(real.seen, real.target, ("race",))
    result = amplification(
        GRAPH,
        Verdicts(real, {"sex": amplified, "race": faithful}),
        ceilings={"finding": 1 - rho},
        true_classes={"finding": true},
        resamples=50,
    )
    hard, soft = (result["matrix"][do]["finding"] for do in ("sex", "race"))
    assert hard["ceiling_excess"]["value"] == pytest.approx(100 * rho, abs=1e-9)
    assert soft["ceiling_excess"]["value"] == pytest.approx(0, abs=1.0)
    assert soft["ceiling_excess"]["low"] < 0 < soft["ceiling_excess"]["high"]
    assert (hard["mismatch"]["value"], soft["mismatch"]["value"]) == (1, 0)
    assert result["ceiling_excess"]["value"] == pytest.approx(
        (hard["ceiling_excess"]["value"] + soft["ceiling_excess"]["value"]) / 2
    )


def test_a_target_that_every_image_shares_has_no_auc_and_says_so_but_has_an_accuracy() -> None:
    verdicts = world()
    same = {**verdicts.counterfactual["sex"].target, "sex": np.ones(400, dtype=np.int64)}
    judged = Judged(verdicts.counterfactual["sex"].seen, same, ("sex",))
    cell = amplification(GRAPH, Verdicts(verdicts.real, {"sex=F": judged}), resamples=20)["matrix"]["sex=F"][
        "sex"
    ]
    assert cell["change"]["value"] is None
    assert cell["change"]["reason"] == "the targets of sex lack class 0"
    assert 0 < cell["accuracy"]["value"] < 1


@pytest.mark.slow
def test_intervals_of_a_change_cover_the_truth() -> None:
    """do() adds noise s to logits d apart: AUC = Phi(d / sqrt 2) before, Phi(d / sqrt(2 + 2 s^2)) after."""
    apart, spread, count, covered, trials = 1.0, 0.7, 300, 0, 200
    truth = 100 * (norm.cdf(apart / np.sqrt(2 * (1 + spread**2))) - norm.cdf(apart / np.sqrt(2)))
    for trial in range(trials):
        rng = numpy_generator("coverage", trial)
        label = np.arange(count) % 2
        logit = rng.normal(size=count) + apart * label
        made = logit + spread * rng.normal(size=count)
        verdicts = Verdicts(
            Judged({"finding": two(logit)}, {"finding": label}),
            {"sex": Judged({"finding": two(made)}, {"finding": label}, ("sex",))},
        )
        change = amplification(GRAPH, verdicts, resamples=300)["matrix"]["sex"]["finding"]["change"]
        covered += change["low"] <= truth <= change["high"]
    assert 0.90 <= covered / trials <= 0.985


def test_what_sampling_alone_does_to_amplification_is_said_beside_it() -> None:
    """Logits whose noise is drawn anew, classes as far apart as before: no AUC changed, and Amp is chance."""
    values, by_chance, label = [], [], np.arange(300) % 2
    for trial in range(60):
        rng = numpy_generator("anew", trial)
        seen = [{name: two(rng.normal(size=300) + label) for name in ("sex", "finding")} for _ in range(2)]
        target = {"sex": label, "finding": label}
        verdicts = Verdicts(Judged(seen[0], target), {"race": Judged(seen[1], target, ("race",))})
        found = amplification(GRAPH, verdicts, resamples=60)["amplification"]
        values.append(found["value"])
        by_chance.append(found["by_chance"])
    assert np.mean(by_chance) == pytest.approx(np.mean(values), rel=0.25)
    assert np.mean(values) > 1


def test_patients_are_drawn_as_a_whole() -> None:
    verdicts = world(100, push=0.5)

    def repeated(judged: Judged) -> Judged:
        seen = {name: np.repeat(value, 4, axis=0) for name, value in judged.seen.items()}
        return Judged(seen, {name: np.repeat(value, 4) for name, value in judged.target.items()}, judged.do)

    copies = Verdicts(
        repeated(verdicts.real), {do: repeated(judged) for do, judged in verdicts.counterfactual.items()}
    )
    one = amplification(GRAPH, verdicts, resamples=100)
    four = amplification(GRAPH, copies, patients=np.repeat(np.arange(100), 4), resamples=100)
    for key in ("value", "low", "high"):
        assert four["amplification"][key] == pytest.approx(one["amplification"][key])
        change = four["matrix"]["sex"]["race"]["shift"][key]
        assert change == pytest.approx(one["matrix"]["sex"]["race"]["shift"][key])
    assert four["patients"] == 100


def test_the_difference_of_arms_is_that_of_their_amplification_and_its_interval_knows_the_seeds() -> None:
    hard, soft = [world(seed=s, push=1.0) for s in range(3)], [world(seed=s, push=0.1) for s in range(3)]
    result = amplification_difference(GRAPH, hard, soft, ceilings={"finding": 0.7}, resamples=50)
    of = [
        [amplification(GRAPH, v, resamples=2)["amplification"]["value"] for v in arm] for arm in (hard, soft)
    ]
    found = result["amplification"]
    assert found["seeds"] == pytest.approx(np.subtract(*of))
    assert found["value"] == pytest.approx(np.subtract(*of).mean())
    assert found["low"] > 0
    assert found["df"] is not None
    assert result["intervened"]["value"] == pytest.approx(0, abs=1e-9)
    assert result["ceiling_excess"]["value"] > 0
    same = amplification_difference(GRAPH, hard, hard, resamples=20)
    assert (same["amplification"]["value"], same["amplification"]["low"]) == (0, 0)
    assert "ceiling_excess" not in same


def test_verdicts_that_do_not_belong_together_are_refused() -> None:
    verdicts = world()
    with pytest.raises(UserError, match="verdicts of at least one"):
        Verdicts(verdicts.real, {})
    seen = {name: value for name, value in verdicts.real.seen.items() if name != "race"}
    with pytest.raises(UserError, match="The verdicts of sex lack 'race'"):
        Verdicts(verdicts.real, {"sex": Judged(seen, verdicts.real.target, ("sex",))})
    with pytest.raises(UserError, match="'colour' was given, but the judge sees age, sex, race, finding"):
        amplification(GRAPH, verdicts, ceilings={"colour": 0.8})
    with pytest.raises(UserError, match="1 and 2 seeds"):
        amplification_difference(GRAPH, [verdicts], [verdicts, verdicts])
    with pytest.raises(UserError, match="verdicts of 300 images, another of 400"):
        amplification_difference(GRAPH, [verdicts], [world(300)])
