"""The verbs. Thin: each loads a recipe and asks the pipeline for a product. Heavy imports live inside the
verbs."""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cfssl.engine.interruption import Interrupted, Interruption
from cfssl.engine.world import world
from cfssl.errors import UserError

if TYPE_CHECKING:
    from cfssl.bank.store import Bank
    from cfssl.pipeline import Pipeline

app = typer.Typer(
    help="Self-supervised pre-training with counterfactual augmentations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank_app = typer.Typer(help="The store of images and their counterfactuals.", no_args_is_help=True)
app.add_typer(bank_app, name="bank")

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/phantom_cf_simclr.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.epochs=10.")
]
Runs = Annotated[Path, typer.Option("--runs", envvar="CFSSL_RUNS", help="Where stages and results are kept.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
RUNS = Path("runs")

INTERRUPTION = Interruption()  # listens while a verb runs
# What the user's disks and permissions can be blamed for. A missing file is not among these: where a recipe
# names one, the code says so itself, and elsewhere it is a mistake of ours that needs its traceback.
PERMISSION = "check its permissions, or choose another place, e.g. with --runs"
SPACE = "free space there, or choose another place, e.g. with --runs"
PLACE = "a file is in the way, or the name is none; choose another place, e.g. with --runs"
PLACES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), PERMISSION),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), SPACE),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), PLACE),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the mount, and run again"),
}


def pipeline(recipe: Path, overrides: list[str] | None, runs: Path, quiet: bool = False) -> "Pipeline":
    from cfssl.pipeline import Pipeline
    from cfssl.recipe import load_recipe

    return Pipeline(load_recipe(recipe, overrides or ()), runs, quiet, INTERRUPTION)


@app.command()
def demo(overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False) -> None:
    """The whole pipeline on the embedded phantom: SimCLR, SimCLR+ and CF-SimCLR, per scanner, in one
    report."""
    from cfssl.demo import run_demo

    print(run_demo(runs, overrides or (), quiet, INTERRUPTION))


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False) -> None:
    """Everything a recipe describes; what exists is reused."""
    from cfssl.summary import report_of

    job = pipeline(recipe, overrides, runs, quiet)
    job.run()
    path = report_of(job)
    for record in job.production.used.values():
        print(f"{record['stage']:<11} {'reused' if record['reused'] else 'made  '} {record['folder']}")
    print(path)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False) -> None:
    """What a recipe and its data were understood to be, and what would run; trains nothing."""
    from cfssl.check import describe

    describe(pipeline(recipe, overrides, runs, quiet))


@app.command()
def schema() -> None:
    """The JSON schema of recipes, for editors."""
    import json

    from cfssl.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def fit(recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False) -> None:
    """Fit the generator of a recipe."""
    job = pipeline(recipe, overrides, runs, quiet)
    if job.generation.generator_stage is None or job.generation.generator is None:
        raise UserError(f"The recipe {recipe} has no generator to fit; add a generator section.")
    print(job.generation.generator_stage.folder)


@app.command()
def silver(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New .npz; a .png is written beside it.")],
    overrides: Overrides = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
) -> None:
    """Make silver masks for a recipe's table; writes them with it as a table, and a sheet of the most and
    the least confident ones."""
    from cfssl.sheets import silver_sheet

    job = pipeline(recipe, overrides, runs, quiet)
    job.labelling.export(output)
    silver_sheet(job, output.with_suffix(".png"))
    for line in (*job.labelling.score_text(), output, output.with_suffix(".png")):
        print(line)


@bank_app.command("build")
def bank_build(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    check: Annotated[
        bool, typer.Option("--check", help="Make shards again whose bytes fail their checksum.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX/COUNT",
            help="Only the shards of this part, counted from 0; or array: the part that SLURM names.",
        ),
    ] = None,
) -> None:
    """Write the counterfactuals of a recipe's training images."""
    job = pipeline(recipe, overrides, runs, quiet)
    if part is not None:
        from cfssl.bank.parts import Part

        chosen = Part.parse(part, os.environ)
        shards = job.generation.build_part(chosen.index, chosen.count, check)
        print(
            f"{job.generation.bank_stage.folder / 'bank'}: part {chosen.index} of {chosen.count}, "
            f"{len(shards)} shards"
        )
        return
    if job.generation.bank_stage.done:
        job.generation.build_bank(job.generation.bank_stage.folder, check)  # mends what was lost since
    _print_gate(job.generation.bank)
    print(job.generation.bank.path)


@bank_app.command("finish")
def bank_finish(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    parts: Annotated[
        int | None, typer.Option(min=1, help="Of how many parts; those with missing shards are named.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a bank of its parts, when all of them are built."""
    bank = pipeline(recipe, overrides, runs, quiet).generation.finish_bank(parts)
    _print_gate(bank)
    print(bank.path)


@bank_app.command("verify")
def bank_verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a bank.")],
    jobs: Annotated[int, typer.Option(min=1, help="How many processes.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Check every shard and every view against its checksum."""
    from cfssl.bank.store import Bank
    from cfssl.bank.verify import verify
    from cfssl.engine.progress import ProgressBar

    bank = Bank.open(folder)
    with ProgressBar("verify", total=bank.shard_count, unit="shards", quiet=quiet) as bar:
        broken = verify(bank, lambda done, total: bar.advance(items=1), jobs)
    if broken:
        raise UserError(
            f"The bank {folder} is damaged: {'; '.join(broken)}. Delete the named shards and build the bank "
            "again."
        )
    _print_gate(bank)
    print(f"{folder}: {len(bank)} images, {bank.shard_count} shards, all checksums agree")


@bank_app.command("show")
def bank_show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    output: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    items: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    quiet: Quiet = False,
) -> None:
    """A contact sheet: originals beside their counterfactuals (and the truth, where there is one)."""
    from cfssl.sheets import bank_sheet

    job = pipeline(recipe, overrides, runs, quiet)
    path = output or job.folder / "bank.png"
    bank_sheet(job, path, items)
    _print_gate(job.generation.bank)
    print(path)


@bank_app.command("audit")
def bank_audit(
    recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False
) -> None:
    """Measure a recipe's generator: every axiom, amplification, and the truth where it is known."""
    from cfssl.summary import audit_page

    print(audit_page(pipeline(recipe, overrides, runs, quiet)))


@app.command()
def pretrain(
    recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False
) -> None:
    """Train the encoder of a recipe."""
    job = pipeline(recipe, overrides, runs, quiet)
    job.objective  # noqa: B018
    print(job.encoder_stage.folder)


@app.command()
def evaluate(
    recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False
) -> None:
    """Evaluate the encoder of a recipe; prints the value of every group."""
    from cfssl.summary import print_result

    for result in pipeline(recipe, overrides, runs, quiet).evaluation.results():
        print_result(result)


@app.command()
def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, and overrides for all.")
    ],
    profile: Annotated[
        Path | None, typer.Option(help="What jobs get, e.g. slurm/profiles/one_gpu.yaml.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="slurm, local or debug, instead of the profile's.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Values of a key, e.g. train.seed=0,1,2; several: all combinations."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs, submit none.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Make what recipes describe by jobs of a cluster; stages that are there, or under way, are left out."""
    from cfssl.launch.profile import load_profile
    from cfssl.launch.status import live_steps
    from cfssl.launch.submission import Submission, described, plan
    from cfssl.launch.sweeps import pipelines

    chosen = load_profile(profile, cluster)
    jobs = pipelines(words, sweep or (), runs)
    live = live_steps(runs) if chosen.cluster == "slurm" else {}
    found = plan(jobs, chosen, live)
    for line in described(found, chosen):
        print(line)
    if not dry_run:
        submission = Submission.new(runs)
        submission.submit(found, chosen)
        print(submission.folder)


@app.command()
def status(
    number: Annotated[
        int | None, typer.Argument(metavar="[NUMBER]", help="Of a submission; default: the last.")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Where the jobs of a submission are, and why some failed."""
    from rich.console import Console

    from cfssl.launch.status import as_table, status, submission_of

    Console(width=None if sys.stdout.isatty() else 200).print(
        as_table(status(runs, submission_of(runs, number)))
    )


@app.command()
def chromap(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="How many images.")] = None,
    preset: Annotated[str | None, typer.Option(help="default, or paper (needs the extra umap).")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of CHRO-maps of the same images, whose colours are kept.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Colour the pixels of images and counterfactuals by their embeddings, with an interactive page."""
    from cfssl.chromaps import asked_for, chromaps_of

    job = pipeline(recipe, overrides, runs, quiet)
    settings = asked_for(job.recipe.chromap, images, preset)
    folder = output or job.folder / "chromap"
    chromaps_of(job, folder, settings, reference)
    print(folder / "chromap.html")


@app.command()
def export(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Argument(help="New folder for model.safetensors and config.json.")],
    overrides: Overrides = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
) -> None:
    """Write the encoder in timm's layout: timm.create_model('local-dir:FOLDER', pretrained=True) loads it."""
    pipeline(recipe, overrides, runs, quiet).export(folder)
    print(folder)


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, quiet: Quiet = False) -> None:
    """Write the report page of a recipe."""
    from cfssl.summary import report_of

    print(report_of(pipeline(recipe, overrides, runs, quiet)))


def main() -> None:
    """The entry point: a `UserError`, and what only the user's machine can be blamed for, is printed as one
    sentence, with exit code 2; an interruption with 128 and the number of its signal."""
    # Threads of the numerical libraries are set before they are imported; a job's own allotment counts, not
    # the machine's.
    if "SLURM_CPUS_PER_TASK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    # What torch warns of in C++ is meant: a store that is gone, parameters that nothing depends on.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with INTERRUPTION.listening():
            if world().size == 1:
                app()
            else:
                from cfssl.pipeline import lead

                lead(app, INTERRUPTION)
    except UserError as error:
        _stop(2, str(error))
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = error.filename2 or error.filename or "a file"
        _stop(2, f"{where} cannot be used ({error.strerror}); {PLACES[error.errno]}.")
    except Interrupted as stop:
        _stop(128 + stop.number, f"interrupted ({stop}); the same command goes on where it stopped.")


def _print_gate(bank: "Bank") -> None:
    from cfssl.bank.gate import gate_text

    if bank.gate is not None:
        print(gate_text(bank.gate))


def _stop(code: int, sentence: str) -> NoReturn:
    print(f"cfssl: {sentence}", file=sys.stderr)
    sys.exit(code)
