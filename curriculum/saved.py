"""Schedules as JSON: one in full (`to_json`), and all of a run's in a loader's state, small however long they are.

    [0, {"total_tokens": ..., "settings": ...}]                   from step 0 on, by the settings it was made from
    [0, {"total_tokens": ..., "phases": [[0, 8, 512], ...]}]      by its phases, where settings are not known
    [0, {"total_tokens": ..., "phases": {"digest": ..., ...}}]    by their digest, where they are too many
    [120, 24]                                                     from step 120 on, the adaptive one before at 24

A schedule that is named by its digest must be passed when the state is loaded; a loader passes its own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from curriculum.phases import Phases
from curriculum.schedule import Schedule
from curriculum.settings import RUN_KEYS, SEQLEN_NOW
from pipeline.errors import RunError

PHASES_KEYS = ("planner", "first_piece", "attention_window_positions", "seqlen_to_come")
"""Fields of a schedule that its phases do not tell, and its settings would."""
MOST_ROWS = 1500
"""Most rows of tables and phases in a state, at most 40 bytes each; beyond, the longest are named by digest."""


def to_json(schedule: Schedule) -> dict[str, Any]:
    """Its settings where they are known, else its phases; and where it ends."""
    if schedule.settings is not None:
        return {**{key: getattr(schedule, key) for key in RUN_KEYS}, "settings": schedule.settings}
    return _with_phases(schedule, [list(dataclasses.astuple(phase)) for phase in schedule.phases])


def from_json(data: dict[str, Any]) -> Schedule:
    """Inverse of `to_json`."""
    if "settings" in data:
        return Schedule.from_settings(**data["settings"], **{key: data[key] for key in RUN_KEYS})
    return _from_phases(
        data, Phases.of((step, seqlen, rows, window or 0) for step, seqlen, rows, window in data["phases"])
    )


def state_of(asked: Sequence[tuple[int, Schedule]]) -> list[list[Any]]:
    """The schedules asked for and the steps from which they hold, as JSON values."""
    rows = {number: _rows(schedule) for number, (_, schedule) in enumerate(asked)}
    while sum(rows.values()) > MOST_ROWS:
        rows.pop(max(rows, key=lambda number: rows[number]))
    state: list[list[Any]] = []
    for number, (step, schedule) in enumerate(asked):
        if number and (now := _raised(asked[number - 1][1], schedule)):
            state.append([step, now])
        else:
            state.append(
                [step, to_json(schedule) if number in rows else _with_phases(schedule, schedule.phases.summary())]
            )
    return state


def schedules_of(
    state: Iterable[Sequence[Any]], asked: Schedule, earlier: Iterable[Schedule] = ()
) -> list[tuple[int, Schedule]]:
    """Inverse of `state_of`. `asked` and `earlier`: where those that are named by their digest are looked for.

    Raises RunError for one that is not among them.
    """
    ours = to_json(asked) if asked.settings is not None else None  # making a long one from JSON is slow
    schedules: list[tuple[int, Schedule]] = []
    for step, data in state:
        if isinstance(data, int):
            schedule = schedules[-1][1].raised_to(data)
        elif isinstance(phases := data.get("phases"), dict):
            given = {schedule.phases.digest: schedule.phases for schedule in (asked, *earlier)}
            if phases["digest"] not in given:
                raise RunError(
                    "the saved state names a schedule of many lengths by its digest, and it is not the one given",
                    where=f"from step {step:,} on",
                    found=phases,
                    allowed=", ".join(str(one.summary()) for one in given.values()),
                    remedy="give the loader that schedule; to go on with another from here: "
                    "load_state_dict(state, change_schedule=True, earlier=[that schedule])",
                )
            schedule = _from_phases(data, given[phases["digest"]])
            schedule = asked if schedule == asked else schedule
        else:
            schedule = asked if data == ours else from_json(data)
        schedules.append((operator.index(step), schedule))
    return schedules


def _with_phases(schedule: Schedule, phases: Any) -> dict[str, Any]:
    return {**{key: getattr(schedule, key) for key in (*RUN_KEYS, *PHASES_KEYS)}, "phases": phases}


def _from_phases(data: dict[str, Any], phases: Phases) -> Schedule:
    return Schedule(phases, **{key: data[key] for key in (*RUN_KEYS, *PHASES_KEYS)})


def _rows(schedule: Schedule) -> int:
    """Rows of tables and phases in its JSON."""
    if schedule.settings is None:
        return len(schedule.phases)
    return sum(len(value) for value in schedule.settings["curriculum"].values() if isinstance(value, list | tuple))


def _raised(before: Schedule, schedule: Schedule) -> int | None:
    """The length by which an adaptive schedule differs from the one before it; None where more or less does."""
    if schedule.settings is None or before.settings is None:
        return None
    now: int | None = schedule.settings["curriculum"].get(SEQLEN_NOW)
    raised = before.raised_to(now)
    return now if raised == schedule and raised.settings == schedule.settings else None
