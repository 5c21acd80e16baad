"""The quality gate: a counterfactual that does not show what it was set to, or shows more than that, is not
shown to an encoder.

Enters: a finished bank, and a judge of images. Leaves: the same bank, whose index has further columns:
`quality` (float32, the probability that the judge gives to what the do() sets; NaN without a discrete
variable), `error` (float32, of continuous variables in standard deviations; NaN without one), for each
attribute that has to stay as it is `change.NAME` (float32, how far the judge's opinion of it moves from the
real image to the counterfactual; NaN where the do() affects it), and `accepted` (bool; slot 0 always, what
was never made never). Its bank.json says how much was rejected, and why. Shards and their parts of the index
stay as they are, so that another gate can take the place of this one.

A change is one of the judge's own opinion, whatever was recorded of the image: neither a wrong label nor an
error that the judge makes in both images is taken for one.

The judge has to be another network than the guide that a generator was fine-tuned with: the guide finds what
it taught.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cfssl.bank.settings import GateSettings
from cfssl.bank.shards import View, finish, write_gate
from cfssl.bank.store import Bank
from cfssl.data.pixels import to_signed
from cfssl.data.table import Attribute, Attributes
from cfssl.errors import UserError
from cfssl.generators.base import intervention
from cfssl.scm.graph import CausalGraph, refuse_unknown

JUDGED = 256  # images that are judged at a time
CHANGE = "change."  # of the names of the columns

Seen = dict[str, torch.Tensor]  # what a judge sees; the images are the first dimension of every tensor


class Judge(Protocol):
    """Says what images show. Each image is seen once, and asked about as often as needed."""

    def see(self, images: torch.Tensor) -> Seen:
        """images (n, C, H, W) float32 in [-1, 1] -> all that the questions below need."""
        ...

    def agreement(self, seen: Seen, target: Attributes) -> tuple[np.ndarray, np.ndarray]:
        """`target` (n,) each of the variables intervened on -> the probability of the target (n,), of several
        discrete variables the least, NaN without one; and the error (n,) of the continuous ones in standard
        deviations, of several the largest, NaN without one."""
        ...

    def change(self, seen: Seen, before: Seen, name: str) -> np.ndarray:
        """How far its opinion of the attribute `name` is from that of the images `before`, (n,): total
        variation, 0 to 1, between its probabilities of a discrete one, else the distance of its values in
        standard deviations."""
        ...


def apply_gate(
    folder: Path | str,
    judge: Judge,
    settings: GateSettings,
    judge_fingerprint: str,
    attributes: Mapping[str, Attribute],
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Judges every counterfactual of a finished bank and writes into it which are accepted: those that reach
    `settings.probability`, do not miss by more than `settings.error`, and change no attribute that their do()
    does not affect by more than `settings.unchanged` says.

    `attributes`: by which the judge reads the targets, a predictor's own. `device`: where it takes images.
    `progress(done, total)` counts images. Returns the record of the gate, `Bank.gate`: `judge` and the
    settings, the numbers `judged` and `rejected`, `rejected_share` (0 of nothing), and the last three of each
    view in `views`, by its do() as in the index, and of each setting in `reasons`, by its name
    ("unchanged.sex"), where `judged` are the views that it asks about. A view may be rejected for several.

    The same gate (settings and fingerprint of the judge) applied again changes nothing; another one replaces
    it. One killed at any moment can be applied again. Raises `UserError` while shards are missing, when
    pixels are damaged, for attributes that the judge does not know, and for answers of it that are none.
    """
    folder = Path(folder)
    refuse_unknown(settings.unchanged, attributes, "gate.unchanged")
    finish(folder)  # mends what a killed gate left
    bank = Bank.open(folder)
    rule = {"judge": judge_fingerprint, **asdict(settings)}
    if bank.gate is not None and rule.items() <= bank.gate.items():
        return bank.gate
    found = _judged(bank, judge, settings.unchanged, attributes, progress, torch.device(device))
    # Comparing with NaN is false, which is right everywhere: a view is judged by what it is asked about.
    fails = {
        "probability": found["quality"] < settings.probability,
        "error": found["error"] > settings.error,
        **{f"unchanged.{name}": found[CHANGE + name] > most for name, most in settings.unchanged.items()},
    }
    is_rejected = np.any(list(fails.values()), axis=0)
    gate = {**rule, **_counts(bank.made[:, 1:], is_rejected[:, 1:])}
    gate["reasons"] = {
        reason: _counts(~np.isnan(values), failing)
        for (reason, failing), values in zip(fails.items(), found.values(), strict=True)
    }
    gate["views"] = {
        json.dumps(view): _counts(bank.made[:, slot], is_rejected[:, slot])
        for slot, view in enumerate(bank.views, 1)
    }
    columns = {name: values.astype(np.float32) for name, values in found.items()}
    write_gate(folder, bank.shards, {**columns, "accepted": bank.made & ~is_rejected}, gate)
    return gate


def gate_text(gate: Mapping[str, Any]) -> str:
    """What a gate let through, in words; `gate` as in `Bank.gate`."""

    def share(counts: Mapping[str, Any]) -> str:
        return f"{counts['rejected']} of {counts['judged']} ({counts['rejected_share']:.1%})"

    reasons = [f"{name} {share(counts)}" for name, counts in gate.get("reasons", {}).items()]
    return f"the gate rejects {share(gate)} counterfactuals" + (f": {', '.join(reasons)}" if reasons else "")


def _judged(
    bank: Bank,
    judge: Judge,
    unchanged: Iterable[str],
    attributes: Mapping[str, Attribute],
    progress: Callable[[int, int], None] | None,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """The columns "quality", "error" and "change.NAME", (N, 1+K) float64 each, of every counterfactual that
    was made, NaN elsewhere."""
    asked = [_unaffected(bank, view, unchanged) for view in bank.views]
    names = ["quality", "error", *(CHANGE + name for name in unchanged)]
    found = {name: np.full((len(bank), bank.plan.slots), np.nan) for name in names}
    total, done = int(bank.made[:, 1:].sum()), 0

    def see(items: np.ndarray, slot: int) -> Seen:
        return judge.see(to_signed(bank.gather(items, np.full(len(items), slot))).to(device))

    for shard in range(bank.shard_count):
        own = bank.plan.items(shard)
        for start in range(own.start, own.stop, JUDGED):
            items = np.arange(start, min(start + JUDGED, own.stop))
            real = see(items, 0) if any(asked) else {}
            for slot, view in enumerate(bank.views, 1):
                places = np.flatnonzero(bank.made[items, slot])
                if len(places) == 0:
                    continue
                where, seen = (items[places], slot), see(items[places], slot)
                target = intervention(view, attributes, len(places))
                answer = judge.agreement(seen, {name: value.to(device) for name, value in target.items()})
                found["quality"][where], found["error"][where] = _checked(
                    answer, len(places), view, attributes
                )
                before = {name: value[places] for name, value in real.items()}
                for name in asked[slot - 1]:
                    change = judge.change(seen, before, name)
                    found[CHANGE + name][where] = _checked_change(change, len(places), attributes[name])
                done += len(places)
                if progress is not None:
                    progress(done, total)
    return found


def _unaffected(bank: Bank, view: View, names: Iterable[str]) -> list[str]:
    """Those of `names` that a do() must leave as they are; a bank without a graph knows of no descendants."""
    affected = CausalGraph(**bank.plan.graph).affected(view) if bank.plan.graph is not None else set(view)
    return [name for name in names if name not in affected]


def _checked(
    answer: tuple[np.ndarray, np.ndarray], count: int, view: View, attributes: Mapping[str, Attribute]
) -> tuple[np.ndarray, np.ndarray]:
    """The answer of a judge, after refusing one that would be taken for approval."""
    agreement, error = (np.asarray(part, dtype=np.float64) for part in answer)
    kinds = {attributes[name].kind == "continuous" for name in view}
    asked = [(agreement, "probability", 1.0, False in kinds), (error, "error", np.inf, True in kinds)]
    for values, what, most, is_expected in asked:
        fits = (values >= 0) & (values <= most) if is_expected else np.isnan(values)
        if values.shape != (count,) or not fits.all():
            expected = f"numbers from 0 to {most}" if is_expected else "NaN"
            raise UserError(
                f"The judge answers do({view}) on {count} images with {what} {values}, expected {expected} "
                "for each; it has diverged or is no judge of these variables: train it again."
            )
    return agreement, error


def _checked_change(change: np.ndarray, count: int, attribute: Attribute) -> np.ndarray:
    """As `_checked`."""
    values, most = np.asarray(change, dtype=np.float64), np.inf if attribute.kind == "continuous" else 1.0
    if values.shape != (count,) or not ((values >= 0) & (values <= most)).all():
        raise UserError(
            f"The judge answers how {attribute.name!r} changed in {count} images with {values}, expected "
            f"numbers from 0 to {most} for each; it has diverged or is no judge of it: train it again."
        )
    return values


def _counts(was_made: np.ndarray, is_rejected: np.ndarray) -> dict[str, Any]:
    judged, rejected = int(was_made.sum()), int(is_rejected.sum())
    return {"judged": judged, "rejected": rejected, "rejected_share": rejected / max(judged, 1)}
