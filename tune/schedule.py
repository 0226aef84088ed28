"""Ray Tune's schedulers and searchers, made to follow the sweep's folder: what they must remember is replayed from it after a restart."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import ray.tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from tune.plan import Sweep, Trial
from tune.spaces import Distribution, Values

# Schedulers count in percent of a trial's own budget, so trials of different batch sizes compare, and 100 is always the end.
TIME = "progress"
GRACE, REDUCTION = 100 / 27, 3  # ASHA: the best third goes on at 1/27, 1/9 and 1/3 of the budget
MEDIAN_GRACE, MEDIAN_SAMPLES = 10.0, 3
PERTURB_EVERY = 10.0


def scheduler(sweep: Sweep) -> TrialScheduler:
    """The scheduler of a sweep; the metric and its direction come from TuneConfig."""
    kind = sweep.settings.scheduler
    if kind == "asha":
        return _Asha(sweep, time_attr=TIME, max_t=100, grace_period=GRACE, reduction_factor=REDUCTION)
    if kind == "median":
        return _Median(sweep, time_attr=TIME, grace_period=MEDIAN_GRACE, min_samples_required=MEDIAN_SAMPLES)
    if kind == "pbt":
        return _pbt(sweep)
    return FIFOScheduler()


class _Gone:
    """Stands for a trial of an earlier driver."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _Recorded:
    """In front of an early-stopping scheduler: notes each stop in the trial's folder, and tells the scheduler on the start what trials reported before."""

    def __init__(self, sweep: Sweep, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sweep, self._replayed = sweep, False

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        if not self._replayed:
            self._replayed = True
            for planned in self._sweep.trials():
                outcome = self._sweep.outcome(planned)
                if outcome.status in ("finished", "stopped") and outcome.reports:
                    gone = _Gone(planned.id)
                    super().on_trial_add(controller, gone)  # type: ignore[misc]
                    self._replay(controller, gone, outcome.reports)
        # An unfinished trial is judged at the next rung, not again at those it passed.
        self._replay(controller, trial, self._sweep.outcome(self._sweep.trial(trial.config["id"])).reports)

    def _replay(self, controller: Any, trial: Any, reports: tuple[dict[str, Any], ...]) -> None:
        for report in reports:
            if self._sweep.metric in report:
                super().on_trial_result(controller, trial, report)  # type: ignore[misc]

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        if decision == TrialScheduler.STOP and result[TIME] < 100 and not result.get("failed"):
            self._sweep.end_trial(trial.config["id"], "stopped")
        return decision


class _Asha(_Recorded, AsyncHyperBandScheduler):  # type: ignore[misc]
    pass


class _Median(_Recorded, MedianStoppingRule):  # type: ignore[misc]
    def _replay(self, controller: Any, trial: Any, reports: tuple[dict[str, Any], ...]) -> None:
        # Its rule needs the past of a trial, not another verdict on it.
        self._results[trial].extend(report for report in reports if self._sweep.metric in report)
        if not self._results[trial]:
            del self._results[trial]


def _pbt(sweep: Sweep) -> PopulationBasedTraining:
    ((_, part),) = sweep.space.parts.items()

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        # Ray copies the better trial's assignment, changes the values, and hands it here: its id says who was cloned.
        clipped = {key: d.clip(config[key]) for key, d in part.items()}
        return {**config, **clipped, "donor": config["id"], "clone": uuid.uuid4().hex}

    mutations = {key: list(d.values) if d.kind == "choice" else _domain(d) for key, d in part.items()}
    return _Pbt(
        sweep,
        time_attr=TIME,
        perturbation_interval=PERTURB_EVERY,
        hyperparam_mutations=mutations,
        custom_explore_fn=explore,
        log_config=False,
    )


class _Pbt(PopulationBasedTraining):  # type: ignore[misc]
    def __init__(self, sweep: Sweep, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sweep = sweep

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        # Ray refuses a Searcher beside PBT, so the planned values come in here.
        planned = self._sweep.trial(trial.config["id"])
        trial.set_config({**trial.config, **planned.values, "clone": planned.clone})
        super().on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[TIME] >= 100 or result.get("failed"):
            return str(
                TrialScheduler.CONTINUE
            )  # a finished trial neither clones nor is cloned: there is nothing left to train
        return str(super().on_trial_result(controller, trial, result))

    def _exploit(self, controller: Any, trial: Any, trial_to_clone: Any) -> None:
        own = trial.config["id"]
        super()._exploit(controller, trial, trial_to_clone)
        trial.set_config({**trial.config, "id": own})  # it is still itself: a later clone of it must name it


def _domain(d: Distribution) -> Any:
    low, high = d.values
    kinds = {
        "uniform": ray.tune.uniform,
        "loguniform": ray.tune.loguniform,
        "randint": ray.tune.randint,
        "lograndint": ray.tune.lograndint,
    }
    return kinds[d.kind](low, high + 1 if "int" in d.kind else high)


class Planned(Searcher):  # type: ignore[misc]
    """Hands out the trials that are planned and not done; with an optimizer, plans further ones as results come in."""

    def __init__(self, sweep: Sweep, todo: list[Trial], optimizer: Optimizer | None = None) -> None:
        super().__init__(metric=sweep.metric, mode="max" if sweep.sign > 0 else "min")
        self._sweep, self._todo, self._optimizer = sweep, list(todo), optimizer
        self._number = len(sweep.trials())
        self._given: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._todo:
            trial = self._todo.pop(0)
        elif self._optimizer is not None and self._number < self._sweep.settings.num_trials:
            trial = self._sweep.new_trial(self._number, *self._optimizer.ask())
            self._number += 1
        else:
            return Searcher.FINISHED
        self._given[trial_id] = trial
        return {"id": trial.id, "sweep_dir": str(self._sweep.path), **trial.values, "clone": trial.clone}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optimizer is not None:
            self._optimizer.tell(
                self._given[trial_id], self._sweep.outcome(self._given[trial_id]).metric(self._sweep.metric)
            )

    def save(self, checkpoint_path: str) -> None:
        """Ray wants a file; the sweep's folder is what counts."""
        with open(checkpoint_path, "w") as file:
            json.dump({}, file)

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("sweeps are resumed from their own folder")


class Optimizer:
    """Optuna's TPE over a space, told what the sweep's folder knows."""

    def __init__(self, sweep: Sweep) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, sweep.space
        known = [(trial, sweep.outcome(trial)) for trial in sweep.trials()]
        # Another seed for each restart, else a resumed sweep would ask its first questions again.
        sampler = optuna.samplers.TPESampler(
            seed=sweep.settings.seed + len(known), n_startup_trials=min(10, max(2, sweep.settings.num_trials // 4))
        )
        self._study = optuna.create_study(direction="maximize" if sweep.sign > 0 else "minimize", sampler=sampler)
        for trial, outcome in known:
            if outcome.status not in ("pending", "unfinished"):  # those tell when they are done
                self.tell(trial, outcome.metric(sweep.metric))

    def ask(self) -> tuple[str, Values]:
        """(preset, values) of the next trial; the preset is one of the choices, the others depend on it."""
        trial = self._study.ask()
        preset = str(trial.suggest_categorical("preset", list(self._space.parts)))
        values = {}
        for key, d in self._space.parts[preset].items():
            if d.kind == "choice":
                # Optuna's choices are scalars: a list (hidden_dims) is chosen by its place.
                values[key] = d.values[trial.suggest_categorical(f"{preset} {key}", list(range(len(d.values))))]
            elif "int" in d.kind:
                values[key] = trial.suggest_int(f"{preset} {key}", *d.values, log="log" in d.kind)
            else:
                values[key] = trial.suggest_float(f"{preset} {key}", *d.values, log="log" in d.kind)
        return preset, values

    def tell(self, trial: Trial, value: float | None) -> None:
        """A trial's result; None or NaN counts as failed."""
        distributions = self._optuna.distributions
        parameters: dict[str, Any] = {"preset": trial.preset}
        kinds: dict[str, Any] = {"preset": distributions.CategoricalDistribution(list(self._space.parts))}
        for key, d in self._space.parts[trial.preset].items():
            name, given = f"{trial.preset} {key}", trial.values[key]
            if d.kind == "choice":
                parameters[name], kinds[name] = (
                    d.values.index(given),
                    distributions.CategoricalDistribution(list(range(len(d.values)))),
                )
            else:
                make = distributions.IntDistribution if "int" in d.kind else distributions.FloatDistribution
                parameters[name], kinds[name] = given, make(*d.values, log="log" in d.kind)
        states = self._optuna.trial.TrialState
        good = value is not None and math.isfinite(value)
        made = self._optuna.trial.create_trial(
            params=parameters,
            distributions=kinds,
            value=value if good else None,
            state=states.COMPLETE if good else states.FAIL,
        )
        self._study.add_trial(made)
