"""What does it cost never to make the matrix of a dense contrastive loss?

    python benchmarks/dense_loss.py [--largest 100000] [--repeats 11]

Loss and gradient, forward and backward, of N points of 128 channels in eight images, against the plain form
that makes the N x N matrix: the pair loss by place, which is a cross-entropy, for all N, and at 8,000 points
the three others too. How far they are apart is measured in float64. Memory is the growth of the peak resident
memory of a process of its own, over what it holds with the points in place and a small loss behind it: all
that the operating system has to give, also what matrix products take for themselves. Time is CPU time of one
thread, the two taking turns; a ratio is taken within a repeat, and a figure is the median over repeats. The
plain form is left out where its memory is not there. It runs for about ten minutes and is not resumed: a
ratio of speeds belongs to one run. Let nothing else run. Memory is read from /proc, so this needs Linux.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from record import figure, markdown_table, over_repeats, write_results
from torch import nn

from cfssl.objectives.dense_loss import RADIUS, multi_view_loss, pair_loss
from cfssl.seeds import torch_generator

IMAGES, VIEWS, CHANNELS, TEMPERATURE = 8, 4, 128, 0.7
SIZES = (1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 100_000)
EXACT, COMPARED = 2048, 8000  # points: for the exactness, and for the figures of all losses
FEW = {16_000: 5, 32_000: 3, 64_000: 3, 100_000: 1}  # repeats of the larger ones, at most
PLAIN_MATRICES = 4  # of N x N that the plain form needs at most at a time
LOSSES = ("pair_place", "pair_label", "views_place", "views_label")
FORMS = ("ours", "plain")
Loss = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="number of points to go up to")
    parser.add_argument("--repeats", type=int, default=11, help="of the times up to 8,000 points")
    parser.add_argument("--memory", nargs=3, metavar=("LOSS", "FORM", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, form, count = arguments.memory
        print(peak_memory(name, form, int(count)))
        return
    begun = time.monotonic()
    sizes = [count for count in SIZES if count <= arguments.largest]
    errors = {name: relative_errors(name) for name in LOSSES}
    memory, seconds = {}, {}
    for name, count in [("pair_place", count) for count in sizes] + [(n, COMPARED) for n in LOSSES[1:]]:
        forms = FORMS if fits(count) else FORMS[:1]
        memory[name, count] = {form: measured_apart(name, form, count) for form in forms}
        seconds[name, count] = times(name, forms, count, min(arguments.repeats, FEW.get(count, 1000)))
        print(name, count, memory[name, count], file=sys.stderr)
    publish(errors, memory, seconds, (time.monotonic() - begun) / 60, arguments.repeats)


def losses(name: str, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, Loss]]:
    """The embeddings of `count` points (in two views of the pair losses), and the loss of them in both
    forms."""
    generator = torch_generator("dense loss", name)
    views = 2 if name.startswith("pair") else VIEWS
    each = count // (IMAGES if views == 2 else IMAGES * VIEWS)
    z = torch.randn(IMAGES, views, each, CHANNELS, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 3, (IMAGES, views, each), generator=generator)
    source = 2 * torch.rand(IMAGES, views, each, 2, generator=generator) - 1

    def ours() -> torch.Tensor:
        if name == "pair_place":
            return pair_loss(*z.unbind(1), TEMPERATURE)
        if name == "pair_label":
            return pair_loss(*z.unbind(1), TEMPERATURE, labels=tuple(labels.unbind(1)))  # type: ignore[arg-type]
        if name == "views_place":
            return multi_view_loss(z, TEMPERATURE, source=source)
        return multi_view_loss(z, TEMPERATURE, labels=labels)

    def plain() -> torch.Tensor:
        points = nn.functional.normalize(z, dim=-1)
        if name.startswith("pair"):
            first, second = (view.flatten(0, 1) for view in points.unbind(1))
            own, other = (label.flatten() for label in labels.unbind(1))
            if name == "pair_place":
                target = torch.arange(len(first))
                return nn.functional.cross_entropy(first @ second.T / TEMPERATURE, target)
            anchors = own > 0
            log_shares = (first[anchors] @ second.T / TEMPERATURE).log_softmax(1)
            alike = own[anchors, None] == other
            return -(torch.where(alike, log_shares, 0).sum(1) / alike.sum(1)).mean()
        flat, label, places = points.flatten(0, 2), labels.flatten(), source.flatten(0, 2)
        itself = torch.arange(len(flat))
        if name == "views_place":
            image = itself // (VIEWS * each)
            alike = (torch.cdist(places, places) < 2 * RADIUS) & (image[:, None] == image)
        else:
            alike = label[:, None] == label
        alike[itself, itself] = False
        similarity = flat @ flat.T / TEMPERATURE
        similarity[itself, itself] = -torch.inf
        pulled = torch.where(alike, similarity, 0).sum(1) / alike.sum(1).clamp_min(1)
        anchors = alike.any(1) if name == "views_place" else label > 0
        return (similarity.logsumexp(1) - pulled)[anchors].mean()

    return z, {"ours": ours, "plain": plain}


def relative_errors(name: str) -> tuple[float, float]:
    """Of the loss and, by its greatest entry, of its gradient, in float64."""
    z, forms = losses(name, EXACT, torch.float64)
    found = {}
    for form, loss in forms.items():
        value = loss()
        found[form] = value.item(), torch.autograd.grad(value, z)[0]
    (ours, our_gradient), (plain, gradient) = found["ours"], found["plain"]
    error = (our_gradient - gradient).abs().max() / gradient.abs().max()
    return abs(ours / plain - 1), float(error)


def fits(count: int) -> bool:
    """Whether the plain form of `count` points finds its memory."""
    return PLAIN_MATRICES * 4 * count**2 < psutil.virtual_memory().available


def peak_memory(name: str, form: str, count: int) -> int:
    """Bytes by which forward and backward raise the peak of this process, which does nothing else."""
    losses(name, 320)[1][form]().backward()
    _, forms = losses(name, count)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = kilobytes("VmHWM")
    forms[form]().backward()
    return 1024 * (kilobytes("VmHWM") - before)


def kilobytes(key: str) -> int:
    """An entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measured_apart(name: str, form: str, count: int) -> int:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, form, str(count)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def times(name: str, forms: tuple[str, ...], count: int, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of forward and backward, (repeats,) per form."""
    z, by_form = losses(name, count)
    if count <= COMPARED:
        for form in forms:  # the first ones pay for memory that the next find ready
            by_form[form]().backward()
    found: dict[str, list[float]] = {form: [] for form in forms}
    for repeat in range(repeats):
        for form in forms[:: 1 if repeat % 2 == 0 else -1]:
            z.grad = None
            begun = time.process_time()
            by_form[form]().backward()
            found[form].append(time.process_time() - begun)
    return {form: np.array(values) for form, values in found.items()}


def publish(
    errors: dict[str, tuple[float, float]],
    memory: dict[tuple[str, int], dict[str, int]],
    seconds: dict[tuple[str, int], dict[str, np.ndarray]],
    minutes: float,
    repeats: int,
) -> None:
    """Writes the figures and the tables."""
    figures = {
        f"{what}_relative_error": figure(max(error[place] for error in errors.values()), unit="in float64")
        for place, what in enumerate(("loss", "gradient"))
    }
    rows = []
    for name, count in memory:
        held, taken = memory[name, count], seconds[name, count]
        cells = [name, f"{count:,}", *(f"{held[f] / 2**20:,.0f}" if f in held else "" for f in FORMS)]
        cells += [f"{np.median(taken[f]):.3g}" if f in taken else "" for f in FORMS]
        if "plain" in held:
            ratio = over_repeats(taken["ours"] / taken["plain"], "ours / plain")
            less = held["plain"] / held["ours"]
            cells += [f"{less:.1f}", f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"]
            if count == COMPARED:
                ending = "" if name == "pair_place" else f"_{name}"
                figures[f"memory_ratio_{COMPARED}{ending}"] = figure(less, unit="plain / ours")
                figures[f"time_ratio_{COMPARED}{ending}"] = ratio
        else:
            cells += ["", ""]
        rows.append(cells)
    for form, name in (("ours", "memory_exponent"), ("plain", "plain_memory_exponent")):
        bytes_of = {n: held[form] for (loss, n), held in memory.items() if loss == LOSSES[0] and form in held}
        slope = np.polyfit(np.log(list(bytes_of)), np.log(list(bytes_of.values())), 1)[0]
        figures[name] = figure(float(slope), unit="d log memory / d log N")
    figures["largest_n"] = figure(max(count for _, count in memory), unit="points")
    header = [
        "loss",
        "N",
        "ours, MiB",
        "plain, MiB",
        "ours, s",
        "plain, s",
        "times less memory",
        "time, ours / plain",
    ]
    exact = [[name, *(f"{error:.1e}" for error in errors[name])] for name in LOSSES]
    tables = (
        markdown_table(header, rows)
        + f"\nIn float64, {EXACT} points:\n\n"
        + markdown_table(["loss", "relative error of the loss", "of the gradient"], exact)
        + "\n"
        + markdown_table(["figure", "value [95 %]"], [[name, text(entry)] for name, entry in figures.items()])
    )
    write_results("dense_loss", figures, protocol(repeats), (0,), minutes, tables)


def text(entry: dict[str, float]) -> str:
    value = f"{entry['value']:.6g}" if entry["value"] >= 1 else f"{entry['value']:.3g}"
    return value if entry["low"] is None else f"{value} [{entry['low']:.3f}, {entry['high']:.3f}]"


def protocol(repeats: int) -> dict[str, str]:
    return {
        "points": f"N of {CHANNELS} channels, normal, in {IMAGES} images; pair: in each of two views; views: "
        f"in {VIEWS} views together; 3 classes, one of them background; radius {RADIUS}; temperature "
        f"{TEMPERATURE}",
        "plain": "the N x N matrix in float32 with torch's own cross_entropy, log_softmax or logsumexp; of "
        "pair_label the rows of anchors alone",
        "memory": "growth of the peak resident memory by forward and backward, one process for each",
        "time": f"CPU time of forward and backward, one thread; {repeats} repeats, from 16,000 points on "
        f"{', '.join(map(str, FEW.values()))}; ours and plain first in turn; medians, ratios within a repeat",
        "exponent": "slope of a line through log memory over log N, of all N with that form, pair_place",
    }


if __name__ == "__main__":
    main()
