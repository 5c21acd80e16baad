"""Minimality: does a counterfactual change no more than its intervention asks for?

What enters: embeddings of real and counterfactual images as diagonal Gaussians (the posterior means and log
sigmas, (N, d) each, of a VAE that knows no attributes), and the intervened attribute's values. What leaves:
per image the counterfactual latent divergence of Melistas et al. 2024 ("Benchmarking counterfactual image
generation"), with its two shares apart:

    P1 = share of the real images in the counterfactual's bin that are no farther from x than x~ is
    P2 = share of the real images in the factual bin that are at least as far from x as x~ is
    CLD = log(.8 exp P1 + .2 exp P2),  distance from x = KL(q(. | image) || q(. | x))

Lower is better. The published code takes the mean for the log sigma too, so its distance is no KL
divergence; here it is the one of diagonal Gaussians. CLD hardly ranges (a generator that copies x gets
log(.8 + .2 e) = .295, though it does nothing), so read P1 and P2: an edit that is minimal has both low.
"""

from typing import NamedTuple

import numpy as np

from cfssl.errors import UserError

WEIGHT_1, WEIGHT_2 = 0.8, 0.2
CHUNK = 2_000_000  # numbers held at a time


class Gaussians(NamedTuple):
    """Diagonal Gaussians: means and log sigmas, (N, d) each."""

    mean: np.ndarray
    log_sigma: np.ndarray


class Minimality(NamedTuple):
    """Per image (N,): the divergence and its two shares. NaN where a bin has no real image."""

    cld: np.ndarray
    p1: np.ndarray
    p2: np.ndarray


def kl_divergence(q: Gaussians, p: Gaussians) -> np.ndarray:
    """KL(q || p) in nats, float64, summed over the last dimension; the others broadcast."""
    q_mean, q_log, p_mean, p_log = (np.asarray(part, np.float64) for part in (*q, *p))
    ratio = np.exp(2 * (q_log - p_log)) + ((q_mean - p_mean) / np.exp(p_log)) ** 2
    return (p_log - q_log + (ratio - 1) / 2).sum(-1)


def latent_divergence(
    factual: Gaussians,
    counterfactual: Gaussians,
    bins: np.ndarray,
    bins_cf: np.ndarray,
    real: Gaussians,
    real_bins: np.ndarray,
    rows: np.ndarray | None = None,
) -> Minimality:
    """CLD of N images, whose intervened attribute went from bin `bins` to `bins_cf`, (N,) each (see
    `value_bins`; codes of a discrete attribute are bins), against `real` images (M, d) with their
    `real_bins` (M,). `rows` (N,): which of the real images x itself is, if it is among them; it is left out
    of its own P2."""
    shapes = {np.shape(part) for part in (*factual, *counterfactual)}
    counts = {len(bins), len(bins_cf), len(factual.mean)}
    if len(shapes) > 1 or len(counts) > 1 or len(real_bins) != len(real.mean):
        raise ValueError(f"embeddings {shapes} of {counts} images, {len(real.mean)} real ones")
    to_cf = kl_divergence(counterfactual, factual)  # (N,)
    shares = np.full((2, len(to_cf)), np.nan)
    step = max(1, CHUNK // max(1, np.size(real.mean)))
    for start in range(0, len(to_cf), step):
        part = slice(start, start + step)
        x = Gaussians(*(np.asarray(values)[part, None] for values in factual))
        to_real = kl_divergence(real, x)  # (n, M)
        limit = to_cf[part, None]
        same = real_bins == np.asarray(bins)[part, None]
        if rows is not None:
            same[np.arange(len(same)), np.asarray(rows)[part]] = False
        shares[0, part] = _share(to_real <= limit, real_bins == np.asarray(bins_cf)[part, None])
        shares[1, part] = _share(to_real >= limit, same)
    p1, p2 = shares
    return Minimality(np.log(WEIGHT_1 * np.exp(p1) + WEIGHT_2 * np.exp(p2)), p1, p2)


def bin_edges(values: np.ndarray, low: float, high: float, count: int = 9) -> np.ndarray:
    """The edges of `value_bins`: the mean of the `values` that lie in each of `count` equal parts of
    [low, high], ascending, parts without values left out; as in the published benchmark, whose thickness and
    intensity are scaled to [-1, 1]. Raises UserError where no value lies in [low, high]."""
    values = np.asarray(values, np.float64)
    inside = values[(values >= low) & (values <= high)]
    if not len(inside):
        raise UserError(
            f"No value lies between {low:g} and {high:g}, where the bins were asked for; give the range of "
            "the attribute."
        )
    part = np.minimum(((inside - low) / (high - low) * count).astype(np.int64), count - 1)
    counts = np.bincount(part, minlength=count)
    return np.bincount(part, inside, minlength=count)[counts > 0] / counts[counts > 0]


def value_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin (N,) of each value: how many edges lie below it."""
    return np.searchsorted(edges, values)


def changed_values(values: np.ndarray, bins: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of N images a value of the attribute whose bin is another than its own, drawn uniformly from
    the different `values` that occur: the interventions of the published benchmark. For a discrete attribute
    give the codes as bins. Raises UserError where all values share one bin."""
    known, first = np.unique(values, return_index=True)
    known_bins = np.asarray(bins)[first]
    if len(set(known_bins.tolist())) < 2:
        raise UserError(
            "All values lie in one bin, so none can be changed to another bin; use narrower bins or leave "
            "the attribute out."
        )
    drawn = np.empty(len(bins), known.dtype)
    for own in np.unique(bins):
        rows = np.flatnonzero(bins == own)
        drawn[rows] = rng.choice(known[known_bins != own], len(rows))
    return drawn


def _share(holds: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of the real images `among` (n, M), how many `holds` is true for (n,)."""
    counts = among.sum(1)
    return np.where(counts > 0, (holds & among).sum(1) / np.maximum(counts, 1), np.nan)
