"""Weights that an encoder starts from: released ones, or those of another run, although their heads are
missing here; and the time for which it is held to them.

What enters: a timm model, and a state dict with timm's keys, perhaps under a prefix (`teacher.backbone.`) and
among others. What leaves: the model with what fits, and a record of what did and what did not. No pickled
code is run: `.pth` files go through torch's reader of plain weights.
"""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.errors import UserError
from cfssl.files import read_json
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.settings import STRICT, Probability

TIMM = "timm"
IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")  # as timm and the Hugging Face hub name them
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
AVERAGED = ("ema", "teacher")  # of two copies of a network, the averaged one is the better

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, config=STRICT)
class InitSettings:
    """`backbone`: "timm" for the weights that timm has for the architecture (on disk, or from a network), or
    a path: a state dict (.safetensors, .pth), or a folder as `cfssl export` and timm write it. `min_matched`:
    the share of the encoder's parameters that a file has to fill. `head_warmup`: epochs in which the heads
    alone are trained."""

    backbone: str
    min_matched: Probability = 0.9
    head_warmup: Annotated[int, Field(ge=0)] = 0


def weights_file(init: InitSettings) -> Path:
    """The file of `init.backbone`; raises `UserError` when there is none."""
    path = Path(init.backbone)
    if path.is_dir():
        for name in IN_A_FOLDER:
            if (path / name).is_file():
                return path / name
        raise UserError(f"init.backbone is the folder {path}, which has no {' or '.join(IN_A_FOLDER)}.")
    if not path.is_file():
        raise UserError(
            f"init.backbone is {str(path)!r}, and there is no such file or folder; give the path of a state "
            f"dict, or {TIMM} for the weights that timm has."
        )
    return path


def init_key(init: InitSettings | None) -> dict[str, Any] | None:
    """What of `init` decides the weights: the content of its file, not where it lies."""
    if init is None:
        return None
    found = {"backbone": init.backbone, "min_matched": init.min_matched, "head_warmup": init.head_warmup}
    return found if init.backbone == TIMM else found | {"backbone": content_hash(weights_file(init))}


def content_hash(path: Path) -> str:
    """32 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def initial_encoder(
    backbone: BackboneSettings,
    init: InitSettings | None,
    channels: int,
    image_size: int | tuple[int, int],
    seed: int,
    any_size: bool = False,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """`create_backbone`, with the weights of `init`, and the record of them: see `load_initial`."""
    import timm

    is_timm = init is not None and init.backbone == TIMM
    encoder = create_backbone(backbone, channels, image_size, seed, any_size, pretrained=is_timm)
    if init is None:
        return encoder, None
    if not is_timm:
        return encoder, load_initial(encoder, init, channels)
    config = timm.get_pretrained_cfg(backbone.name)
    tag = None if config is None else config.tag
    return encoder, {"weights": TIMM, "architecture": backbone.name, "tag": tag}


def load_initial(encoder: nn.Module, init: InitSettings, channels: int) -> dict[str, Any]:
    """Fills `encoder`, a timm model for images of `channels`, from the file of `init`, and returns a
    JSON-serialisable record: "matched" (the share of the parameters), the keys that are "missing" in the
    file, "unexpected" there or "mismatched" in shape, the "prefix" that was stripped, and what was "adapted".

    timm's own conversion of foreign layouts and of other image sizes is applied where it makes more fit, and
    its adaptation of the input convolution to the channels. Raises `UserError` when the file cannot be read
    or less than `min_matched` fits.
    """
    path = weights_file(init)
    stored = read_weights(path)
    wanted = dict(encoder.state_dict())
    prefix = common_prefix(stored, wanted)
    stripped = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    candidates = [stripped]
    if fitting(encoder, stripped) < 1:
        candidates += [convert(part, encoder) for part in (stripped, stored)]
    candidates = [adapt_channels(weights, encoder, channels) for weights in candidates]
    weights = max(candidates, key=lambda weights: fitting(encoder, weights))  # the first of equals
    same = {key: value for key, value in weights.items() if key in wanted}
    fits = {key: value for key, value in same.items() if value.shape == wanted[key].shape}
    encoder.load_state_dict(fits, strict=False)
    matched = fitting(encoder, weights)
    record = {
        "weights": str(init.backbone),
        "content": content_hash(path),
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "matched": matched,
        "prefix": prefix,
        "adapted": {
            key: [list(stripped[key].shape), list(value.shape)]
            for key, value in fits.items()
            if key in stripped and stripped[key].shape != value.shape
        },
        "missing": sorted(set(wanted) - set(same)),
        "mismatched": {
            key: [list(value.shape), list(wanted[key].shape)]
            for key, value in same.items()
            if key not in fits
        },
        "unexpected": sorted(
            {*(set(weights) - set(wanted)), *(key for key in stored if not key.startswith(prefix))}
        ),
    }
    if matched < init.min_matched:
        raise UserError(
            f"init.backbone {path} fits {matched:.0%} of the encoder's parameters, expected at "
            f"least {init.min_matched:.0%} (init.min_matched): {described_keys(record)}; give weights with "
            f"timm's keys of backbone.name{stated_architecture(path)}."
        )
    return record


def check_initial(init: InitSettings, encoder: nn.Module, name: str, channels: int) -> None:
    """Raises `UserError` when `init` cannot fill `encoder`, the timm model called `name`; those weights that
    timm has are looked for when they are needed."""
    import timm

    if init.backbone != TIMM:
        load_initial(encoder, init, channels)
        return
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(
            f"init.backbone is {TIMM}, which has no weights of {name}; give a file, or set init: null."
        )


def read_weights(path: Path) -> Weights:
    """The tensors of a file by dotted key; what a checkpoint keeps beside them is left out. Raises
    `UserError` when it holds anything but plain weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in PICKLED:
            return dict(tensors_in(torch.load(path, map_location="cpu", weights_only=True)))
    except UnpicklingError:
        raise UserError(
            f"init.backbone {path} is no file of plain weights: it is damaged, or reading the rest of it "
            "would run code from the file; save its state dict alone, best as .safetensors."
        ) from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"init.backbone {path} cannot be read ({reason}); fetch the file again.") from None
    raise UserError(f"init.backbone {path} is of no known kind; give .safetensors or {', '.join(PICKLED)}.")


def tensors_in(node: Any, path: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """(dotted key, tensor) of everything in nested dicts."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from tensors_in(value, f"{path}.{key}" if path else str(key))


def common_prefix(stored: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before the keys that are `wanted` in those `stored`: that under which most are found; of
    equals an averaged network's, then the shortest."""
    known, counts = set(wanted), Counter[str]()
    for key in stored:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in known:
                counts["".join(f"{part}." for part in parts[:cut])] += 1

    def rank(prefix: str) -> tuple[int, bool, int]:
        is_averaged = any(word in part for part in prefix.split(".") for word in AVERAGED)
        return counts[prefix], is_averaged, -len(prefix)

    return max(counts, key=rank, default="")


def fitting(encoder: nn.Module, weights: Weights) -> float:
    """The share of the encoder's parameters for which `weights` has one of the same shape."""
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    found = [name for name in sizes if name in weights and weights[name].shape == shapes[name]]
    return sum(sizes[name] for name in found) / max(sum(sizes.values()), 1)


def convert(weights: Weights, encoder: nn.Module) -> Weights:
    """Through timm's conversion for the model's family: layouts of the original authors, and position
    embeddings and patches of another size."""
    room = inspect.getmodule(type(encoder))
    conversion: Callable[..., Any] | None = getattr(room, "checkpoint_filter_fn", None)
    if conversion is None:
        return weights
    try:
        return dict(tensors_in(conversion(dict(weights), encoder)))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return weights  # a layout that the conversion does not know; what does not fit is reported


def adapt_channels(weights: Weights, encoder: nn.Module, channels: int) -> Weights:
    """The input convolution for images of `channels`, as timm does it: the sum over the channels for one, and
    else repeated and scaled, so that grey images give what they gave."""
    from timm.models import adapt_input_conv

    names = getattr(encoder, "pretrained_cfg", {}).get("first_conv") or ()
    adapted = dict(weights)
    for name in (names,) if isinstance(names, str) else names:
        key, layer = f"{name}.weight", dict(encoder.named_modules()).get(name)
        weight = weights.get(key)
        if weight is None or weight.ndim != 4 or not isinstance(layer, nn.Conv2d):
            continue
        inputs = layer.in_channels // layer.groups
        per_channel = max(inputs // channels, 1)  # some stems fold space into channels
        if weight.shape[1] != inputs and weight.shape[1] % per_channel == 0:
            adapted[key] = adapt_input_conv(channels, weight, base_chans=weight.shape[1] // per_channel)
    return adapted


def stated_architecture(path: Path) -> str:
    """What the config.json beside the weights calls them, for a message."""
    config = path.parent / "config.json"
    if path.name not in IN_A_FOLDER or not config.is_file():
        return ""
    return f"; its config.json says {read_json(config).get('architecture')!r}"


def described(record: Mapping[str, Any]) -> str:
    """A record in one sentence."""
    if record["weights"] == TIMM:
        return f"init: timm's weights {record['tag']!r} of {record['architecture']}"
    share = f"{record['matched']:.2%} of {record['parameters'] / 1e6:.3g} M parameters"
    parts = [f"init: {share} from {record['weights']}", described_keys(record)]
    if record["prefix"]:
        parts.append(f"prefix {record['prefix']!r} stripped")
    parts += [f"{key} adapted from {was} to {now}" for key, (was, now) in record["adapted"].items()]
    return "; ".join(parts)


def described_keys(record: Mapping[str, Any]) -> str:
    """The keys that did not fit."""
    shapes = [f"{key} {was} for {now}" for key, (was, now) in record["mismatched"].items()]
    found = {"missing": record["missing"], "unexpected": record["unexpected"]}
    words = [f"{len(keys)} keys {name}{examples(map(repr, keys))}" for name, keys in found.items()]
    return ", ".join([*words, f"{len(shapes)} of another shape{examples(shapes)}"])


def examples(words: Iterable[str], limit: int = 3) -> str:
    """The first of them in brackets."""
    known = list(words)
    return f" ({', '.join(known[:limit])}{', ...' if len(known) > limit else ''})" if known else ""


def hold_backbone(objective: nn.Module, steps: int) -> None:
    """The `student` of the objective stays as it is for the first `steps` optimiser steps, while its heads
    are trained: it is in eval mode, so that running statistics stay, and its parameters get no gradient, so
    that the optimiser leaves them alone. A function of the step, so that nothing needs to be restored."""
    student = objective.student
    assert isinstance(student, nn.Module)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def set_held(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        is_free = arguments[1] >= steps
        student.train(module.training and is_free)
        for parameter in trained:
            parameter.requires_grad_(is_free)

    if steps:
        objective.register_forward_pre_hook(set_held)
