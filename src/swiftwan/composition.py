"""Techniques put in order: checked against the machine, the model and each other, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swiftwan.device import Device, parse_dtype
from swiftwan.errors import PlanError, RequestError, WeightsError, did_you_mean
from swiftwan.facts import Facts
from swiftwan.guidance import Guide
from swiftwan.models.config import KnownModel
from swiftwan.models.vae import Tiling
from swiftwan.pipelines.request import Request
from swiftwan.techniques import TECHNIQUES
from swiftwan.techniques.base import Settings, Technique
from swiftwan.techniques.precision import Dtype


def parse(spec: str) -> Technique:
    """Read ``name[:value][:key=value,...]``.

    Raises:
        PlanError: unknown technique or option, a value missing, left over or of the wrong type.
    """
    name, _, rest = spec.partition(":")
    kind = TECHNIQUES.get(name)
    if kind is None:
        raise PlanError(f"unknown technique '{name}'." + did_you_mean(name, TECHNIQUES))
    return kind.read(rest)


@dataclass(frozen=True)
class Plan:
    """Techniques in order of application, and what they come to."""

    techniques: tuple[Technique, ...]
    settings: Settings

    @property
    def specs(self) -> tuple[str, ...]:
        return tuple(technique.spec for technique in self.techniques)

    def check(self, request: Request) -> None:
        """Raise PlanError for every technique that cannot meet this request."""
        found = ((technique, technique.unfit_for_request(request)) for technique in self.techniques)
        if problems := [f"{technique.name}: {unfit}" for technique, unfit in found if unfit]:
            raise PlanError("; ".join(problems) + ".")

    def adapt(self, facts: Facts) -> Facts:
        """What is known of a model once this plan has changed it: a few-step model has other defaults."""
        if self.settings.few_step is None:
            return facts
        defaults = self.settings.few_step.over(facts.known.defaults)
        return replace(facts, known=replace(facts.known, defaults=defaults))

    @property
    def guide(self) -> Guide:
        return self.settings.guide

    @property
    def tiling(self) -> Tiling | None:
        return self.settings.tiling


def compose(specs: Sequence[str], device: Device, dtype: str | None = None, model: KnownModel | None = None) -> Plan:
    """Check everything, then put it in order.

    Raises:
        PlanError: every problem at once.
    """
    techniques: list[Technique] = []
    problems: list[str] = []
    for spec in specs:
        try:
            techniques.append(parse(spec))
        except RequestError as problem:
            problems.append(str(problem))
    if dtype is not None:
        wanted = parse_dtype(dtype)
        techniques = [t for t in techniques if not isinstance(t, Dtype) or parse_dtype(t.value) == wanted]
    techniques.sort(key=lambda technique: (technique.slot, technique.spec))
    problems += _conflicts(techniques)
    runnable: list[Technique] = []
    for technique in techniques:
        if unreadable := technique.unreadable():
            problems.append(f"{technique.name}: {unreadable}")
            continue
        if missing := technique.missing_on(device):
            here = _available(technique, device)
            problems.append(f"'{technique.spec}' cannot run on {device.name}: {missing}{here}")
            continue
        try:
            if model is not None:
                technique.fit(model)
            runnable.append(technique)
        except (RequestError, WeightsError) as problem:
            problems.append(f"{technique.name}: {problem}")
    settings = Settings(parse_dtype(dtype) if dtype else device.dtype, one_memory=device.capability is None)
    for technique in runnable:
        try:
            settings = technique.apply(settings)
        except RequestError as problem:
            problems.append(str(problem))
    if problems:
        raise PlanError(_all_told(problems))
    return Plan(tuple(techniques), settings)


def _all_told(problems: Sequence[str]) -> str:
    """On one line: a single one as it is, more of them numbered."""
    told = [problem.rstrip(".") for problem in problems]
    if len(told) > 1:
        told = [f"({number}) {problem}" for number, problem in enumerate(told, 1)]
        told[0] = f"{len(told)} problems: {told[0]}"
    line = "; ".join(told)
    return line if line.endswith("?") else f"{line}."


def _available(technique: Technique, device: Device) -> str:
    """What could stand in its place on this device, in words."""
    names = [f"{technique.name}:{value}" for value in technique.values]
    here = [name for name in names if not parse(name).missing_on(device)]
    return f"; here there are {', '.join(here)}" if here else ""


def _conflicts(techniques: Sequence[Technique]) -> list[str]:
    return [
        f"'{one.spec}' and '{other.spec}': {why}"
        for i, one in enumerate(techniques)
        for other in techniques[i + 1 :]
        if (why := one.conflict(other))
    ]
