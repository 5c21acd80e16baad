"""What is submitted: every stage once, after what it needs, and nothing that is there or under way."""

from pathlib import Path
from typing import Any

import pytest

from cfssl.errors import UserError
from cfssl.files import write_json
from cfssl.launch.profile import Profile, load_profile
from cfssl.launch.steps import steps
from cfssl.launch.submission import Plan, Submission, described, plan, sbatch_parameters
from cfssl.launch.sweeps import pipelines
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe

ROOT = Path(__file__).parent.parent.parent
RECIPE: dict[str, Any] = {
    "name": "one",
    "data": {"name": "phantom_chest", "count": 240},
    "generator": {"name": "hvae", "parents": ["scanner"]},
    "bank": {"do": {"scanner": "all"}},
    "views": {"counterfactual": {"variable": "scanner", "view": 1}},
    "objective": {"name": "simclr"},
    "backbone": {"name": "test_byobnet"},
    "evaluate": [{"name": name, "target": "disease"} for name in ("linear_probe", "knn")],
}
GATED = RECIPE | {
    "name": "gated",
    "bank": RECIPE["bank"] | {"gate": {}},
    "finetune": {"rules": [{"name": "soft", "guide": {"attributes": ["scanner"]}}]},
    "audit": {"judge": {"attributes": ["scanner"], "part": "second"}},
}


def job(runs: Path, recipe: dict[str, Any] = RECIPE, **changes: Any) -> Pipeline:
    return Pipeline(parse_recipe(recipe | changes, "x"), runs, quiet=True)


def needs(found: Plan) -> dict[str, set[str]]:
    """Kind of a job -> kinds it waits for, of plans in which every kind is there once."""
    kind = {of.key: of.kind for of in found.jobs}
    return {of.kind: {kind[key] for key in of.needs} for of in found.jobs}


def test_every_stage_of_a_recipe_is_a_step_and_comes_after_what_it_needs(tmp_path: Path) -> None:
    for recipe in (RECIPE, GATED):
        own = job(tmp_path, recipe)
        found = steps(own)
        names = [step.name for step in found]
        assert names[:-1] == list(dict.fromkeys(names[:-1]))
        assert {stage.folder.name for stage in own.stages()} == set(names[:-1])
        for place, step in enumerate(found):
            assert set(step.needs) <= set(names[:place])


def test_jobs_wait_for_what_they_need_and_for_nothing_that_is_implied(tmp_path: Path) -> None:
    found = plan([job(tmp_path)], Profile())
    assert needs(found) == {
        "table": set(),
        "generator": {"table"},
        "bank": {"generator"},
        "encoder": {"bank"},
        "features": {"encoder"},
        "evaluation": {"features"},
        "report": {"evaluation"},
    }
    assert [of.kind for of in found.jobs].count("evaluation") == 2
    kinds = {of.key: of.kind for of in plan([job(tmp_path, GATED)], Profile()).jobs}
    waits = {
        of.key: sorted(kinds[key] for key in of.needs) for of in plan([job(tmp_path, GATED)], Profile()).jobs
    }
    (bank,) = (key for key, kind in kinds.items() if kind == "bank")
    assert waits[bank] == ["generator", "measure"]
    (audit,) = (key for key, kind in kinds.items() if kind == "audit")
    assert set(waits[audit]) == {"generator", "measure"}


def test_recipes_share_the_jobs_of_their_common_stages(tmp_path: Path) -> None:
    other = job(tmp_path, RECIPE | {"name": "other", "train": {"seed": 1}})
    found = plan([job(tmp_path), other], Profile())
    kinds = [of.kind for of in found.jobs]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "table": 1,
        "generator": 1,
        "bank": 1,
        "encoder": 2,
        "features": 2,
        "evaluation": 4,
        "report": 2,
    }
    with pytest.raises(UserError, match="Two different recipes are called 'one'"):
        plan([job(tmp_path), job(tmp_path, train={"seed": 1})], Profile())


def test_what_is_there_or_under_way_is_not_submitted_again(tmp_path: Path) -> None:
    own = job(tmp_path)
    table, generator = own.table_stage, own.generation.generator_stage
    assert generator is not None
    table.product.parent.mkdir(parents=True)
    table.product.touch()
    write_json(table.folder / "done.json", {})
    found = plan([own], Profile(), {generator.folder.name: ("17",)})
    assert found.done == [table.folder.name]
    assert found.waiting == {generator.folder.name: ("17",)}
    assert found.jobs[0].kind == "bank"
    assert found.jobs[0].waits == ("17",)
    assert found.jobs[0].needs == ()
    lines = described(found, Profile())
    assert lines[0] == f"there already: {table.folder.name}"
    assert lines[1] == f"waits for job 17: {generator.folder.name}"


def test_a_bank_in_parts_is_an_array_and_a_job_that_puts_it_together(tmp_path: Path) -> None:
    profile = Profile(steps={"bank": {"parts": 3}})
    parts, whole = (of for of in plan([job(tmp_path)], profile).jobs if of.kind == "bank")
    assert (parts.parts, parts.indices, whole.parts) == (3, (0, 1, 2), None)
    assert whole.needs == (parts.key,)
    assert parts.step == whole.step


def test_of_a_bank_in_parts_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    """Three parts of six shards; what is lost of one of them is submitted alone, and nothing when it is
    there."""
    oracle = {"name": "oracle", "parents": ["scanner"]}
    data = RECIPE["data"] | {"count": 400}
    changes: dict[str, Any] = {"generator": oracle, "data": data, "train": {"batch": 48}}
    own = job(tmp_path, **changes, bank=RECIPE["bank"] | {"shard_megabytes": 1})
    profile, generation = Profile(steps={"bank": {"parts": 3}}), own.generation
    own.table, generation.generator  # noqa: B018
    for index in range(3):
        generation.build_part(index, 3)
    shards = sorted((generation.bank_stage.folder / "bank").glob("shard-*.json"))
    assert len(shards) >= 4
    assert [of.key for of in plan([own], profile).jobs if of.kind == "bank"] == [
        generation.bank_stage.folder.name
    ]
    shards[-1].unlink()
    parts, _ = (of for of in plan([own], profile).jobs if of.kind == "bank")
    assert (parts.parts, parts.indices) == (3, (2,))


def test_a_profile_says_what_each_kind_gets(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "all: {partition: gpu, cpus: 4}\nsetup: [a b]\n"
        "steps: {encoder: {nodes: 2, gpus: 3, slurm: {nice: 5}}}\n"
    )
    profile = load_profile(path)
    encoder, table = (sbatch_parameters(profile, kind, "x") for kind in ("encoder", "table"))
    assert encoder["nodes"] == 2
    assert encoder["tasks_per_node"] == encoder["gpus_per_node"] == 3
    assert encoder["slurm_additional_parameters"] == {"requeue": True, "nice": 5}
    assert table["tasks_per_node"] == 1
    assert "gpus_per_node" not in table
    assert table["slurm_partition"] == "gpu"
    assert table["slurm_setup"] == ["a b"]
    assert load_profile(path, "local").cluster == "local"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: {encodr: {}}", "steps.encodr"),
        ("all: {minuts: 3}", "minuts"),
        ("steps: {table: {parts: 2}}", "steps.table.parts: only a bank is made in parts"),
        ("steps: {bank: {nodes: 2}}", "steps.bank: only an encoder is trained by several tasks"),
        ("cluster: slum", "cluster: input should be 'slurm', 'local' or 'debug'"),
        ("a: [", "is not valid YAML"),
        ("- 1", "holds list, expected a mapping"),
    ],
)
def test_a_mistaken_profile_is_refused_with_its_place(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "slurm" / "profiles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_profiles_that_ship_are_right(path: Path) -> None:
    assert load_profile(path).resources("encoder").minutes >= 1


def test_a_sweep_is_all_combinations_each_under_a_name_of_its_own(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "phantom_simclr.yaml")
    found = pipelines(
        [recipe, "train.epochs=3"], ["train.seed=0,1", "objective.temperature=0.1, 0.2"], tmp_path
    )
    assert [of.recipe.name for of in found] == [
        f"phantom-simclr-seed-{seed}-temperature-{temperature}"
        for seed in (0, 1)
        for temperature in (0.1, 0.2)
    ]
    assert [(of.recipe.train.seed, of.recipe.train.epochs) for of in found] == [
        (0, 3),
        (0, 3),
        (1, 3),
        (1, 3),
    ]
    assert len({of.encoder_stage.key for of in found}) == 4
    with pytest.raises(UserError, match=r"sweep 'train\.seed' is not of the form"):
        pipelines([recipe], ["train.seed"], tmp_path)
    with pytest.raises(UserError, match="is a recipe"):
        pipelines(["train.seed=1"], [], tmp_path)


def test_no_two_submissions_share_a_folder(tmp_path: Path) -> None:
    found = [Submission.new(tmp_path).folder.name for _ in range(3)]
    assert found == ["0001", "0002", "0003"]
