"""The quality gate: a counterfactual that does not show what it was set to is not shown to an encoder.

Enters: a finished bank, and a judge of images. Leaves: the same bank, whose index has three more columns,
`quality` (float32, the probability that the judge gives to what the do() sets; NaN without a discrete
variable), `error` (float32, of continuous variables in standard deviations; NaN without one) and `accepted`
(bool; slot 0 always, what was never made never), and whose bank.json says how much was rejected. Shards and
their parts of the index stay as they are, so that another gate can take the place of this one.

The judge has to be another network than the guide that a generator was fine-tuned with: the guide finds what
it taught.
"""

import json
from collections.abc import Callable, Mapping
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

JUDGED = 256  # images that are judged at a time


class Judge(Protocol):
    """Says how well images show what they were set to."""

    def __call__(self, images: torch.Tensor, target: Attributes) -> tuple[np.ndarray, np.ndarray]:
        """images (n, C, H, W) float32 in [-1, 1], `target` (n,) each of the variables intervened on -> the
        probability of the target (n,), of several discrete variables the least, NaN without one; and the
        error (n,) of the continuous ones in standard deviations, of several the largest, NaN without one."""
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
    `settings.probability` and do not miss by more than `settings.error`.

    `attributes`: by which the judge reads the targets, a predictor's own. `device`: where it takes images.
    `progress(done, total)` counts images. Returns the record of the gate, `Bank.gate`: `judge`,
    `probability`, `error`, the numbers `judged` and `rejected`, `rejected_share` (0 of nothing), and the last
    three of each view in `views`, by its do() as in the index.

    The same gate (settings and fingerprint of the judge) applied again changes nothing; another one replaces
    it. One killed at any moment can be applied again. Raises `UserError` while shards are missing, when
    pixels are damaged, and for answers of the judge that are none.
    """
    folder = Path(folder)
    finish(folder)  # mends what a killed gate left
    bank = Bank.open(folder)
    rule = {"judge": judge_fingerprint, **asdict(settings)}
    if bank.gate is not None and rule.items() <= bank.gate.items():
        return bank.gate
    agreement, error = _judged(bank, judge, attributes, progress, torch.device(device))
    # Comparing with NaN is false, which is right for both: a view is judged by the variables it sets.
    is_rejected = bank.made & ((agreement < settings.probability) | (error > settings.error))
    is_rejected[:, 0] = False
    gate = {**rule, **_counts(bank.made[:, 1:], is_rejected[:, 1:])}
    gate["views"] = {
        json.dumps(view): _counts(bank.made[:, slot], is_rejected[:, slot])
        for slot, view in enumerate(bank.views, 1)
    }
    columns = {
        "quality": agreement.astype(np.float32),
        "error": error.astype(np.float32),
        "accepted": bank.made & ~is_rejected,
    }
    write_gate(folder, bank.shards, columns, gate)
    return gate


def _judged(
    bank: Bank,
    judge: Judge,
    attributes: Mapping[str, Attribute],
    progress: Callable[[int, int], None] | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Agreement and error (N, 1+K) float64 of every counterfactual that was made, NaN elsewhere."""
    agreement, error = np.full((2, len(bank), bank.plan.slots), np.nan)
    total, done = int(bank.made[:, 1:].sum()), 0
    for shard in range(bank.shard_count):
        first = bank.plan.items(shard).start
        made = bank.made[first : bank.plan.items(shard).stop]
        for slot, view in enumerate(bank.views, 1):
            items = first + np.flatnonzero(made[:, slot])
            for start in range(0, len(items), JUDGED):
                chunk = items[start : start + JUDGED]
                x = to_signed(bank.gather(chunk, np.full(len(chunk), slot))).to(device)
                target = intervention(view, attributes, len(chunk))
                answer = judge(x, {name: value.to(device) for name, value in target.items()})
                agreement[chunk, slot], error[chunk, slot] = _checked(answer, len(chunk), view, attributes)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    return agreement, error


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


def _counts(was_made: np.ndarray, is_rejected: np.ndarray) -> dict[str, Any]:
    judged, rejected = int(was_made.sum()), int(is_rejected.sum())
    return {"judged": judged, "rejected": rejected, "rejected_share": rejected / max(judged, 1)}
