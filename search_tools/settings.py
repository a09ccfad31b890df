"""Everything that decides a search; its study keeps it, so that a worker or a report needs nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from flexi_core.errors import FlexiError
from flexi_core.run.cost import NetworkCost
from flexi_core.run.sampler import PLAIN, SamplerTraits

from .backends.protocol import Backend
from .backends.teacher import TeacherSettings
from .fitness import stages_to
from .space.sampler_space import space_under
from .space.space import FAMILIES, Space
from .strategies.strategies import STRATEGIES


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search.

    Args:
        backend: what `open_backend` needs.
        teacher: the run whose output candidates are compared with, as a plain dict.
        identity: of the teacher, without its sigmas: what its samples depend on.
        speedup: the least reduction of MACs.
        families: parts of the space.
        strategy: one of `STRATEGIES`.
        seed: of the search.
        stages: sample counts of the fitness.
        finalists: how many of the best are compared on more samples in the end.
        fit: whether the blends of extrapolated steps are fitted to the teacher.
        reuse_guidance: whether steps may reuse guidance.
        guesses: how many schedules of least predicted error the search starts from.
        move: whether the noise levels of the best schedule's full steps are moved in the end; on a front they never are.
    """

    backend: dict[str, Any]
    teacher: dict[str, Any]
    identity: dict[str, Any]
    speedup: float
    families: tuple[str, ...] = FAMILIES
    strategy: str = STRATEGIES[0]
    seed: int = 0
    stages: tuple[int, ...] = (8, 32)
    finalists: int = 4
    fit: bool = True
    reuse_guidance: bool = False
    guesses: int = 6
    move: bool = True

    def __post_init__(self) -> None:
        # From a study they come back as lists.
        object.__setattr__(self, "families", tuple(self.families))
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.strategy not in STRATEGIES:
            raise FlexiError(f"unknown strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")

    @classmethod
    def of(cls, backend: Backend, speedup: float, samples: int, **others: Any) -> SearchSettings:
        """Return the settings of a search with a back end on this many samples."""
        identity = {key: value for key, value in backend.identity.items() if key != "sigmas"}
        return cls(backend.spec, asdict(backend.settings), identity, speedup, stages=stages_to(samples), **others)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchSettings:
        """Return the settings that a study keeps.

        Raises:
            FlexiError: they were made by another version of this project.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise FlexiError(f"the study's settings are a {type(values).__name__}; expected an object")
        if set(values) != known:
            raise FlexiError(
                f"the study's settings have {', '.join(sorted(values))}; this version expects {', '.join(sorted(known))}"
            )
        try:
            found = cls(**values)
            numbers = (found.speedup, found.seed, found.finalists, found.guesses, *found.stages)
            well = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
            well &= bool(found.stages) and set(found.families) <= set(FAMILIES)
            well &= all(isinstance(value, Mapping) for value in (found.backend, found.identity))
            teacher = found.teacher_settings
            well &= isinstance(teacher.sampler, str) and isinstance(teacher.scheduler, str) and isinstance(teacher.steps, int)
            well &= isinstance(teacher.cfg, int | float)
        except (TypeError, ValueError) as error:
            raise FlexiError(f"the study's settings cannot be read ({error})") from error
        if not well:
            raise FlexiError("the study's settings cannot be read: some of them are of another type than this version writes")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "families": list(self.families), "stages": list(self.stages)}

    @property
    def teacher_settings(self) -> TeacherSettings:
        return TeacherSettings(**self.teacher)

    @property
    def moves(self) -> bool:
        """Whether the search ends with moving noise levels."""
        return self.move and self.strategy != "nsga2"

    @property
    def samples(self) -> int:
        """Samples on which the best candidates are judged in the search."""
        return self.stages[-1]

    @property
    def default_name(self) -> str:
        """A study name that differs where the settings differ."""
        teacher = self.teacher_settings
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:6]
        return (
            f"{teacher.sampler}-{teacher.scheduler}-{teacher.steps}-cfg{teacher.cfg:g}-{self.speedup:g}x-"
            f"{self.strategy}-n{self.samples}-seed{self.seed}-{digest}"
        )

    def space(
        self,
        cost: NetworkCost,
        sigmas: Sequence[float] | None = None,
        sampler: SamplerTraits = PLAIN,
        cuts: Sequence[int] = (),
    ) -> Space:
        """Return the space that is searched.

        Args:
            cost: of the network.
            sigmas: of the teacher [n + 1]; without them there is no family `levels`.
            sampler: what the teacher's does.
            cuts: steps of the teacher at which one window or network of it ends and the next begins.

        Raises:
            FlexiError: the sampler or the windows leave nothing of the families.
        """
        return Space(
            self.teacher_settings.steps,
            self.speedup,
            cost,
            self.families,
            self.strategy == "nsga2",
            self.reuse_guidance,
            sigmas=None if sigmas is None else tuple(sigmas),
            **space_under(sampler),
            cuts=tuple(cuts),
        )
