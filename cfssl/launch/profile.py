"""What the jobs of a cluster get: a profile, as YAML. Enters: a file. Leaves: the resources of every kind of
step, or one sentence about what is wrong with them."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from cfssl.errors import UserError
from cfssl.settings import STRICT, Count, Positive

Cluster = Literal["slurm", "local", "debug"]
Kind = Literal[
    "table", "silver", "measure", "generator", "bank", "audit", "encoder", "features", "evaluation", "report"
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, config=STRICT)
class Resources:
    """Of one job. `minutes`: its time limit; a job that reaches it is queued again and goes on. `gpus` and
    `tasks` per node, `cpus` per task; `tasks` null: one per GPU where a step can use several, else 1.
    `parts`: of a bank, each a job of an array, `parallel` of them at a time. `slurm`: further flags of
    sbatch."""

    minutes: Count = 60
    nodes: Count = 1
    gpus: int = 0
    tasks: Count | None = None
    cpus: Count = 1
    memory_gb: Positive | None = None
    parts: Count = 1
    parallel: Count = 256
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    slurm: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Profile:
    """`cluster`: where jobs run; "local" runs them on this machine, `parallel` at a time, "debug" in this
    process. `signal_seconds`: how long before its end a job is told to save. `requeues`: how often it may be
    queued again. `setup`: shell commands before every job. `all`: resources of every kind of step, `steps`:
    what is different for some."""

    cluster: Cluster = "slurm"
    parallel: Count = 1
    signal_seconds: Count = 120
    requeues: Count = 1000
    setup: tuple[str, ...] = ()
    all: dict[str, Any] = field(default_factory=dict)
    steps: dict[Kind, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            resources = self.resources(kind)
            if resources.parts > 1 and kind != "bank":
                raise UserError(f"steps.{kind}.parts: only a bank is made in parts; drop it")
            if resources.nodes * (resources.tasks or 1) > 1 and kind != "encoder":
                raise UserError(f"steps.{kind}: only an encoder is trained by several tasks; leave 1")

    def resources(self, kind: str) -> Resources:
        """What a step of this kind gets."""
        own: Mapping[str, Any] = self.steps.get(kind, {})  # type: ignore[call-overload]
        found: Resources = TypeAdapter(Resources).validate_python({**self.all, **own})
        return found


def load_profile(path: Path | None, cluster: str | None = None) -> Profile:
    """The profile of a file, or the default one; `cluster` takes the place of its own. Raises `UserError` for
    a file that is none, with what is wrong in it."""
    content: Any = {}
    if path is not None:
        if not path.is_file():
            raise UserError(f"The profile {path} does not exist; check the path, or see slurm/profiles.")
        try:
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"The profile {path} is not valid YAML ({error}); mend the file.") from None
    if not isinstance(content, dict):
        raise UserError(f"The profile {path} holds {type(content).__name__}, expected a mapping.")
    if cluster is not None:
        content = {**content, "cluster": cluster}
    try:
        profile: Profile = TypeAdapter(Profile).validate_python(content)
    except ValidationError as error:
        lines = "".join(
            f"\n  - {'.'.join(map(str, entry['loc'])) or 'profile'}: {entry['msg'].lower()}"
            for entry in error.errors(include_url=False)
        )
        raise UserError(f"The profile {path or 'of the command line'} has mistakes:{lines}") from None
    return profile
