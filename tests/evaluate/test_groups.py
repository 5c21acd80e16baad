"""Properties of metrics, group reports and paired differences; oracles are scikit-learn, closed forms and
simulation.
"""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import norm
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import basic, welch_satterthwaite
from cfssl.evaluate.bootstrap import weights as bootstrap_weights
from cfssl.evaluate.grouped import MISSING
from cfssl.evaluate.groups import (
    paired_difference,
    paired_gap,
    paired_mean_of_groups,
    paired_worst_group,
    report,
)
from cfssl.evaluate.metrics import BINS, METRICS, OF_PROBABILITIES, once
from cfssl.seeds import numpy_generator


def binary(count: int, separation: float = 1.0, ties: bool = False, name: object = 0):
    """Balanced classes whose scores are unit normals `separation` apart: AUC = Phi(separation / sqrt 2)."""
    rng = numpy_generator("binary", str(name))
    y = np.arange(count) % 2
    score = rng.normal(size=count) + separation * y
    return y, two_columns(np.round(score) if ties else score)


def two_columns(score: np.ndarray) -> np.ndarray:
    probability = 1 / (1 + np.exp(-score))
    return np.stack([1 - probability, probability], axis=1)


def multiclass(count: int, classes: int = 4):
    rng = numpy_generator("multiclass")
    y = np.r_[np.arange(classes), rng.integers(classes, size=count - classes)]
    logits = rng.normal(size=(count, classes)).round(1) + 1.5 * np.eye(classes)[y]
    return y, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def reference(name: str, y: np.ndarray, scores: np.ndarray) -> float:
    binary_scores = scores[:, 1] if scores.shape[1] == 2 else scores
    decided = scores.argmax(1)
    if name == "auc":
        return sk.roc_auc_score(y, binary_scores, multi_class="ovr")
    if name == "average_precision":
        return sk.average_precision_score(y, binary_scores)
    if name == "balanced_accuracy":
        return sk.balanced_accuracy_score(y, decided)
    if name == "brier":
        return sk.brier_score_loss(y, binary_scores, labels=range(scores.shape[1]))
    if name == "calibration_error":
        return calibration_error_of_parts(y, scores)
    return sk.f1_score(y, decided, average="macro", labels=range(scores.shape[1]), zero_division=0)


def calibration_error_of_parts(y: np.ndarray, scores: np.ndarray) -> float:
    """Every row cut into `BINS` equal parts, so that n parts fill each bin exactly; of rows with the same
    probability, parts are dealt out in turn."""
    confidence = scores[:, 1] if scores.shape[1] == 2 else scores.max(1)
    event = y == 1 if scores.shape[1] == 2 else y == scores.argmax(1)
    _, level = np.unique(confidence, return_inverse=True)
    event = (np.bincount(level, event) / np.bincount(level))[level]  # a level is one mixture
    order = np.argsort(confidence, kind="stable")
    excess = np.repeat((event - confidence)[order], BINS).reshape(BINS, len(y))
    return np.abs(excess.sum(1)).sum() / (BINS * len(y))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "data", [binary(301), binary(301, ties=True), multiclass(300)], ids=["reals", "ties", "four classes"]
)
def test_metric_equals_scikit_learn_on_the_rows_and_on_every_resample(name, data):
    y, scores = data
    assert once(METRICS[name], y, scores) == pytest.approx(reference(name, y, scores), abs=1e-12)
    weights = next(bootstrap_weights(len(y), None, 10, seed=3))
    figures = METRICS[name](y, scores, weights)
    for times, figure in zip(weights, figures, strict=True):
        repeated = np.repeat(np.arange(len(y)), times)
        assert figure == pytest.approx(reference(name, y[repeated], scores[repeated]), abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_undefined_where_a_class_is_absent(name):
    for (y, scores), absent in ((binary(50), 1), (binary(50), 0), (multiclass(50), 2)):
        weights = np.stack([np.ones(50), y != absent])
        figures = METRICS[name](y, scores, weights)
        assert np.isfinite(figures[0])
        assert np.isnan(figures[1])


def test_calibration_error_is_that_of_torchmetrics_where_its_bins_hold_equal_mass():
    """Equal width and equal mass are the same bins for probabilities spread evenly, 7 in each."""
    rng = numpy_generator("even")
    probability = (np.arange(7 * BINS) + 0.5) / (7 * BINS)
    y = (rng.random(len(probability)) < probability**2).astype(int)
    scores = np.stack([1 - probability, probability], axis=1)
    expected = binary_calibration_error(torch.tensor(probability), torch.tensor(y), n_bins=BINS)
    assert once(METRICS["calibration_error"], y, scores) == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) > 0.1


def test_calibration_error_has_its_closed_form_of_one_probability_and_of_a_sure_forecaster():
    y = (np.arange(100) < 30).astype(int)
    alike = np.tile([0.5, 0.5], (100, 1))
    assert once(METRICS["calibration_error"], y, alike) == pytest.approx(0.2)
    assert once(METRICS["calibration_error"], y, np.eye(2)[y]) == 0
    assert once(METRICS["calibration_error"], y, np.eye(2)[1 - y]) == pytest.approx(1)
    assert once(METRICS["brier"], y, alike) == pytest.approx(0.25)
    three = np.r_[y, 2]
    assert once(METRICS["brier"], three, np.eye(3)[(three + 1) % 3]) == pytest.approx(2)


def test_of_metrics_of_probabilities_the_highest_group_is_the_worst():
    y, scores, scanner = scanners()
    grouping = report(y, scores, {"scanner": scanner}, ["auc", "brier"], resamples=50, probabilities=scores)[
        "groups"
    ]["scanner"]
    values = {group: row["brier"]["value"] for group, row in grouping["table"].items()}
    gap = grouping["gap"]["brier"]
    assert grouping["worst"]["brier"]["group"] == gap["worst"] == max(values, key=values.get)
    assert gap["best"] == min(values, key=values.get)
    assert gap["value"] == pytest.approx(max(values.values()) - min(values.values()))
    assert gap["low"] < gap["value"] < gap["high"]


def test_metrics_of_probabilities_refuse_scores():
    y, scores = binary(20)
    with pytest.raises(ValueError, match="and there are none"):
        report(y, scores, {}, ["brier"])
    with pytest.raises(ValueError, match="do not sum to 1"):
        report(y, scores, {}, ["brier"], probabilities=np.log(scores))
    with pytest.raises(ValueError, match="do not sum to 1"):
        paired_difference(y, np.log(scores), scores, "calibration_error")


def test_interval_of_a_calibration_error_covers_the_truth_where_there_is_one():
    """Twice the log odds: the population's error over bins of equal mass, by a large sample."""

    def draw(rng, count):
        logit = 1.5 * rng.normal(size=count)
        y = (rng.random(count) < 1 / (1 + np.exp(-logit / 2))).astype(int)
        return y, two_columns(logit)

    truth = once(METRICS["calibration_error"], *draw(numpy_generator("population"), 400_000))
    covered, percentiles = 0, 0
    for trial in range(150):
        y, scores = draw(numpy_generator("calibration", trial), 400)
        weights = next(bootstrap_weights(400, None, 150, seed=trial))
        cell = report(y, scores, {}, ["calibration_error"], resamples=150, seed=trial, probabilities=scores)[
            "overall"
        ]["calibration_error"]
        drawn = METRICS["calibration_error"](y, scores, weights)
        assert (cell["low"], cell["high"]) == tuple(basic(cell["value"], drawn).values())
        assert cell["low"] <= cell["value"] <= cell["high"]
        covered += cell["low"] <= truth <= cell["high"]
        percentiles += np.quantile(drawn, 0.025) <= truth <= np.quantile(drawn, 0.975)
    assert covered / 150 >= 0.86
    assert covered > percentiles


def test_auc_counts_ties_half():
    y = np.array([0, 1, 0, 1])
    assert once(METRICS["auc"], y, two_columns(np.zeros(4))) == 0.5
    assert once(METRICS["auc"], y, two_columns(np.array([0.0, 0.0, 0.0, 1.0]))) == 0.75


def test_resamples_draw_whole_patients_with_replacement():
    patients = np.array(["a", "b", "b", "c", "c", "c"])
    weights = np.concatenate(list(bootstrap_weights(6, patients, 4000, seed=0)))
    assert (weights[:, 1] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    per_patient = weights[:, [0, 1, 3]]
    assert (per_patient.sum(1) == 3).all()
    assert per_patient.mean(0) == pytest.approx([1, 1, 1], abs=0.05)
    assert per_patient.var(0) == pytest.approx([2 / 3] * 3, abs=0.06)  # binomial(3, 1/3)


def test_interval_of_the_auc_covers_the_truth_about_95_percent_of_the_time():
    truth = norm.cdf(1 / np.sqrt(2))
    covered = 0
    for trial in range(200):
        y, scores = binary(160, name=trial)
        cell = report(y, scores, {}, resamples=300, seed=trial)["overall"]["auc"]
        covered += cell["low"] <= truth <= cell["high"]
    assert 0.90 <= covered / 200 <= 0.985


def test_cluster_bootstrap_is_not_fooled_by_copies_of_a_row():
    y, scores = binary(200)
    width = {}
    for name, repeat, with_patients in (("rows", 1, False), ("copies", 4, False), ("patients", 4, True)):
        rows = np.repeat(np.arange(200), repeat)
        patients = rows if with_patients else None
        cell = report(y[rows], scores[rows], {}, patients=patients, resamples=2000)["overall"]["auc"]
        width[name] = cell["high"] - cell["low"]
    assert width["patients"] == pytest.approx(width["rows"], rel=0.1)
    assert width["copies"] == pytest.approx(width["rows"] / 2, rel=0.15)


def scanners(count: int = 600):
    y, scores = binary(count)
    rng = numpy_generator("scanners")
    scanner = rng.choice(["A", "B", "C"], count, p=[0.7, 0.25, 0.05]).astype(object)
    scores = np.where((scanner == "C")[:, None], two_columns(rng.normal(size=count) + 0.2 * y), scores)
    return y, scores, scanner


def test_report_lists_every_group_with_scikit_learns_values_and_finds_worst_and_gap():
    y, scores, scanner = scanners()
    names = [name for name in METRICS if name not in OF_PROBABILITIES]
    result = report(y, scores, {"scanner": scanner}, names, resamples=100)
    grouping = result["groups"]["scanner"]
    assert list(grouping["table"]) == ["A", "B", "C"]
    for group, row in grouping["table"].items():
        rows = scanner == group
        assert (row["n"], row["positives"]) == (rows.sum(), y[rows].sum())
        for name in names:
            assert row[name]["value"] == pytest.approx(reference(name, y[rows], scores[rows]), abs=1e-12)
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    for name in names:
        values = {group: row[name]["value"] for group, row in grouping["table"].items()}
        worst = min(values, key=values.get)
        assert grouping["worst"][name] == {"group": worst, "value": values[worst]}
        gap = grouping["gap"][name]
        assert gap["value"] == pytest.approx(max(values.values()) - min(values.values()))
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert (values[gap["best"]], gap["worst"]) == (max(values.values()), worst)
    assert result["overall"]["auc"]["value"] == pytest.approx(sk.roc_auc_score(y, scores[:, 1]))


def test_interval_of_a_gap_agrees_with_independent_groups_in_theory():
    y, scores, scanner = scanners(2000)
    grouping = report(y, scores, {"scanner": scanner}, resamples=2000)["groups"]["scanner"]
    gap = grouping["gap"]["auc"]
    widths = [
        grouping["table"][gap[end]]["auc"]["high"] - grouping["table"][gap[end]]["auc"]["low"]
        for end in ("best", "worst")
    ]
    assert gap["high"] - gap["low"] == pytest.approx(np.hypot(*widths), rel=0.1)


def test_report_is_json_of_finite_numbers_and_a_function_of_its_seed():
    y, scores, scanner = scanners()
    first = report(y, scores, {"scanner": scanner}, resamples=50, seed=1)
    again = report(y, scores, {"scanner": scanner}, resamples=50, seed=1)
    other = report(y, scores, {"scanner": scanner}, resamples=50, seed=2)
    assert json.dumps(first, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert first["overall"]["auc"]["low"] != other["overall"]["auc"]["low"]


def test_memory_chunks_do_not_change_the_report(monkeypatch):
    y, scores, scanner = scanners()
    whole = report(y, scores, {"scanner": scanner}, resamples=50)
    monkeypatch.setattr("cfssl.evaluate.bootstrap.CELLS", 7 * len(y))
    assert report(y, scores, {"scanner": scanner}, resamples=50) == whole


def test_a_group_that_lacks_a_class_is_listed_with_a_reason_and_is_not_the_worst():
    y, scores, scanner = scanners()
    scanner[np.flatnonzero(y == 0)[:5]] = "healthy only"
    grouping = report(y, scores, {"scanner": scanner}, resamples=50)["groups"]["scanner"]
    row = grouping["table"]["healthy only"]
    assert (row["n"], row["positives"]) == (5, 0)
    assert row["auc"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no row of class 1 among 5 rows",
    }
    assert grouping["worst"]["auc"]["group"] == "C"


def test_a_group_whose_class_hangs_on_one_row_has_a_value_but_says_when_it_has_no_interval():
    y, scores, _ = scanners()
    patients = np.arange(len(y))
    labels = np.full(len(y), "many", dtype=object)
    labels[np.r_[np.flatnonzero(y == 0)[:3], np.flatnonzero(y == 1)[:1]]] = "few"
    # Both classes of "few" survive a resample with probability about (1 - 1/e)(1 - 1/e^3) = 0.60; four
    # classes of one row: 0.16.
    cell = report(y, scores, {"g": labels}, patients=patients, resamples=400)["groups"]["g"]["table"]["few"][
        "auc"
    ]
    assert cell["low"] is not None
    y4, scores4 = multiclass(300)
    labels = np.where(np.arange(300) < 4, "few", "many")
    cell = report(y4, scores4, {"g": labels}, resamples=400)["groups"]["g"]["table"]["few"]["auc"]
    assert cell["value"] is not None
    assert cell["low"] is None
    assert "absent from" in cell["reason"]


def test_rows_without_a_label_form_a_group_of_their_own_outside_worst_and_gap():
    y, scores, scanner = scanners()
    scanner[scanner == "C"] = None
    grouping = report(y, scores, {"scanner": scanner}, resamples=50)["groups"]["scanner"]
    assert list(grouping["table"]) == ["A", "B", MISSING]
    assert sum(row["n"] for row in grouping["table"].values()) == len(y)
    assert MISSING not in (grouping["gap"]["auc"]["worst"], grouping["worst"]["auc"]["group"])


def test_multiclass_rows_list_the_count_of_every_class():
    y, scores = multiclass(100)
    assert report(y, scores, {}, resamples=5)["overall"]["positives"] == np.bincount(y).tolist()


def arms(count: int = 400, seeds: int = 1, spread: float = 0.0, lift: float = 0.3, name: object = 0):
    """Arm a sees the signal better than b by `lift`; both share most of their noise. `spread`: standard
    deviation over seeds of how well an arm sees it.
    """
    rng = numpy_generator("arms", str(name), seeds)
    y = np.arange(count) % 2
    shared = rng.normal(size=count)

    def arm(separation: float) -> list[np.ndarray]:
        return [
            two_columns(shared + (separation + spread * rng.normal()) * y + 0.2 * rng.normal(size=count))
            for _ in range(seeds)
        ]

    return y, arm(0.9 + lift), arm(0.9)


def expected_auc(separation: float, spread: float) -> float:
    """Of an arm of `arms`: the mean of Phi(d / sqrt(2 * 1.04)) over d ~ N(separation, spread^2)."""
    return norm.cdf(separation / np.sqrt(2 * 1.04 + spread**2))


def differences_of_resamples(y, a, b, patients, resamples, seed, figure) -> list[float]:
    """figure(rows, scores) of a minus b, averaged over seeds, on the rows of every resample, one by one."""
    found = []
    for times in next(bootstrap_weights(len(y), patients, resamples, seed)):
        rows = np.repeat(np.arange(len(y)), times)
        found.append(np.mean([figure(rows, one) - figure(rows, two) for one, two in zip(a, b, strict=True)]))
    return found


def width(cell: dict) -> float:
    return cell["high"] - cell["low"]


def test_paired_difference_is_the_difference_of_mean_figures_over_seeds():
    y, a, b = arms(seeds=3)
    result = paired_difference(y, a, b, resamples=50)
    per_seed = [
        sk.roc_auc_score(y, one[:, 1]) - sk.roc_auc_score(y, two[:, 1]) for one, two in zip(a, b, strict=True)
    ]
    assert result["seeds"] == pytest.approx(per_seed)
    assert result["value"] == pytest.approx(np.mean(per_seed))


def test_paired_difference_of_an_arm_with_itself_is_nothing():
    y, a, _ = arms(seeds=3)
    result = paired_difference(y, a, a, resamples=50)
    assert (result["value"], result["low"], result["high"]) == (0, 0, 0)


def test_paired_interval_is_narrower_than_that_of_unpaired_test_sets():
    y, a, b = arms()
    paired = paired_difference(y, a[0], b[0], resamples=1000)
    each = [report(y, arm[0], {}, resamples=1000)["overall"]["auc"] for arm in (a, b)]
    assert width(paired) < 0.6 * np.hypot(width(each[0]), width(each[1]))
    assert paired["low"] > 0


def test_paired_interval_covers_the_truth_about_95_percent_of_the_time():
    covered = 0
    truth = norm.cdf(1 / np.sqrt(2)) - norm.cdf(0.5 / np.sqrt(2) / np.sqrt(1.25))
    for trial in range(150):
        rng = numpy_generator("paired coverage", trial)
        y = np.arange(200) % 2
        better = rng.normal(size=200) + y
        worse = rng.normal(size=200) * 0.5 + rng.normal(size=200) + 0.5 * y
        result = paired_difference(y, two_columns(better), two_columns(worse), resamples=300, seed=trial)
        covered += result["low"] <= truth <= result["high"]
    assert 0.90 <= covered / 150 <= 0.99


def test_interval_is_welchs_of_the_variance_of_rows_and_of_seeds():
    y, a, b = arms(120, seeds=3, spread=0.3)
    patients = np.arange(120) // 4
    result = paired_difference(y, a, b, patients=patients, resamples=60, seed=5)

    def auc(rows: np.ndarray, scores: np.ndarray) -> float:
        return sk.roc_auc_score(y[rows], scores[rows, 1])

    v_rows = np.var(differences_of_resamples(y, a, b, patients, 60, 5, auc))
    v_seeds = np.var(result["seeds"], ddof=1) / 3
    df = (v_rows + v_seeds) ** 2 / (v_seeds**2 / 2)
    reach = stats.t.ppf(0.975, df) * np.sqrt(v_rows + v_seeds)
    value = np.mean(result["seeds"])
    found = [result[key] for key in ("value", "low", "high", "df")]
    assert found == pytest.approx([value, value - reach, value + reach, df])
    assert df > 2


def test_interval_of_seeds_alone_is_students_and_of_rows_alone_is_normal():
    of_seeds = np.array([0.01, 0.02, 0.06, 0.03])
    student = stats.ttest_1samp(of_seeds, 0).confidence_interval()
    found = welch_satterthwaite(of_seeds, row_variance=0.0)
    assert [found["low"], found["high"], found["df"]] == pytest.approx([student.low, student.high, 3])
    for alike in (np.array([0.02]), np.array([0.02, 0.02, 0.02])):
        found = welch_satterthwaite(alike, row_variance=1e-4)
        assert [found["low"], found["high"]] == pytest.approx(norm.interval(0.95, loc=0.02, scale=0.01))
        assert found["df"] is None


@pytest.mark.parametrize(
    ("count", "spread", "seeds_dominate"), [(300, 0.8, True), (80, 0.02, False)], ids=["seeds", "rows"]
)
def test_interval_of_three_seeds_covers_the_truth_over_other_seeds_and_rows(count, spread, seeds_dominate):
    truth = expected_auc(1.2, spread) - expected_auc(0.9, spread)
    found = [
        paired_difference(*arms(count, 3, spread, name=trial), resamples=100, seed=trial)
        for trial in range(400)
    ]
    covered = np.mean([one["low"] <= truth <= one["high"] for one in found])
    assert 0.92 <= covered <= 0.99
    assert (np.median([one["df"] for one in found]) < 3) == seeds_dominate  # the case is what it says


def test_mean_of_groups_weighs_groups_equally_whatever_their_size():
    y, a, b = arms(seeds=2)
    labels = np.where(np.arange(len(y)) < 40, "rare", np.where(np.arange(len(y)) < 140, "middle", "common"))
    result = paired_mean_of_groups(y, a, b, labels, ["rare", "middle"], resamples=200)
    expected = []
    for one, two in zip(a, b, strict=True):
        for group in ("rare", "middle"):
            r = labels == group
            expected.append(sk.roc_auc_score(y[r], one[r, 1]) - sk.roc_auc_score(y[r], two[r, 1]))
    assert result["value"] == pytest.approx(np.mean(expected))
    assert result["low"] < result["value"] < result["high"]
    with pytest.raises(UserError, match="'epic'"):
        paired_mean_of_groups(y, a, b, labels, ["epic"])


def four_groups(count: int) -> np.ndarray:
    return np.array(list("ABCD"))[np.arange(count) // 2 % 4]


def test_the_worst_group_of_an_error_is_that_with_the_highest():
    y, a, b = arms(240, seeds=1, lift=0.4)
    labels = four_groups(240)
    errors = [
        [np.square(one[labels == name, 1] - y[labels == name]).mean() for name in "ABCD"] for (one,) in (a, b)
    ]
    result = paired_worst_group(y, a, b, labels, "brier", resamples=5)
    assert result["value"] == pytest.approx(max(errors[0]) - max(errors[1]))


def test_worst_groups_are_each_arms_own_and_found_anew_in_every_resample():
    y, a, b = arms(240, seeds=2, lift=0.1)
    labels = four_groups(240).astype(object)
    a = [np.where((labels == "A")[:, None], two_columns(0.2 * np.sin(np.arange(240))), one) for one in a]
    labels[np.flatnonzero(y == 1)[-6:]] = "sick only"
    labels[-12:-6] = None
    searched = ["A", "B", "C", "D"]

    def worst(rows: np.ndarray, scores: np.ndarray) -> float:
        members = [rows[labels[rows] == name] for name in searched]
        return min(sk.roc_auc_score(y[r], scores[r, 1]) for r in members)

    result = paired_worst_group(y, a, b, labels, resamples=40, seed=2)
    everything = np.arange(240)
    per_seed = [worst(everything, one) - worst(everything, two) for one, two in zip(a, b, strict=True)]
    assert result["seeds"] == pytest.approx(per_seed)
    assert result["value"] == pytest.approx(np.mean(per_seed))
    assert result["groups"] == searched
    v_rows = np.var(differences_of_resamples(y, a, b, None, 40, 2, worst))
    expected = welch_satterthwaite(np.array(per_seed), v_rows)
    assert [result["low"], result["high"]] == pytest.approx([expected["low"], expected["high"]])


def test_equal_arms_have_equal_worst_groups_though_the_worst_group_of_one_favours_the_other():
    labels = four_groups(160)
    fair, naive, covered = [], [], []
    for trial in range(200):
        y = np.arange(160) % 2
        noise = numpy_generator("equal arms", trial).normal(size=(2, 160))
        a, b = (two_columns(0.9 * y + one) for one in noise)
        result = paired_worst_group(y, a, b, labels, resamples=100, seed=trial)
        fair.append(result["value"])
        covered.append(result["low"] <= 0 <= result["high"])
        of_b = report(y, b, {"g": labels}, resamples=1)["groups"]["g"]["worst"]["auc"]["group"]
        naive.append(paired_mean_of_groups(y, a, b, labels, [of_b], resamples=1)["value"])
    error = np.std(fair) / np.sqrt(200)
    assert abs(np.mean(fair)) < 2.5 * error
    assert np.mean(naive) > 5 * error
    assert np.mean(covered) >= 0.92


def gap_of(y, scores, labels, names) -> float:
    found = [sk.roc_auc_score(y[labels == name], scores[labels == name, 1]) for name in names]
    return max(found) - min(found)


def test_gaps_are_each_arms_own_and_found_anew_in_every_resample():
    y, a, b = arms(240, seeds=2, lift=0.1)
    labels = four_groups(240).astype(object)
    a = [np.where((labels == "A")[:, None], two_columns(0.2 * np.sin(np.arange(240))), one) for one in a]
    labels[np.flatnonzero(y == 1)[-6:]] = "sick only"

    def gap(rows: np.ndarray, scores: np.ndarray) -> float:
        return gap_of(y[rows], scores[rows], labels[rows], "ABCD")

    result = paired_gap(y, a, b, labels, resamples=40, seed=2)
    everything = np.arange(240)
    per_seed = [gap(everything, one) - gap(everything, two) for one, two in zip(a, b, strict=True)]
    assert result["seeds"] == pytest.approx(per_seed)
    assert (result["value"], result["groups"]) == (pytest.approx(np.mean(per_seed)), list("ABCD"))
    expected = welch_satterthwaite(
        np.array(per_seed), np.var(differences_of_resamples(y, a, b, None, 40, 2, gap))
    )
    assert [result["low"], result["high"]] == pytest.approx([expected["low"], expected["high"]])


@pytest.mark.parametrize(("separations", "lifted"), [((1.2, 0.4), 0.4), ((1.2, 0.4), 0.0), ((0.9, 0.9), 0.0)])
def test_the_interval_of_a_change_of_disparity_has_its_sign_and_covers_the_truth(separations, lifted):
    """Two groups; arm a sees the second one better by `lifted`, so that its gap is the smaller."""
    count, members = 400, np.array(["M", "F"])[np.arange(400) // 2 % 2]
    high, low = separations
    area = [norm.cdf(one / np.sqrt(2 * 1.25)) for one in (high, low + lifted, low)]
    truth = abs(area[0] - area[1]) - abs(area[0] - area[2])
    found = []
    for trial in range(200):
        rng = numpy_generator("disparity", trial)
        y, shared = np.arange(count) % 2, rng.normal(size=count)
        a, b = (
            two_columns(
                shared + 0.5 * rng.normal(size=count) + np.where(members == "M", high, low + more) * y
            )
            for more in (lifted, 0.0)
        )
        found.append(paired_gap(y, a, b, members, resamples=100, seed=trial))
    assert np.mean([one["low"] <= truth <= one["high"] for one in found]) >= 0.92
    values = [one["value"] for one in found]
    assert abs(np.mean(values) - truth) < 0.01
    if lifted:
        assert truth < -0.05
        assert np.mean([one["high"] < 0 for one in found]) > 0.5
    assert np.mean([one["low"] > 0 for one in found]) < 0.05


def test_a_disparity_needs_two_groups_with_every_class():
    y, a, b = arms()
    labels = np.where((np.arange(len(y)) < 20) & (y == 1), "sick", "rest")
    result = paired_gap(y, a, b, labels, resamples=20)
    assert (result["value"], result["reason"]) == (None, "fewer than two groups hold every class")


def test_no_group_with_every_class_has_no_worst_one():
    y, a, b = arms()
    result = paired_worst_group(y, a, b, np.where(y == 1, "sick", "healthy"), resamples=20)
    assert (result["value"], result["reason"]) == (None, "no group holds every class")


def test_a_mean_over_a_group_without_a_class_is_null_with_a_reason():
    y, a, b = arms()
    result = paired_mean_of_groups(y, a, b, np.where(y == 1, "sick", "healthy"), ["sick"], resamples=20)
    assert result["value"] is None
    assert result["reason"] == "no row of class 0 among 200 rows"
    json.dumps(result, allow_nan=False)


def test_impossible_requests_are_refused_in_a_sentence():
    y, scores = binary(20)
    with pytest.raises(UserError, match="metric 'accuracy' is unknown"):
        report(y, scores, {}, ["accuracy"])
    with pytest.raises(UserError, match="no test rows"):
        report(y[:0], scores[:0], {})
    with pytest.raises(UserError, match="not finite"):
        report(y, scores * np.nan, {})
    with pytest.raises(UserError, match="1 of 20 test rows have no patient"):
        report(y, scores, {}, patients=np.array([None, *range(19)], dtype=object))
    with pytest.raises(UserError, match="2 and 1 seeds"):
        paired_difference(y, [scores, scores], [scores])
