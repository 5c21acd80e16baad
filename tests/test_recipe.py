"""Recipes: every mistake at once with path, value and nearest name; bases; every shipped recipe is valid.

That every key acts is tested in test_keys.py.
"""

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cfssl.errors import UserError
from cfssl.experiment import Recipe
from cfssl.recipe import load_recipe, parse_recipe, recipe_schema, write_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = """
name: small
data: {name: phantom_chest, count: 400}
generator: {name: oracle, parents: [scanner]}
bank: {do: {scanner: all}}
views: {counterfactual: {variable: scanner}}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(file: Path) -> None:
    assert load_recipe(file).name
    assert file.read_text().startswith(f"# cfssl run recipes/{file.name}")


def test_five_mistakes_are_reported_together(tmp_path: Path) -> None:
    text = """
name: broken
data: {name: phantom_chest, cuont: 400}
objective: {name: simclr, temperature: -1}
train: {epochs: many, lr: 0.1}
backbone: {name: "None"}
evaluate: [{name: linear_prob, target: disease}]
"""
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    message = str(caught.value)
    assert "has 5 mistake(s)" in message
    assert "data.cuont = 400: unknown key; did you mean 'count'?" in message
    assert "objective.temperature = -1: input should be greater than 0" in message
    assert "train.epochs = 'many': input should be a valid integer" in message
    assert "backbone.name = 'None': write null for nothing" in message
    assert "evaluate[0].name = 'linear_prob'" in message
    assert "did you mean 'linear_probe'?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.name=simclrr", "objective.name = 'simclrr': unknown name; did you mean 'simclr'?"),
        ("data.name=phantom_chset", "did you mean 'phantom_chest'?"),
        ("train.epcohs=3", "train.epcohs = 3: unknown key; did you mean 'epochs'?"),
        ("views.counterfactual.view=5", "names view 5, but the views are 0..1"),
        ("views.counterfactual.variable=sex", "is 'sex', but bank.do intervenes on ['scanner']"),
        ("views.count=4", "simclr takes 2 views, but views.count is 4"),
        ("views.count=3", "view is second_half, but there are 3 views; make them even or number them"),
        ("views.counterfactual.view=half", "input should be 'second_half' or 'all'"),
        ("views.counterfactual.view=[-1]", "view[0] = -1: input should be greater than or equal to 0"),
        ("views.local={count: 4}", "views.local.size is missing"),
        ("train.accumulate=3", "train.batch (256) is not a multiple of train.accumulate (3)"),
        ("train.accumulate=4", "train.accumulate is 4, but objective simclr compares"),
        (
            "hardware.devices=3",
            "train.batch (256) is not a multiple of train.accumulate x hardware",
        ),
        ("hardware.strategy=fsdp", "hardware.strategy is fsdp, but there is one process"),
        (
            "hardware={devices: 2, strategy: fsdp, precision: 16-mixed}",
            "hardware.strategy fsdp knows no loss scale; set hardware.precision: bf16-mixed",
        ),
        (
            "hardware={devices: 2, strategy: fsdp}\nmonitor={}",
            "hardware.strategy fsdp leaves no process with a whole encoder; set monitor: null",
        ),
        (
            "hardware={devices: 2, strategy: fsdp}\ninit={backbone: timm, head_warmup: 1}",
            "hardware.strategy fsdp cannot hold a part of the weights; set init.head_warmup: 0",
        ),
        (
            "objective={name: dinov2, centring: sinkhorn, koleo_weight: 0.0}\ntrain.accumulate=4",
            "train.accumulate is 4, but objective dinov2 with centring sinkhorn compares",
        ),
        (
            "objective.name=dinov2\ntrain.accumulate=4",
            "objective dinov2 with koleo_weight 0.1 compares the images of a micro-batch with each other, 64",
        ),
        ("objective.name=dinov2\nviews.count=4", "dinov2 takes 2 views, but views.count is 4"),
        (
            "views.local={size: 16}",
            "views.local is given, but objective simclr looks at the other views alone",
        ),
        ("objective.name=vicreg\ntrain.accumulate=4", "but objective vicreg compares the images"),
        ("backbone.options={img_size: 32}", "options holds ['img_size'], which follows from other keys"),
        ("views.counterfactual.view=[]", "view is []; name at least one view"),
        ("views.counterfactual.view=[1,1]", "view is [1, 1]; name at least one view, and each once"),
        ("views.counterfactual.shared=true", "counterfactual.shared acts on several views, and view names 1"),
        ("views.counterfactual.target={}", "target is {}; give at least one value a weight above 0"),
        ("views.counterfactual.target={A: 0.0}", "give at least one value a weight above 0"),
        ("views.counterfactual.target={A: 1.0}", "probability balanced makes the domains uniform"),
        ("views.counterfactual.target=rare", "probability balanced makes the domains uniform"),
        (
            "views.counterfactual.variable=[scanner,sex]",
            "variable is ['scanner', 'sex'], but bank.do intervenes on ['scanner']; to set these together "
            "write bank.do: [{scanner: all, sex: all}]",
        ),
        (
            "bank.do=[{scanner: all, sex: all}]",
            "is 'scanner', but bank.do intervenes on [['scanner', 'sex']]",
        ),
        ("silver={segmentor: {structures: [lung]}}", "silver.data is missing"),
        (
            "silver={data: {name: phantom_chset}}",
            "silver.data.name = 'phantom_chset': unknown name; did you mean",
        ),
        (
            "silver={data: {name: phantom_chest, cuont: 4}, segmentor: {structures: [lung]}}",
            "silver.data.cuont = 4: unknown key; did you mean 'count'?",
        ),
        ("silver={threshold: 1.0}", "silver.threshold = 1.0: input should be less than 1"),
        (
            "silver={data: {name: phantom_chest}, segmentor: {structures: [lung], train: {accumulate: 3}}}",
            "silver.segmentor.train.batch (32) is not a multiple of silver.segmentor.train.accumulate (3)",
        ),
        ("bank.do=[{}]", "bank.do[0] = {}: dictionary should have at least 1 item"),
        ("bank.do=scanner", "bank.do = 'scanner': input should be a valid tuple"),
        ("bank.do={scanner: some}", "bank.do.scanner = 'some'"),
        ("generator=null", "there is no generator"),
        ("bank.do={}", "bank.do is empty"),
        ("bank.do={age: [40.0]}", "not among the generator's variables ['scanner']"),
        ("views.photometric.blur_sigma=[2,1]", "must not be above the second"),
        ("views.photometric.blur_sigma=[0,1]", "blur_sigma[0] = 0: input should be greater than 0"),
        ("views.photometric.erase_scale=[0.5,1.5]", "should be less than or equal to 1"),
        ("views.photometric.noise=2", "views.photometric.noise = 2: input should be less than or equal to 1"),
        ("views.photometric.contrast=1.5", "contrast = 1.5: input should be less than or equal to 1"),
        ("views.geometry.crop_scale=[0,1]", "crop_scale[0] = 0: input should be greater than 0"),
        ("views.geometry.crop_scale=[0.5,2]", "crop_scale[1] = 2: input should be less than or equal to 1"),
        ("views.geometry.crop_ratio=[-1,1]", "crop_ratio[0] = -1: input should be greater than 0"),
        ("views.geometry.rotation=270", "rotation = 270: input should be less than or equal to 180"),
        ("train.betas=[0.9,1.0]", "train.betas[1] = 1.0: input should be less than 1"),
        ("train.skip_factor=0.5", "train.skip_factor = 0.5: input should be greater than 1"),
        ("init={backbone: timm, head_warmup: 50}", "init.head_warmup is 50 and train.epochs 50"),
        ("init={backbone: timm, min_matched: 2}", "init.min_matched = 2: input should be less than or equal"),
        ("init.head_warmup=1", "init.backbone is missing"),
        ("backbone.drop_path=1.0", "backbone.drop_path = 1.0: input should be less than 1"),
        ("name=a b", "name = 'a b'"),
    ],
)
def test_each_impossible_setting_is_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match="mistake") as caught:
        load_recipe(write(tmp_path, SMALL), override.split("\n"))
    assert expected in str(caught.value)


TUNED = (
    SMALL.replace("{name: oracle, parents: [scanner]}", "{name: hvae, parents: [scanner, sex]}")
    + """
finetune: {rules: [{name: soft, guide: {attributes: [scanner, sex]}}]}
audit: {judge: {attributes: [scanner], part: second}}
"""
)
ORACLE = "{name: oracle, parents: [scanner, sex]}"
BOTH = "{do: {sex: all, scanner: all}, gate: {}}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"generator={ORACLE}"], "finetune changes an hvae, but generator is not one"),
        (["finetune.do=[age]"], "finetune.do intervenes on ['age']"),
        (["finetune.rules=[]"], "finetune.rules = []"),
        (
            ["finetune.rules=[{name: sofft, guide: {attributes: [sex]}}]"],
            "finetune.rules[0].name = 'sofft': unknown name; did you mean 'soft'?",
        ),
        (
            ["finetune.rules=[{name: soft, guide: {attributes: [age, sex]}}]"],
            "finetune.rules[0].guide predicts ['age'], which the generator does not know",
        ),
        (["bank.do={}"], "audit looks at the counterfactuals of bank.do, which is empty"),
        (["bank.gate={}", "audit=null"], "bank.gate drops views that audit.judge disagrees with"),
        ([f"bank={BOTH}"], "bank.gate asks audit.judge about ['sex']"),
        (
            ["bank.gate.unchanged={disease: 0.3, scanner: 0.3}"],
            "bank.gate.unchanged asks audit.judge about ['disease'], which it does not predict",
        ),
        (["bank.gate.unchanged={scanner: 0}"], "gate.unchanged.scanner = 0: input should be greater than 0"),
        (
            ["audit.judge.part=all", "audit.judge.attributes=[scanner, sex]"],
            "audit.judge is the very guide of finetune.rules[0]",
        ),
        (
            ["audit.judge.train.batch=9", "audit.judge.train.accumulate=2"],
            "audit.judge.train.batch (9) is not a multiple of audit.judge.train.accumulate (2)",
        ),
        (["bank.gate.probability=1.5"], "bank.gate.probability = 1.5: input should be less than"),
    ],
)
def test_each_impossible_guide_judge_or_gate_is_named(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    assert load_recipe(write(tmp_path, TUNED)).finetune is not None
    with pytest.raises(UserError, match="mistake") as caught:
        load_recipe(write(tmp_path, TUNED), overrides)
    assert expected in str(caught.value)


def test_accumulation_is_for_objectives_that_average_over_images(tmp_path: Path) -> None:
    supervised = ["objective={name: supervised, target: disease}", "train.accumulate=4"]
    assert load_recipe(write(tmp_path, SMALL), supervised).train.accumulate == 4
    dinov2 = ["objective={name: dinov2, koleo_weight: 0.0}", "train.accumulate=4"]
    assert load_recipe(write(tmp_path, SMALL), dinov2).train.accumulate == 4


def test_overrides_reach_nested_keys_and_lists(tmp_path: Path) -> None:
    overrides = ["train.lr=1e-4", "views.counterfactual.view=[0,1]", "views.counterfactual.shared=true"]
    recipe = load_recipe(write(tmp_path, SMALL), overrides)
    assert recipe.train.lr == 1e-4
    assert recipe.views.counterfactual is not None
    assert recipe.views.counterfactual.view == (0, 1)
    with pytest.raises(UserError, match=r"'train' is not of the form key\.path=value"):
        load_recipe(write(tmp_path, SMALL), ["train"])


def test_a_base_is_inherited_and_a_renamed_section_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "objective: {name: simclr, temperature: 0.3}\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\nname: child\ntrain: {epochs: 3}\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.epochs, recipe.data.count) == ("child", 3, 400)  # type: ignore[union-attr]
    assert recipe.objective.temperature == 0.3  # type: ignore[union-attr]
    other = write(
        tmp_path, "base: child.yaml\nname: o\nobjective: {name: supervised, target: disease}\n", "other.yaml"
    )
    assert load_recipe(other).objective.name == "supervised"


def test_a_circle_of_bases_and_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="circle"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"did you mean a\.yaml\?"):
        load_recipe(tmp_path / "aa.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(write(tmp_path, "name: [", "bad.yaml"))
    with pytest.raises(UserError, match="not sections"):
        load_recipe(write(tmp_path, "- a\n", "list.yaml"))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_resolved_recipe_reads_back_as_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    write_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@given(
    st.dictionaries(
        st.sampled_from(["name", "data", "train", "views", "x"]), st.none() | st.integers() | st.text()
    )
)
def test_nonsense_is_one_error_never_a_crash(content: dict) -> None:
    with pytest.raises(UserError, match="mistake"):
        parse_recipe(content, "nonsense")


def test_the_schema_names_every_section() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "base"}
    assert "PhantomChestSettings" in schema["$defs"]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_editor_accepts_every_recipe_that_ships(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), recipe_schema())


@pytest.mark.parametrize(
    "content",
    [
        {"train": {"epoch": 3}},
        {"train": {"epochs": "many"}},
        {"views": {"counterfactual": {"view": "one"}}},
        {"objective": {"name": "simclr", "temprature": 0.1}},
    ],
)
def test_an_editor_marks_mistakes(content: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, recipe_schema())


def test_none_is_a_text_like_others_where_a_tables_missing_texts_are_declared(tmp_path: Path) -> None:
    data = {"name": "table", "path": "own.csv", "missing": ["None"]}
    silver = {"data": data, "segmentor": {"structures": ["lung"]}}
    content = {"name": "own", "data": data, "silver": silver}
    recipe = parse_recipe(content, "own")
    assert recipe.data.missing == recipe.silver.data.missing == ("None",)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="write null for nothing"):
        parse_recipe(content | {"generator": "None"}, "own")
