"""The tables of an experiment, as Markdown, made from its records."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.compare.experiment import Budget
from train.compare.machine import Machine
from train.compare.outcome import FRACTIONS, ArmOutcome, Results, Spread, finite
from train.compare.records import ArmRecord
from train.compare.trials import rate_trials
from train.evaluate.needle import by_depth
from train.evaluate.recall import by_distance
from train.report.markdown import code, or_dash, section, table

BUDGETS: dict[Budget, str] = {"steps": "Equal steps", "seconds": "Equal seconds"}


def page(results: Results, source: str, pictures: Sequence[str]) -> str:
    """The page of an experiment.

    Args:
      results: what its records come to.
      source: the path of its file, as the command names it.
      pictures: names of the files beside the page.
    """
    experiment = results.plan.experiment
    parts = [
        f"# {experiment.name}",
        f"Made from the records beside it by this command, which trains what has no record yet:\n\n"
        f"{code(f'python -m train compare {source}')}",
        _progress(results),
        *(section(title, _budget(results, budget)) for budget, title in BUDGETS.items()),
        section("Seconds to the reference arm's losses", _speeds(results)),
        section("Pictures", *(f"![{name}]({name})" for name in pictures)),
        section("Retrieval by distance", _retrieval(results)),
        section("What distant context is worth", _contexts(results)),
        section("Cost", _cost(results)),
        section("Learning rates", _rates(results)),
        section("Machine", *_machines(results)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _progress(results: Results) -> str:
    experiment = results.plan.experiment
    trials = list(results.plan.trials(results.records))
    done = sum(results.records(trial) is not None for trial in trials)
    rates = ", ".join(f"{rate:g}" for rate in experiment.learning_rates)
    seeds = ", ".join(map(str, experiment.seeds))
    return (
        f"{done} of the {len(trials)} runs that can be named so far have a record. Seeds {seeds}; learning "
        f"rates from {rates}; {experiment.steps:,} steps of {experiment.base.data.batch} × "
        f"{experiment.base.data.length:,} tokens for the reference arm, `{experiment.reference}`. Losses are "
        "bits per byte of the same held-out rows for all arms and seeds. Seconds are of the steps alone: "
        "the time of a step at each window, measured once without other load, summed over an arm's steps. Of "
        "several seeds: the mean (least…greatest)."
    )


def _budget(results: Results, budget: Budget) -> str:
    rows = [
        (
            f"`{outcome.arm}`",
            f"{outcome.learning_rate:g}",
            f"{outcome.steps:,}",
            f"{outcome.seconds:,.1f}",
            _seeds(outcome),
            outcome.loss.show(".3f"),
            outcome.own_loss.show(".3f"),
            outcome.exposure.show(".1%"),
        )
        for outcome in results.at(budget)
    ]
    head = (
        *("arm", "learning rate", "steps", "seconds", "seeds", "loss, full mask", "loss, own mask"),
        "exposure, mean",
    )
    return table(head, rows) if rows else ""


def _seeds(outcome: ArmOutcome) -> str:
    failed = sum(record.failure is not None for record in outcome.records)
    return f"{len(outcome.records)}" + (f", {failed} failed" if failed else "")


def _speeds(results: Results) -> str:
    reference = results.reference
    if reference is None:
        return ""
    rows = [
        (
            f"`{outcome.arm}`",
            outcome.budget,
            *(_of_seeds(results.speed(outcome, fraction), outcome) for fraction in FRACTIONS),
        )
        for outcome in results.arms
        if outcome.arm != reference.arm
    ]
    if not rows:
        return ""
    words = (
        f"Seconds until an arm first has the loss that `{reference.arm}` has after a share of its steps, "
        f"divided by the seconds of `{reference.arm}` until then, seed by seed; below 1 the arm is sooner. A "
        "dash: no seed got there. Between validations the loss is taken to fall on a line."
    )
    head = ("arm", "schedule fitted to equal", *(f"after {fraction:.0%}" for fraction in FRACTIONS))
    return f"{words}\n\n{table(head, rows)}"


def _of_seeds(ratios: Spread, outcome: ArmOutcome) -> str:
    """The ratios, and of how many seeds they are, where not all got there."""
    some = 0 < len(ratios.values) < len(outcome.records)
    return ratios.show(".2f") + (f", {len(ratios.values)} of {len(outcome.records)} seeds" if some else "")


def _retrieval(results: Results) -> str:
    found = retrieval(results.arms)
    if not found:
        return ""
    distances = sorted({distance for accuracy in found.values() for distance in accuracy})
    rows = [
        (f"`{arm}`", budget, *(accuracy.get(distance, Spread(())).show(".0%") for distance in distances))
        for (arm, budget), accuracy in found.items()
    ]
    words = (
        "Share of the answers that are right, by how many tokens back the answer stands, at least."
        if results.plan.experiment.base.evaluation.recall
        else "Share of the needles that are found, by how many tokens back they lie, about."
    )
    head = ("arm", "equal", *(f"{distance:,}" for distance in distances))
    return f"{words}\n\n{table(head, rows)}"


def retrieval(outcomes: Sequence[ArmOutcome]) -> dict[tuple[str, Budget], dict[int, Spread]]:
    """Of each arm and budget the accuracy by distance in tokens: of recall, or else of the needle probe."""
    found: dict[tuple[str, Budget], dict[int, Spread]] = {
        (outcome.arm, outcome.budget): _by_key([_accuracy(record, outcome) for record in outcome.records])
        for outcome in outcomes
    }
    return {key: accuracy for key, accuracy in found.items() if accuracy}


def _accuracy(record: ArmRecord, outcome: ArmOutcome) -> Mapping[int, float | None]:
    evaluators = record.evaluators or {}
    if "recall" in evaluators:
        return by_distance(evaluators["recall"])
    length = outcome.plan.experiment.base.data.length
    found = by_depth(evaluators.get("needle", {}), "found")
    return {round((1 - depth) * length): share for depth, share in found.items()}


def _contexts(results: Results) -> str:
    experiment = results.plan.experiment
    rows = []
    for outcome in results.arms:
        ended = [record for record in outcome.records if not record.failure]
        worth = _by_key(
            [
                {
                    context: None if seen.bits_per_byte is None else seen.bits_per_byte - record.loss
                    for context, seen in (record.contexts or {}).items()
                }
                for record in ended
            ]
        )
        shown = (worth.get(str(context), Spread(())).show("+.4f") for context in experiment.contexts)
        rows.append((f"`{outcome.arm}`", outcome.budget, *shown))
    if not rows or not experiment.contexts:
        return ""
    words = (
        "Bits per byte that the loss rises by when each token sees so many tokens at most, itself among "
        "them. The model was not trained to end with that window, so it is an upper bound of what the "
        "context beyond is worth to it."
    )
    head = ("arm", "equal", *(f"{context:,} tokens" for context in experiment.contexts))
    return f"{words}\n\n{table(head, rows)}"


def _cost(results: Results) -> str:
    reference, share = results.reference, results.attention_share()
    if reference is None or not results.at("steps"):
        return ""
    rows = []
    for outcome in results.at("steps"):
        hidden = finite(share * (1 - value) for value in outcome.exposure.values)
        saved, trained = 1 - outcome.seconds / reference.seconds, results.saved_as_trained(outcome)
        rows.append((f"`{outcome.arm}`", hidden.show(".1%"), f"{saved:.1%}", trained.show(".1%")))
    words = (
        "Share of the reference arm's seconds that an arm saves in as many steps. Predicted: "
        f"{share:.1%}, the share of a full step that goes when the smallest window is shown, times what is "
        "hidden on average. By the times of steps: what the tables above count. As trained: by each run's "
        "own clock, whatever ran beside it."
    )
    head = ("arm", "predicted", "by the times of steps", "as trained")
    return f"{words}\n\n{table(head, rows)}"


def _rates(results: Results) -> str:
    experiment = results.plan.experiment
    rates = experiment.learning_rates
    if len(rates) == 1:
        return ""
    rows = []
    for arm in experiment.arms:
        ended = [results.records(trial) for trial in rate_trials(experiment, arm.name)]
        if any(ended):
            losses = [finite([] if record is None else [record.own_loss]) for record in ended]
            rows.append((f"`{arm.name}`", *(loss.show(".3f") for loss in losses)))
    if not rows:
        return ""
    words = (
        f"Loss after {experiment.steps_of_rates:,} steps with seed {experiment.seeds[0]}, under the mask "
        "that an arm ends with, which chooses its learning rate. A dash: not trained yet, or not finite."
    )
    return f"{words}\n\n{table(('arm', *(f'{rate:g}' for rate in rates)), rows)}"


def _machines(results: Results) -> Iterator[str]:
    timing = results.plan.timing
    load = f" Load average when they were measured: {or_dash(timing.load, '.1f')}, with this process."
    yield f"Times of steps: {_machine(timing.machine, [timing.core])}{load}"
    by_machine: dict[str, tuple[Machine, set[int | None]]] = {}
    for outcome in results.arms:
        for record in outcome.records:
            _, cores = by_machine.setdefault(str(record.machine), (record.machine, set()))
            cores.add(record.core)
    for machine, cores in by_machine.values():
        yield f"Runs: {_machine(machine, sorted(cores, key=str))}"


def _machine(machine: Machine, cores: Sequence[int | None]) -> str:
    pinned = [str(core) for core in cores if core is not None]
    where = f"one process a core, on core {' or '.join(pinned)}" if pinned else "not pinned to a core"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return f"{machine.processor}, {machine.device}, {machine.system}; {where}; {versions}."


def _by_key(found: Sequence[Mapping[Any, float | None]]) -> dict[Any, Spread]:
    """Of mappings to numbers, one mapping to their spread."""
    keys = dict.fromkeys(key for each in found for key in each)
    return {key: finite(each.get(key) for each in found) for key in keys}
