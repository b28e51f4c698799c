"""What is particular to each tracker that `accelerate` knows: how it is opened and found again, and how it takes a table."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Sequence[Any]
TABLE = "completions"


@dataclass(frozen=True, slots=True)
class Opening:
    """How a run is opened at a tracker.

    Attributes:
        project: what runs are filed under.
        run: the run folder; its name is the run's.
        identity: the run's name where trackers want one that nothing else has.
        key: what the tracker itself called the run when it was new; None: it is.
        step: the run goes on after this step; None: it is new.
    """

    project: str
    run: Path
    identity: str
    key: str | None
    step: int | None

    @property
    def resume(self) -> str:
        """In the words of wandb, trackio and swanlab."""
        return "never" if self.step is None else "allow"


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """One kind of tracker.

    Attributes:
        arguments: of its class in `accelerate.tracking`.
        table: gives it a table of a step: tracker, step, names of the columns, rows. None: it has no place for one.
        key: what it calls the run; asked where it alone can say.
        elsewhere: whether it can be closed in another thread than it was opened in, so that it need not be waited for.
        local: its files are in the run folder.
    """

    arguments: Callable[[Opening], dict[str, Any]]
    table: Callable[[Any, int, Sequence[str], Sequence[Row]], None] | None
    key: Callable[[Any], str] | None = None
    elsewhere: bool = True
    local: bool = False


def _tensorboard(o: Opening) -> dict[str, Any]:
    # What a killed run wrote after the step is taken back, as in the run's own files.
    return {"run_name": "tensorboard", "logging_dir": o.run} | ({} if o.step is None else {"purge_step": o.step + 1})


def _wandb(o: Opening) -> dict[str, Any]:
    return {"run_name": o.project, "name": o.run.name, "id": o.identity, "resume": o.resume}


def _trackio(o: Opening) -> dict[str, Any]:
    return {"run_name": o.project, "name": f"{o.run.name}-{o.identity}", "resume": o.resume}


def _swanlab(o: Opening) -> dict[str, Any]:
    return {"run_name": o.project, "name": o.run.name, "id": o.identity, "resume": o.resume}


def _mlflow(o: Opening) -> dict[str, Any]:
    return {"experiment_name": o.project, "run_name": o.run.name, "run_id": o.key}


def _comet(o: Opening) -> dict[str, Any]:
    from comet_ml import ExperimentConfig

    # Numbers and tables leave, nothing that it would collect by itself: no code, no output, no command line.
    config = ExperimentConfig(
        name=o.run.name, log_code=False, log_git_metadata=False, log_git_patch=False, auto_output_logging=False, parse_args=False
    )  # fmt: skip
    return {"run_name": o.project, "experiment_key": o.key, "mode": "get_or_create" if o.key else "create", "experiment_config": config}


def _aim(o: Opening) -> dict[str, Any]:
    quiet = {"system_tracking_interval": None, "capture_terminal_logs": False}
    return {"run_name": o.run.name, "logging_dir": ".", "experiment": o.project, "run_hash": o.key, **quiet}


def _clearml(o: Opening) -> dict[str, Any]:
    alone = dict.fromkeys(("auto_connect_arg_parser", "auto_connect_frameworks", "auto_connect_streams"), False)
    named = {"project_name": o.project, "task_name": o.run.name}
    return {"run_name": o.project, **named, "continue_last_task": o.key or False, "reuse_last_task_id": False, **alone}


def _dvclive(o: Opening) -> dict[str, Any]:
    return {"dir": str(o.run / "dvclive"), "resume": o.step is not None, "save_dvc_exp": False, "dvcyaml": None}


def _texts_of_tensorboard(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    def line(cells: Sequence[Any]) -> str:
        shown = (html.escape(str(cell), quote=False).replace("|", "&#124;").replace("\n", "<br>") for cell in cells)
        return f"| {' | '.join(shown)} |"

    table = "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
    tracker.tracker.add_text(TABLE, table, global_step=step)


def _table_of_accelerate(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    tracker.log_table(TABLE, columns=list(columns), data=[list(row) for row in rows], step=step)


def _table_of_trackio(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pandas
    import trackio

    tracker.log({TABLE: trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(columns)))}, step=step)


def _table_of_swanlab(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import swanlab

    tracker.log({TABLE: swanlab.echarts.Table().add(list(columns), [list(row) for row in rows])}, step=step)


def _table_of_mlflow(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import mlflow

    mlflow.log_table({name: [row[i] for row in rows] for i, name in enumerate(columns)}, f"{TABLE}/step-{step:06d}.json")


def _table_of_comet(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    tracker.tracker.log_table(f"{TABLE}-step-{step:06d}.csv", tabular_data=[list(row) for row in rows], headers=list(columns))


def _texts_of_aim(tracker: Any, step: int, columns: Sequence[str], rows: Sequence[Row]) -> None:
    from aim import Text

    texts = [Text("\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True))) for row in rows]
    tracker.tracker.track(texts, name=TABLE, step=step)


KINDS: Mapping[str, TrackerKind] = {
    "aim": TrackerKind(_aim, _texts_of_aim, key=lambda tracker: str(tracker.tracker.hash)),
    "clearml": TrackerKind(_clearml, _table_of_accelerate, key=lambda tracker: str(tracker.tracker.id), elsewhere=False),
    "comet_ml": TrackerKind(_comet, _table_of_comet, key=lambda tracker: str(tracker.tracker.get_key())),
    "dvclive": TrackerKind(_dvclive, None, local=True),
    # mlflow knows an active run by its thread, swanlab sets signal handlers, clearml waits for a thread that is the closing one.
    "mlflow": TrackerKind(_mlflow, _table_of_mlflow, key=lambda tracker: str(tracker.tracker.info.run_id), elsewhere=False),
    "swanlab": TrackerKind(_swanlab, _table_of_swanlab, elsewhere=False),
    "tensorboard": TrackerKind(_tensorboard, _texts_of_tensorboard, local=True),
    "trackio": TrackerKind(_trackio, _table_of_trackio),
    "wandb": TrackerKind(_wandb, _table_of_accelerate),
}
"""By the name that a recipe has for it, which is its package's too."""
