"""How fast is the small HVAE beside the published network of 2 M parameters, and at which quality?

    python benchmarks/generation_speed.py --data-root PATH [--minutes 4] [--jobs 2]

Part one, in one process with one thread: the milliseconds of CPU time that an image takes in abduct +
predict, in a step of training and in a step of counterfactual fine-tuning; on an idle core that is the time
that passes. The networks take turns within a repeat, a ratio is
taken within a repeat, each network has its better batch size of 32 and 64, and a figure is the median over
repeats. Part two: both are trained on the same digits for the same time, the published one for the number of
whole epochs that fill `--minutes`, ours for no more time than that, and scored on the test digits. Three
seeds. Resumable: everything lives in content-addressed stages; for trustworthy speeds let nothing else run
during part one.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import base, finished, in_processes, load_arrays, plain, save_arrays
from axioms import UNITS, VARIABLES, Rulers, Scores, compositions, digits_of, digits_table, effects
from morphomnist_axioms import SCORE_CODE, finetune_settings, generator_settings, predictor_settings
from record import markdown_table, over_repeats, over_seeds, with_interval, write_results

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.morphomnist import PARENTS
from cfssl.data.table import ImageTable
from cfssl.files import read_json, write_json
from cfssl.generators.finetune import FinetuneTask, value_limits
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_deep import PublishedNetworkSettings
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import S_HVAE_32, SmallNetworkSettings
from cfssl.generators.hvae_training import HVAETask, free_energy
from cfssl.generators.targets import AttributeRule, Counterfactual
from cfssl.measure.predictor import AttributePredictor
from cfssl.provenance import fingerprint
from cfssl.seeds import torch_generator
from cfssl.stages import FINETUNE_CODE, keyed_stage

SEEDS = (0, 1, 2)
ARMS = ("small", "published")
BATCHES = (32, 64)
FINE_BATCH = 32
REPEATS = 15
SAME_LIKELIHOOD = "gaussian"  # a third network of the speeds alone
NAMES = {
    "small": "S-HVAE-32",
    "published": "published configuration",
    "gaussian": "the same, plain Gaussian likelihood",
}
QUALITY = {"composition_1": "", "thickness_mae": "_do_thickness", "intensity_mae": "_do_intensity"}
Step = Callable[[], object]


def settings_of(name: str, seed: int, epochs: int) -> HVAESettings:
    """`small`: S-HVAE-32, trained as that of morphomnist_axioms.py, to a rate of 0, with a learned sigma.
    `published`: the 2.04 M network with its likelihood, batch and optimiser; with an exogenous prior, which
    costs less and reconstructs better than the latent mediator that the published commands also turn on.
    `gaussian`: the same with the likelihood of the small one."""
    if name == "small":
        ours = generator_settings(seed)
        # Without fine-tuning a small fixed sigma would leave all of the parents in z.
        learned = {"sigma": "shared", "first_sigma": None}
        network = SmallNetworkSettings(widths=S_HVAE_32)
        train = replace(ours.train, epochs=epochs, final_lr_share=0.0)
        return replace(ours, network=network, train=train, **learned)
    is_published = name == "published"
    return HVAESettings(
        parents=VARIABLES,
        graph=dict(PARENTS),
        network=PublishedNetworkSettings(size="morphomnist"),
        likelihood="discretised" if is_published else "gaussian",
        sigma="pixel",
        beta=1.0,
        ema=0.999,
        train=HVAETrainSettings(lr=1e-3, batch=32, clip=350.0, weight_decay=0.01, epochs=epochs, seed=seed),
    )


class PublishedScheme(FinetuneTask):
    """The passes of the published fine-tuning: F, abduction, and a decoding under each of pa and pa*, which
    are two walks through the encoder and four through the decoder; `FinetuneTask` takes one and two."""

    def forward(self, batch: ImageBatch, step: int) -> dict[str, torch.Tensor]:
        generator = self.generator[0]
        x, pa = batch.x, batch.attributes
        pa_cf, intervened, affected = self.intervene(pa, step)
        context, context_cf = self.encoder(pa), self.encoder(pa_cf)
        noise, settings = self.network.split_noise(batch.noise), generator.settings
        inference = self.network.infer(x, context, noise)
        energy = free_energy(self.network, x, inference, settings.beta, settings)["loss"]
        latents = self.network.infer(x, context, noise).latents
        factual, likelihood = (self.network.decode(latents, seen) for seen in (context, context_cf))
        u = (x - factual.mean) / factual.sigma
        x_cf = (likelihood.mean + self.settings.residual * likelihood.sigma * u).clamp(-1, 1)
        made = Counterfactual(x, x_cf, pa, pa_cf, intervened, affected)
        target = torch.stack([rule.loss(made).mean() for rule in self.rules]).sum()
        excess = (energy - self.bound).detach()
        weight = (self.multiplier.detach() + self.settings.damping * excess).clamp_min(0)
        return {"loss": target + weight * energy - self.raw_multiplier * excess}


def steps_of(name: str, table: ImageTable) -> dict[str, Step]:
    """What is timed of a network, by `WHAT/BATCH`; WHAT is predict, train, finetune as published, or
    finetune_shared with the passes of `FinetuneTask`. Weights are as they start."""
    generator = HVAEGenerator(settings_of(name, 0, 1), table.attributes, table.images.shape)
    rows = table.rows("train")
    values = table.encode(VARIABLES, rows)
    generator.scm.fit(values, torch_generator("speed"))
    generator.encoder.fit(values)
    steps: dict[str, Step] = {}

    def batch_of(size: int) -> ImageBatch:
        schedule, noise = replace(generator.settings.train, batch=size), generator.network.noise_size
        return ImageData(table, rows, values, schedule, noise_size=noise)[0][0]

    for size in BATCHES:
        batch = batch_of(size)
        steps[f"predict/{size}"] = predicting(generator, batch)
        network = HVAEGenerator(generator.settings, table.attributes, table.images.shape).network
        trained, averaged = network.requires_grad_(True).train(), generator.network
        task = HVAETask(trained, generator.encoder, averaged, generator.settings, 1000)
        steps[f"train/{size}"] = training(task, batch)
    if name != SAME_LIKELIHOOD:
        guides = [
            AttributePredictor(settings, table.attributes, table.images.shape)
            for settings in predictor_settings("guide", 0)
        ]
        rules, limits = [AttributeRule(guide, is_soft=True) for guide in guides], value_limits(values)
        batch = batch_of(FINE_BATCH)
        for key, kind in (("finetune", PublishedScheme), ("finetune_shared", FinetuneTask)):
            tuned = kind(generator, rules, VARIABLES, limits, 0.0, finetune_settings(0))
            steps[f"{key}/{FINE_BATCH}"] = training(tuned, batch)
    return steps


def predicting(generator: HVAEGenerator, batch: ImageBatch) -> Step:
    """Abduction under the factual parents, prediction under those of other images."""
    pa_cf = {name: value.roll(1, 0) for name, value in batch.attributes.items()}
    return lambda: generator.predict(generator.abduct(batch.x, batch.attributes), pa_cf)


def training(task: Any, batch: ImageBatch) -> Step:
    """A whole optimiser step: both passes, clipping, AdamW, averaged weights."""
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.9), fused=True)

    def step() -> None:
        task(batch, 500)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimiser.step()
        optimiser.zero_grad()
        task.after_step(500)

    return step


def speeds(runs: Path, table: ImageTable) -> Scores:
    """`NETWORK/WHAT/BATCH` (REPEATS,): milliseconds per image."""
    settings = [plain(settings_of(name, 0, 1)) for name in (*ARMS, SAME_LIKELIHOOD)]
    content = [settings, plain(finetune_settings(0)), BATCHES, FINE_BATCH, REPEATS, table.fingerprint]
    stage = keyed_stage(runs, "scores", "speed", content, code=(*SCORE_CODE, *FINETUNE_CODE))

    def make(folder: Path) -> None:
        names = (*ARMS, SAME_LIKELIHOOD)
        steps = {f"{name}/{key}": step for name in names for key, step in steps_of(name, table).items()}
        found: dict[str, list[float]] = {key: [] for key in steps}
        for key in steps:  # warm
            steps[key]()
        for repeat in range(REPEATS):
            for key in np.roll(list(steps), repeat):
                begun = time.process_time()
                steps[str(key)]()
                found[str(key)].append(1000 * (time.process_time() - begun) / int(key.split("/")[2]))
        save_arrays(stage.product, {key: np.array(values) for key, values in found.items()})

    return load_arrays(finished(stage, make))


def best(found: Scores, name: str, what: str) -> np.ndarray:
    """Milliseconds per image (REPEATS,) at the better batch size."""
    choices = [values for key, values in found.items() if key.startswith(f"{name}/{what}/")]
    return min(choices, key=np.median)


def budgets(found: Scores, minutes: float, images: int) -> dict[str, tuple[int, float]]:
    """Epochs and minutes of training per network: whole epochs of the published one, at its own batch of 32,
    that take at least `minutes`, and as many of ours as fit into that time."""
    epoch = {
        "published": float(np.median(found["published/train/32"])) * images / 60_000,
        "small": float(np.median(best(found, "small", "train"))) * images / 60_000,
    }
    published = math.ceil(minutes / epoch["published"])
    small = max(1, math.floor(published * epoch["published"] / epoch["small"]))
    return {
        "small": (small, small * epoch["small"]),
        "published": (published, published * epoch["published"]),
    }


def scores(name: str, seed: int, epochs: int, runs: Path, table: ImageTable) -> Scores:
    """Composition and model-free errors per test digit, of the network alone."""
    settings = settings_of(name, seed, epochs)
    stage = keyed_stage(runs, "scores", "speed", name, plain(settings), table.fingerprint, code=SCORE_CODE)

    def make(folder: Path) -> None:
        generator, digits = base(runs, table, settings)[0], digits_of(table, "test")
        found = compositions(generator, digits, {"network": (1,)})
        save_arrays(stage.product, found | effects(generator, digits, Rulers(table, []), ("network",)))

    return load_arrays(finished(stage, make))


def report(options: argparse.Namespace) -> None:
    """Writes the results of all seeds."""
    runs, table = options.runs, digits_table(options.runs, options.data_root)
    found = speeds(runs, table)
    plan = budgets(found, options.minutes, len(table.rows("train")))
    figures = ratios(found)
    rows = []
    for name in (*ARMS, SAME_LIKELIHOOD):
        generator = HVAEGenerator(settings_of(name, 0, 1), table.attributes, table.images.shape)
        count = sum(parameter.numel() for parameter in generator.network.parameters())
        cells = [f"{np.median(best(found, name, 'predict')):.2f}"]
        cells += [f"{1000 / np.median(best(found, name, 'predict')):.0f}"]
        cells += [f"{np.median(best(found, name, 'train')):.2f}"]
        tuned = ("finetune_shared", "finetune") if name != SAME_LIKELIHOOD else ()
        cells += [f"{np.median(best(found, name, what)):.2f}" for what in tuned] or ["", ""]
        rows.append([NAMES[name], f"{count / 1e6:.2f} M", *cells])
    header = ["network", "parameters", "abduct + predict, ms/image", "images/s", "training step, ms/image"]
    header += ["fine-tuning step, one encoder pass, ms/image", "as published, ms/image"]
    tables = ["## Speed, one thread, medians\n\n" + markdown_table(header, rows)]
    quality = {}
    for name in ARMS:
        per_seed = [scores(name, seed, plan[name][0], runs, table) for seed in SEEDS]
        for key, do in QUALITY.items():
            values = [float(np.nanmean(one[f"{key}{do}/network"])) for one in per_seed]
            figures[f"{name}_{key}{do}"] = over_seeds(
                values, UNITS[key.split("_")[0]] if do else "grey levels"
            )
        quality[name] = [text(figures[f"{name}_{key}{do}"]) for key, do in QUALITY.items()]
    header = ["", "epochs", "minutes", *(f"{key}{do}" for key, do in QUALITY.items())]
    rows = [[NAMES[name], str(plan[name][0]), f"{plan[name][1]:.1f}", *quality[name]] for name in ARMS]
    tables.append("## Quality after the same time of training\n\n" + markdown_table(header, rows))
    rows = [[name, text(entry), entry["unit"]] for name, entry in figures.items()]
    tables.append("## Figures\n\n" + markdown_table(["figure", "value [95 %]", "unit"], rows))
    seconds = [read_json(path)["seconds"] for path in sorted(runs.glob(f"{clock(options)}-*.json"))]
    write_results(
        "generation_speed",
        figures,
        protocol(plan, table),
        SEEDS,
        sum(seconds) / 60 / options.jobs,
        "\n".join(tables),
    )


def ratios(found: Scores) -> dict[str, dict[str, Any]]:
    """How many times as fast; medians over repeats, ratios within a repeat."""
    pairs = {
        "predict_speedup_vs_published_size": (("published", "predict"), ("small", "predict")),
        "train_speedup_vs_published_size": (("published", "train"), ("small", "train")),
        "train_speedup_vs_published_size_same_likelihood": ((SAME_LIKELIHOOD, "train"), ("small", "train")),
        "finetune_speedup_vs_published_size": (("published", "finetune"), ("small", "finetune_shared")),
        "finetune_speedup_by_shared_passes": (("small", "finetune"), ("small", "finetune_shared")),
    }
    return {
        name: over_repeats(best(found, *slow) / best(found, *fast), "times as fast")
        for name, (slow, fast) in pairs.items()
    }


def text(entry: dict[str, Any]) -> str:
    """A figure without a plus sign."""
    return with_interval(entry, 3 if abs(entry["value"]) < 1 else 2).replace("+", "")


def protocol(plan: dict[str, tuple[int, float]], table: ImageTable) -> dict[str, str]:
    return {
        "speed": f"CPU time, one process, one thread, 32 px; {REPEATS} repeats, networks taking turns; batch "
        f"of {' or '.join(map(str, BATCHES))}, each network its better one, fine-tuning {FINE_BATCH}; a "
        "training step holds both passes, clipping, AdamW and averaging, no reading of data",
        "published configuration": "the architecture of the published Morpho-MNIST network with 20 "
        "stochastic levels, discretised Gaussian with a free sigma, beta 1, batch 32, learning rate "
        "1e-3; restated here: exogenous prior (the published commands use the mediator, which costs one walk "
        "more and whose null intervention is not the identity), the exact likelihood (float64) instead of "
        "its tanh approximation, for which the row with a plain Gaussian is the lower bound",
        "fine-tuning": "published scheme: two walks through the encoder and four through the decoder per "
        "step; one and two where they are shared",
        "quality": f"trained on {len(table.rows('train')):,} digits for the same time by the measured speed: "
        f"{plan['published'][1]:.1f} minutes (published, {plan['published'][0]} epochs) and "
        f"{plan['small'][1]:.1f} (ours, {plan['small'][0]} epochs); no fine-tuning; scored on "
        f"{len(table.rows('test')):,} test digits, network alone, model-free measures, as in "
        "morphomnist_axioms.py",
        "interval": "speeds: 95 % bootstrap of the median over repeats; quality: 95 % t interval over three "
        "seeds",
        "time": "CPU time of the processes, by how many ran side by side",
    }


def clock(options: argparse.Namespace) -> str:
    """The beginning of the names of the files that say how long it took."""
    return f"generation_speed-seconds-{fingerprint(options.minutes, plain(settings_of('small', 0, 1)))}"


def prepare(part: str, options: argparse.Namespace) -> None:
    """`speed`, or ARM-SEED."""
    table, before = digits_table(options.runs, options.data_root), time.process_time()
    try:
        found = speeds(options.runs, table)
        if part != "speed":
            name, seed = part.split("-")
            epochs, _ = budgets(found, options.minutes, len(table.rows("train")))[name]
            scores(name, int(seed), epochs, options.runs, table)
    finally:
        path = options.runs / f"{clock(options)}-{part}.json"
        earlier = read_json(path)["seconds"] if path.exists() else 0.0
        write_json(path, {"seconds": earlier + time.process_time() - before})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data-root", help="folder with morphomnist/")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation_speed"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time in part two")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training per network and seed")
    parser.add_argument("--only", metavar="PART", help="prepare one part: speed, or e.g. small-0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        prepare(options.only, options)
        return
    digits_table(options.runs, options.data_root)
    in_processes([["--only", "speed"]], 1)
    in_processes([["--only", f"{name}-{seed}"] for name in reversed(ARMS) for seed in SEEDS], options.jobs)
    report(options)


if __name__ == "__main__":
    main()
