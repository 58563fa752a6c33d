"""A benchmark matrix: models x requests x plans, from a TOML file or by name.

Every combination is a cell. The first plan is the baseline, unless ``baseline`` names another: the others' ratios and
errors are against it. The files in ``src/swiftwan/bench/matrices`` are examples of all there is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from swiftwan.errors import PlanError, RequestError, did_you_mean

NAMED = Path(__file__).parent / "matrices"
PEERS = ("diffusers",)
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class BenchPlan:
    """One contestant: swiftwan with techniques, or a peer.

    Args:
        with_: technique specs, or a recipe's name; the environment's variables are expanded (``lora:$MY_LORA``).
        peer: run this package's own pipeline in place of swiftwan.
        dtype: None is the device's.
        compile: of a peer: its transformer by torch.compile.
        runs: timed runs in each process; unset: the matrix's.
        rung: how exact it is said to be; unset: told by its techniques' kinds.
        request: fields that this plan runs otherwise, such as the scheduler.
    """

    name: str
    with_: tuple[str, ...] | str = ()
    peer: str | None = None
    dtype: str | None = None
    compile: bool = False
    runs: int | None = None
    rung: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """The contestant in words: package, settings."""
        if self.peer:
            return " ".join(filter(None, (self.peer, self.dtype, "compiled" if self.compile else "eager")))
        specs = self.with_ if isinstance(self.with_, str) else " ".join(self.with_) or "no techniques"
        return f"swiftwan: {specs}" + (f", {self.dtype}" if self.dtype else "")


@dataclass(frozen=True)
class Cell:
    """One combination, to be run in a process of its own."""

    case: str
    model: str
    request_name: str
    request: Mapping[str, Any]
    plan: BenchPlan
    baseline: str
    runs: int
    warm_up_steps: int
    metrics: tuple[str, ...]
    device: str | None

    @property
    def name(self) -> str:
        return f"{self.model} / {self.request_name} / {self.plan.name}"

    @property
    def is_baseline(self) -> bool:
        return self.plan.name == self.baseline

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        plan = dict(values["plan"])
        if not isinstance(plan["with_"], str):
            plan["with_"] = tuple(plan["with_"])
        return cls(**{**values, "plan": BenchPlan(**plan), "metrics": tuple(values["metrics"])})


@dataclass(frozen=True)
class Matrix:
    """What to run.

    Args:
        rounds: times each cell's process starts; the cells take turns, so that a machine that grows warm or busy
            hits all of them.
        runs: timed runs in each process.
        warm_up_steps: denoising steps of the untimed first run in each process, at the full size.
        timeout_seconds: of one process.
    """

    name: str
    title: str
    models: tuple[str, ...]
    requests: Mapping[str, Mapping[str, Any]]
    plans: tuple[BenchPlan, ...]
    baseline: str
    rounds: int = 2
    runs: int = 1
    warm_up_steps: int = 2
    timeout_seconds: float = 3600.0
    metrics: tuple[str, ...] = ("psnr", "ssim", "lpips", "temporal-lpips", "clip-score")
    device: str | None = None

    def cells(self) -> list[Cell]:
        """Every combination, the baseline first of each model and request."""
        ordered = sorted(self.plans, key=lambda plan: plan.name != self.baseline)
        return [
            Cell(
                case=self.name,
                model=model,
                request_name=name,
                request={**request, **plan.request},
                plan=plan,
                baseline=self.baseline,
                runs=plan.runs or self.runs,
                warm_up_steps=self.warm_up_steps,
                metrics=self.metrics,
                device=self.device,
            )
            for model in self.models
            for name, request in self.requests.items()
            for plan in ordered
        ]

    def only(self, names: Sequence[str]) -> Matrix:
        """These plans and the baseline, their cells the same as in the whole.

        Raises:
            RequestError: there is no such plan.
        """
        known = [plan.name for plan in self.plans]
        for name in names:
            if name not in known:
                raise RequestError(f"matrix '{self.name}' has no plan '{name}'." + did_you_mean(name, known))
        return replace(self, plans=tuple(plan for plan in self.plans if plan.name in (*names, self.baseline)))


def named_matrices() -> list[str]:
    return sorted(path.stem for path in NAMED.glob("*.toml"))


def read_matrix(name_or_path: str) -> Matrix:
    """Read a matrix by name, or from a TOML file.

    Raises:
        RequestError: there is no such matrix, or a value in it is unknown or of the wrong type.
    """
    path = NAMED / f"{name_or_path}.toml"
    if "/" in name_or_path or name_or_path.endswith(".toml") or not path.is_file():
        path = Path(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = named_matrices()
        raise RequestError(
            f"there is no matrix '{name_or_path}', nor a file of that name." + did_you_mean(name_or_path, known)
        ) from None
    except OSError as error:
        raise RequestError(f"matrix '{name_or_path}' cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"matrix '{name_or_path}' is no TOML: {error}.") from None
    return _matrix(path.stem, values)


def _matrix(name: str, values: dict[str, Any]) -> Matrix:
    from swiftwan.measure.quality import check_metrics  # brings torch

    allowed = {f.name for f in fields(Matrix)} - {"name"}
    _known(f"matrix '{name}'", values, allowed)
    for wanted in ("models", "requests", "plans"):
        if not values.get(wanted):
            raise RequestError(f"matrix '{name}' has no '{wanted}'; it needs at least one.")
    for key, kinds in _TYPES.items():
        if key in values and (not isinstance(values[key], kinds) or isinstance(values[key], bool)):
            raise RequestError(f"matrix '{name}': {key} is {values[key]!r}; it must be {_named(kinds)}.")
    for key in ("rounds", "runs", "warm_up_steps", "timeout_seconds"):
        if values.get(key, 1) < 1:
            raise RequestError(f"matrix '{name}': {key} is {values[key]}; it must be 1 or more.")
    plans = tuple(_plan(plan, told) for plan, told in values.pop("plans").items())
    requests = {request: _request(request, told) for request, told in values.pop("requests").items()}
    baseline = values.pop("baseline", plans[0].name)
    if baseline not in (known := [plan.name for plan in plans]):
        raise RequestError(f"matrix '{name}': baseline is '{baseline}'." + did_you_mean(baseline, known))
    for key in ("models", "metrics"):
        if key in values:
            values[key] = tuple(values[key])
    title = values.pop("title", name)
    matrix = Matrix(name=name, title=title, requests=requests, plans=plans, baseline=baseline, **values)
    check_metrics(matrix.metrics)
    return matrix


_TYPES: dict[str, tuple[type, ...]] = {
    "title": (str,),
    "baseline": (str,),
    "device": (str,),
    "models": (list,),
    "metrics": (list,),
    "requests": (dict,),
    "plans": (dict,),
    "rounds": (int,),
    "runs": (int,),
    "warm_up_steps": (int,),
    "timeout_seconds": (int, float),
}


def _plan(name: str, told: Any) -> BenchPlan:
    if not isinstance(told, dict):
        raise RequestError(f"plan '{name}' is {told!r}; it must be a table.")
    _known(f"plan '{name}'", told, {"with", "peer", "dtype", "compile", "runs", "rung", "request"})
    specs = told.get("with", ())
    if told.get("peer") is not None and told["peer"] not in PEERS:
        raise RequestError(f"plan '{name}': peer is '{told['peer']}'." + did_you_mean(str(told["peer"]), PEERS))
    if told.get("peer") and specs:
        raise RequestError(f"plan '{name}' has both a peer and techniques ('with'); swiftwan's are not for others.")
    if told.get("compile") and not told.get("peer"):
        raise RequestError(f"plan '{name}': 'compile' is of peers; for swiftwan say with = [\"compile\"].")
    if not isinstance(told.get("runs", 1), int) or told.get("runs", 1) < 1:
        raise RequestError(f"plan '{name}': runs is {told['runs']!r}; it must be a whole number, 1 or more.")
    if told.get("dtype") not in (None, *DTYPES):
        raise RequestError(f"plan '{name}': dtype is '{told['dtype']}'." + did_you_mean(str(told["dtype"]), DTYPES))
    if not isinstance(specs, str) and not all(isinstance(spec, str) for spec in specs):
        raise RequestError(f"plan '{name}': with is {specs!r}; it must be a recipe's name or a list of techniques.")
    _check_specs(name, specs)
    return BenchPlan(
        name=name,
        with_=specs if isinstance(specs, str) else tuple(specs),
        peer=told.get("peer"),
        dtype=told.get("dtype"),
        compile=bool(told.get("compile")),
        runs=told.get("runs"),
        rung=told.get("rung"),
        request=_request(name, {"prompt": "of the request", **told.get("request", {})}, partial=True),
    )


def _check_specs(plan: str, specs: str | Sequence[str]) -> None:
    """Refuse what no machine knows before the first cell runs; what this machine lacks is told by the cell."""
    from swiftwan.composition import parse
    from swiftwan.recipes import check_name, check_no_name

    try:
        if isinstance(specs, str):
            check_name(specs)
            return
        check_no_name(specs)
        for spec in specs:
            if "$" not in spec:  # a variable is known when its cell runs
                parse(spec)
    except PlanError as problem:
        raise RequestError(f"plan '{plan}': {problem}") from None


def _request(name: str, told: Any, *, partial: bool = False) -> dict[str, Any]:
    """A request's fields, checked by the request itself, so that its messages are the ones users know."""
    from swiftwan.pipelines.request import request_from_json

    if not isinstance(told, dict):
        raise RequestError(f"request '{name}' is {told!r}; it must be a table.")
    if "prompt" not in told:
        raise RequestError(f"request '{name}' has no prompt.")
    checked = request_from_json({"task": "TextToVideo", "seed": 0, **told}).to_json()
    if partial:
        return {key: checked[key] for key in told if key != "prompt"}
    return checked


def _known(where: str, told: Mapping[str, Any], allowed: set[str]) -> None:
    for key in told:
        if key not in allowed:
            raise RequestError(f"{where} has no '{key}'." + did_you_mean(key, allowed))


def _named(types: tuple[type, ...]) -> str:
    names = {"list": "a list", "dict": "a table", "str": "text", "int": "a whole number", "float": "a number"}
    return " or ".join(names[kind.__name__] for kind in types)
