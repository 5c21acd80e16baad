"""The generator's side of a recipe: guides, fine-tuning, judge, gate and audit are made once each, and are
shared by the recipes that agree on them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfssl.bank.gate import gate_text
from cfssl.cli import main
from cfssl.data.pixels import to_signed
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe, parse_recipe, write_recipe

QUICK = {"epochs": 1, "batch": 16}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 240},
    "generator": {
        "name": "hvae",
        "parents": ["scanner", "disease"],
        "network": {"name": "small", "widths": [8, 8, 8, 8], "latents": [2, 2, 2], "blocks": 1},
        "train": {"epochs": 1},
    },
    "finetune": {
        "rules": [
            {
                "name": "soft",
                "guide": {"attributes": ["scanner", "disease"], "width": 4, "part": "first", "train": QUICK},
            }
        ],
        "train": {"epochs": 1},
    },
    "bank": {
        "do": {"scanner": "all"},
        "gate": {"probability": 0.3, "unchanged": {"disease": 0.02, "age": 0.1}},
    },
    "audit": {
        "judge": {
            "attributes": ["scanner", "disease", "age"],
            "width": 4,
            "part": "second",
            "train": {**QUICK, "seed": 1},
        },
        "embedding": {"latents": 2, "width": 4, "train": QUICK},
        "rows": 30,
        "cycles": [1],
        "resamples": 20,
    },
    "objective": {"name": "simclr", "hidden": 16, "output": 8},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}
SEGMENTOR = {"structures": ["left_lung"], "widths": [4, 8], "part": "second", "train": {**QUICK, "seed": 1}}
STAGES = ["table", "generator", "measure", "finetune", "measure", "measure", "bank", "audit", "encoder"]


def job(runs: Path, **sections: Any) -> Pipeline:
    """The tiny recipe with whole sections replaced."""
    return Pipeline(parse_recipe({**TINY, **sections}, "tiny"), runs, quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = job(tmp_path_factory.mktemp("runs"))
    pipeline.run()
    return pipeline


def test_every_stage_is_made_once_and_then_reused(done: Pipeline) -> None:
    assert [stage.name for stage in done.stages()] == STAGES
    assert len(done.production.used) == len(STAGES)
    assert not any(record["reused"] for record in done.production.used.values())
    again = job(done.runs)
    again.run()
    assert set(again.production.used) == set(done.production.used)
    assert all(record["reused"] for record in again.production.used.values())


def test_another_target_rule_shares_table_generator_guide_and_judge(done: Pipeline) -> None:
    (rule,) = TINY["finetune"]["rules"]
    hard = job(done.runs, finetune={**TINY["finetune"], "rules": [{**rule, "name": "hard"}]})
    remade = [stage.name for stage in hard.stages() if not stage.done]
    assert remade == ["finetune", "bank", "audit", "encoder"]


@pytest.mark.parametrize(
    ("section", "value", "remade"),
    [
        ("finetune", None, ["bank", "audit", "encoder"]),
        ("bank", {"do": {"scanner": "all"}}, ["bank", "encoder"]),
        ("bank", {"do": {"scanner": "all"}, "gate": {"probability": 0.4}}, ["bank", "encoder"]),
        ("audit", {**TINY["audit"], "rows": 20}, ["audit"]),
        ("hardware", {"accelerator": "cpu", "workers": 1}, []),
    ],
)
def test_a_change_remakes_what_follows_from_it(
    done: Pipeline, section: str, value: Any, remade: list[str]
) -> None:
    changed = job(done.runs, **{section: value})
    assert [stage.name for stage in changed.stages() if not stage.done] == remade


def test_fine_tuning_leaves_the_base_generator_as_it_was(done: Pipeline) -> None:
    base, tuned = done.generation.base, done.generation.generator
    plain = job(done.runs, finetune=None).generation.generator
    assert base is not None
    assert tuned is not None
    assert plain is not None
    assert base.fingerprint == plain.fingerprint != tuned.fingerprint


def given(done: Pipeline) -> dict[str, Any]:
    """The base generator of the finished recipe, as a file somebody else gave."""
    assert done.generation.base_stage is not None
    return {"name": "fitted", "file": str(done.generation.base_stage.product)}


def test_a_given_generator_makes_the_bank_of_the_recipe_that_fitted_it(
    done: Pipeline, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"finetune": None, "audit": None, "bank": {"do": {"scanner": "all"}}}
    own, other = job(done.runs, **plain), job(tmp_path, generator=given(done), **plain)
    banks = [made.generation.bank.path for made in (own, other)]
    first, second = ({file.name: file.read_bytes() for file in path.iterdir()} for path in banks)
    assert banks[0] != banks[1]
    assert first == second


def test_a_given_generator_is_fine_tuned_to_the_same_weights(done: Pipeline) -> None:
    tuned = job(done.runs, generator=given(done), audit=None, bank={"do": {"scanner": "all"}})
    assert tuned.generation.generator_stage != done.generation.generator_stage
    assert tuned.generation.generator is not None
    assert tuned.generation.generator.fingerprint == done.generation.generator.fingerprint  # type: ignore[union-attr]


def test_the_stage_of_a_given_generator_is_known_by_its_content(done: Pipeline, tmp_path: Path) -> None:
    here, there = given(done), {"name": "fitted", "file": str(tmp_path / "elsewhere.safetensors")}
    shutil.copy(here["file"], there["file"])
    first, second = (job(done.runs, generator=generator).stages() for generator in (here, there))
    assert first == second
    assert done.generation.generator is not None
    done.generation.generator.save(Path(there["file"]))  # another one: fine-tuned
    changed = job(done.runs, generator=there).stages()
    kept = [old.name for old, new in zip(first, changed, strict=True) if old == new]
    assert kept == ["table", "measure", "measure", "measure"]


def test_a_given_generator_outlives_its_file(done: Pipeline, tmp_path: Path) -> None:
    """The stage holds it, as it holds one that was fitted."""
    made = job(done.runs, generator=given(done)).generation
    assert made.base is not None
    assert made.base_stage is not None
    again = tmp_path / "again.safetensors"
    made.base.save(again)
    assert (
        again.read_bytes() == made.base_stage.product.read_bytes() == Path(given(done)["file"]).read_bytes()
    )


def test_a_given_generator_that_cannot_be_used_is_refused_by_check(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = done.recipe.model_dump(mode="json") | {"generator": given(done)}
    larger = content | {"data": {"name": "phantom_chest", "count": 240, "size": 128}}
    gone = content | {"generator": {"name": "fitted", "file": str(tmp_path / "gone.safetensors")}}
    outside = content | {"bank": {"do": {"sex": "all"}}, "audit": None}
    for broken, sentence in [
        (larger, "does not fit the table phantom_chest: images are 1 x 64 x 64 there and 1 x 128 x 128"),
        (gone, f"generator.file = '{tmp_path}/gone.safetensors': The checkpoint {tmp_path}/gone"),
        (outside, "['sex'], which is not among the generator's variables ['disease', 'scanner']"),
    ]:
        (tmp_path / "broken.yaml").write_text(json.dumps(broken))
        code, printed = call(monkeypatch, capsys, "check", tmp_path / "broken.yaml", "--runs", tmp_path / "r")
        assert code == 2
        assert sentence in printed
        assert printed.count("\n  - ") == 1


def test_the_share_that_the_gate_rejects_is_in_the_bank(done: Pipeline) -> None:
    bank = done.generation.bank
    gate = json.loads((bank.path / "bank.json").read_text())["gate"]
    judge = done.generation.measure(done.recipe.audit.judge)  # type: ignore[union-attr]
    assert gate["judge"] == judge.fingerprint
    assert gate["probability"] == 0.3
    made, shown = bank.made[:, 1:].sum(), bank.available[:, 1:].sum()
    assert gate["judged"] == made
    assert gate["rejected"] == made - shown
    assert gate["rejected_share"] == gate["rejected"] / made


def test_the_gate_asks_the_judge_what_moved(done: Pipeline) -> None:
    """Of every stored pair, as the judge reads it."""
    bank, table = done.generation.bank, done.table
    judge = done.generation.measure(done.recipe.audit.judge)  # type: ignore[union-attr]
    items, slots = np.nonzero(bank.made[:, 1:])
    with torch.no_grad():
        real, made = (
            judge(to_signed(bank.gather(items, where))) for where in (np.zeros_like(items), slots + 1)
        )
    disease = (real["disease"].softmax(1) - made["disease"].softmax(1))[:, 1].abs()
    age = (real["age"][:, 0] - made["age"][:, 0]).abs()  # in standard deviations as it is
    accepted = np.ones(len(items), dtype=bool)
    for name, change in (("disease", disease), ("age", age)):
        found = bank.index[f"change.{name}"].to_numpy().reshape(bank.made.shape)[items, slots + 1]
        np.testing.assert_allclose(found, change, atol=1e-4)
        most = done.recipe.bank.gate.unchanged[name]  # type: ignore[union-attr]
        rejected = bank.gate["reasons"][f"unchanged.{name}"]["rejected"]  # type: ignore[index]
        assert rejected == (found > most).sum()
        accepted &= found <= most
    quality = bank.index["quality"].to_numpy().reshape(bank.made.shape)[items, slots + 1]
    np.testing.assert_array_equal(bank.available[items, slots + 1], accepted & (quality >= 0.3))
    assert table.fingerprint == bank.plan.table


def test_what_the_gate_rejects_is_printed(
    done: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, recipe = done.generation.bank, done.folder / "recipe.yaml"
    assert bank.gate is not None
    for words in (("build", recipe, "--runs", done.runs), ("show", recipe, "--runs", done.runs)):
        code, printed = call(monkeypatch, capsys, "bank", *words, "--quiet")
        assert (code, printed.splitlines()[-2]) == (0, gate_text(bank.gate))
    code, printed = call(monkeypatch, capsys, "bank", "verify", bank.path, "--quiet")
    assert (code, printed.splitlines()[0]) == (0, gate_text(bank.gate))


def test_the_audit_measures_every_do_and_one_that_draws_its_values(done: Pipeline) -> None:
    record = done.generation.audited()
    names = ["scanner=A", "scanner=B", "scanner=C", "scanner=D", "scanner"]
    assert list(record["amplification"]["matrix"]) == list(record["truth"]) == names
    assert record["n"] == 30
    assert record["generator"] == done.generation.generator.fingerprint  # type: ignore[union-attr]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str]:
    """The entry point in this process: exit code and what it printed, standard error last."""
    monkeypatch.setattr(sys, "argv", ["cfssl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out + printed.err


@pytest.mark.parametrize(
    ("verb", "page"), [(("bank", "audit"), "audit/audit.html"), (("report",), "report.html")]
)
def test_bank_audit_and_report_write_the_page_of_the_audit(
    done: Pipeline,
    verb: tuple[str, ...],
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, folder = done.folder / "recipe.yaml", done.folder / "audit"
    shutil.rmtree(folder, ignore_errors=True)
    code, printed = call(monkeypatch, capsys, *verb, recipe, "--runs", done.runs, "--quiet")
    assert code == 0
    assert printed.strip().endswith(str(done.folder / page))
    files = {file.name for file in folder.iterdir()}
    assert {"audit.html", "audit.md", "amplification.png", "axioms.png", "counterfactuals.png"} <= files
    assert "do(scanner=B)" in (folder / "audit.md").read_text()


def test_a_judge_that_is_the_guide_is_refused_with_a_sentence(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_recipe(done.folder / "recipe.yaml").model_dump(mode="json")
    content["audit"]["judge"] = content["finetune"]["rules"][0]["guide"]
    (tmp_path / "same.yaml").write_text(json.dumps(content))
    code, printed = call(monkeypatch, capsys, "bank", "audit", tmp_path / "same.yaml", "--runs", tmp_path)
    assert code == 2
    assert "audit.judge is the very guide of finetune.rules[0]" in printed


def test_an_audit_of_a_recipe_without_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = job(tmp_path, audit=None, finetune=None, bank={"do": {"scanner": "all"}})
    write_recipe(plain.recipe, tmp_path / "plain.yaml")
    code, printed = call(monkeypatch, capsys, "bank", "audit", tmp_path / "plain.yaml", "--runs", tmp_path)
    assert code == 2
    assert "The recipe tiny has no audit" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pos_seg", "seg"])
def test_an_area_is_set_by_an_area_rule_and_measured_by_an_independent_segmentor(
    tmp_path: Path, name: str
) -> None:
    areas = ["left_upper_area", "left_middle_area", "left_lower_area"]
    guide = {**SEGMENTOR, "part": "first", "train": QUICK}
    made = job(
        tmp_path,
        generator={**TINY["generator"], "parents": areas},
        finetune={"rules": [{"name": name, "guide": guide}], "train": {"epochs": 1}},
        bank={"do": {"left_upper_area": [3.2]}},
        audit={**TINY["audit"], "segmentor": SEGMENTOR},
    )
    (view, found), *others = made.generation.audited()["areas"].items()
    assert (view, others) == ("left_upper_area=3.2", [])
    assert set(found["names"]) == set(areas)
    assert found["target"]["percent"]["value"] >= 0
    assert found["names"]["left_middle_area"]["target"]["percent"]["value"] is None  # it is never set
