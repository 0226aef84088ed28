"""Ray Tune's schedulers and searchers, based on the sweep's folder.

After a restart, their state is replayed from that folder.
"""

from __future__ import annotations

import math
import random
import uuid
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray.tune
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune import schedulers
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from .budget import Budget
from .plan import Sweep, Trial
from .spaces import MAX_TRIALS, Distribution, Values
from .trial import free_workers

# Schedulers count in percent of a trial's own steps, which makes trials of different batch sizes comparable.
TIME = "progress"
GRACE, REDUCTION = 100 / 27, 3  # ASHA: the best third goes on at 1/27, 1/9 and 1/3 of the budget
MEDIAN_GRACE, MEDIAN_SAMPLES = 10.0, 3
PERTURB_EVERY = 10.0


def scheduler(sweep: Sweep, budget: Budget | None = None) -> TrialScheduler:
    """The scheduler of a sweep. The metric and its direction come from TuneConfig."""
    kind = sweep.settings.scheduler
    if kind == "asha" or sweep.settings.budget is not None:
        return _Asha(sweep, budget=budget, time_attr=TIME, max_t=100, grace_period=GRACE, reduction_factor=REDUCTION)
    if kind == "median":
        return _Median(sweep, time_attr=TIME, grace_period=MEDIAN_GRACE, min_samples_required=MEDIAN_SAMPLES)
    if kind == "pbt":
        return _Pbt(sweep)
    return schedulers.FIFOScheduler()


class FreeWorkers(ray.tune.Callback):  # type: ignore[misc]
    """Frees the resources of a trial's workers whenever the trial ends or is to be retried."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        free_workers(self._sweep.trial_dir(trial.config["id"]))

    on_trial_error = on_trial_recover = on_trial_complete


class InTime(ray.tune.Stopper):  # type: ignore[misc]
    """Stops all trials at the end of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._budget.is_over()


class _Gone(NamedTuple):
    """A stand-in for a trial of an earlier driver."""

    trial_id: str


class _Recorded:
    """A mix-in for an early-stopping scheduler.

    It records each stop in the trial's folder. At the start, it replays to the scheduler the reports that trials sent
    to an earlier driver.
    """

    def __init__(self, sweep: Sweep, budget: Budget | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sweep, self._budget, self._replayed = sweep, budget, False

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
        # An unfinished trial is judged at its next rung, not again at those that it has passed.
        self._replay(controller, trial, self._sweep.outcome(self._sweep.trial(trial.config["id"])).reports)

    def _replay(self, controller: Any, trial: Any, reports: tuple[dict[str, Any], ...]) -> None:
        for report in reports:
            if self._sweep.metric in report:
                super().on_trial_result(controller, trial, report)  # type: ignore[misc]

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        if decision == TrialScheduler.STOP and result[TIME] < 100 and not result.get("failed"):
            if self._budget is not None and result[TIME] < self._budget.rung():
                return str(TrialScheduler.CONTINUE)  # there is time for this trial
            self._sweep.end_trial(trial.config["id"], "stopped")
        return decision


class _Asha(_Recorded, schedulers.AsyncHyperBandScheduler):  # type: ignore[misc]
    pass


class _Median(_Recorded, schedulers.MedianStoppingRule):  # type: ignore[misc]
    def _replay(self, controller: Any, trial: Any, reports: tuple[dict[str, Any], ...]) -> None:
        # The median rule needs a trial's past reports, without judging them again.
        self._results[trial].extend(report for report in reports if self._sweep.metric in report)
        if not self._results[trial]:
            del self._results[trial]


class _Pbt(schedulers.PopulationBasedTraining):  # type: ignore[misc]
    def __init__(self, sweep: Sweep) -> None:
        (part,) = sweep.space.parts.values()
        mutations = {k: d.values if d.kind == "choice" else partial(d.sample, random.Random()) for k, d in part.items()}
        super().__init__(
            time_attr=TIME,
            perturbation_interval=PERTURB_EVERY,
            hyperparam_mutations=mutations,
            custom_explore_fn=self._explore,
            log_config=False,
        )
        self._sweep, self._part = sweep, part

    def _explore(self, config: dict[str, Any]) -> dict[str, Any]:
        # Ray passes a copy of the better trial's assignment with changed values: the id tells which trial was cloned.
        clipped = {key: d.clip(config[key]) for key, d in self._part.items()}
        return {**config, **clipped, "donor": config["id"], "clone": uuid.uuid4().hex}

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        # Ray refuses a Searcher together with PBT, so the planned values come in here.
        planned = self._sweep.trial(trial.config["id"])
        trial.set_config({**trial.config, **planned.values, "clone": planned.clone})
        super().on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[TIME] >= 100 or result.get("failed"):
            return str(TrialScheduler.CONTINUE)  # nothing is left to train, so it neither clones nor is cloned
        return str(super().on_trial_result(controller, trial, result))

    def _exploit(self, controller: Any, trial: Any, trial_to_clone: Any) -> None:
        trial_id = trial.config["id"]
        super()._exploit(controller, trial, trial_to_clone)
        trial.set_config({**trial.config, "id": trial_id})  # it keeps its id, which a later clone of it must name


class Planned(Searcher):  # type: ignore[misc]
    """Hands out planned trials that are not done. With an optimizer, plans more trials as results come in."""

    def __init__(
        self, sweep: Sweep, todo: list[Trial], optimizer: Optimizer | None = None, budget: Budget | None = None
    ) -> None:
        super().__init__(metric=sweep.metric, mode="max" if sweep.sign > 0 else "min")
        self._sweep, self._todo, self._optimizer, self._budget = sweep, list(todo), optimizer, budget
        self._number = len(sweep.trials())
        self._suggested: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        settings = self._sweep.settings
        most = settings.num_trials or (MAX_TRIALS if settings.budget is not None else 0)
        if self._budget is not None and not self._budget.may_begin():
            return Searcher.FINISHED
        if self._todo:
            trial = self._todo.pop(0)
        elif self._optimizer is not None and self._number < most:
            trial = self._sweep.new_trial(self._number, *self._optimizer.ask())
            self._number += 1
        elif settings.search == "random" and self._number < most:
            # With a budget: as many trials as there is time for.
            trial = self._sweep.new_trial(self._number, *self._sweep.space.sample(settings.seed, self._number))
            self._number += 1
        else:
            return Searcher.FINISHED
        self._suggested[trial_id] = trial
        return {"id": trial.id, "sweep_dir": str(self._sweep.path), **trial.values, "clone": trial.clone}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optimizer is not None:
            trial = self._suggested[trial_id]
            self._optimizer.tell(trial, self._sweep.value(trial, self._sweep.outcome(trial)))

    def save(self, checkpoint_path: str) -> None:
        """Writes the file that Ray expects. Sweeps are resumed from their own folder."""
        Path(checkpoint_path).write_text("{}")


class Optimizer:
    """Optuna's TPE over a space, told all results in the sweep's folder."""

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._parts = sweep.space.parts
        known = [(trial, sweep.outcome(trial)) for trial in sweep.trials()]
        # Each restart gets another seed, or a resumed sweep would repeat its first suggestions.
        seed, num_random = (sweep.settings.seed + len(known)) % 2**32, min(10, max(2, sweep.settings.num_trials // 4))
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_random)
        self._study = optuna.create_study(direction="maximize" if sweep.sign > 0 else "minimize", sampler=sampler)
        for trial, outcome in known:
            if outcome.status not in ("pending", "unfinished"):  # those are told when they are done
                self.tell(trial, sweep.value(trial, outcome))

    def _distributions(self, *presets: str) -> dict[str, BaseDistribution]:
        """The space as Optuna's distributions: a choice of the preset, and for each preset its own keys."""
        distributions: dict[str, BaseDistribution] = {"preset": CategoricalDistribution(list(self._parts))}
        for preset in presets:
            distributions |= {f"{preset} {key}": _distribution(d) for key, d in self._parts[preset].items()}
        return distributions

    def ask(self) -> tuple[str, Values]:
        """(preset, values) of the next trial. Optuna suggests values for every preset; the chosen one's count."""
        params = self._study.ask(self._distributions(*self._parts)).params
        preset = params["preset"]
        suggested = {key: params[f"{preset} {key}"] for key in self._parts[preset]}
        choices = {key: d.values for key, d in self._parts[preset].items() if d.kind == "choice"}
        return preset, {key: choices[key][value] if key in choices else value for key, value in suggested.items()}

    def tell(self, trial: Trial, value: float | None) -> None:
        """A trial's result; None or NaN counts as failed."""
        params: dict[str, Any] = {"preset": trial.preset}
        for key, d in self._parts[trial.preset].items():
            value_of_key = trial.values[key]
            params[f"{trial.preset} {key}"] = d.values.index(value_of_key) if d.kind == "choice" else value_of_key
        good = value is not None and math.isfinite(value)
        result = {"value": value, "state": TrialState.COMPLETE} if good else {"state": TrialState.FAIL}
        kinds = self._distributions(trial.preset)
        self._study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, **result))


def _distribution(d: Distribution) -> BaseDistribution:
    """A distribution as Optuna's. Optuna chooses scalars, so choices (such as hidden_dims) are made by position."""
    if d.kind == "choice":
        return CategoricalDistribution(range(len(d.values)))
    low, high = d.values
    numeric = IntDistribution if "int" in d.kind else FloatDistribution
    return numeric(low, high, log="log" in d.kind)
