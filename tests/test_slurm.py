"""On a cluster: processes that `srun` started are one run, and recipes/slurm.sbatch stops, saves and goes on."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ports import hold_port
from test_distributed import distance, environment, newest, records
from victims import Victims
from zppo.api import ADDRESSES
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.distributed.launcher import Launch, rank_of, read_launch, started_by_slurm
from zppo.errors import LauncherError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "slurm.sbatch"

STEP = {  # of the fourth process of `srun --nodes=4 --ntasks-per-node=2`
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04,09]-ib,login1",
    "SLURM_JOB_NODELIST": "gpu[01-04,09]-ib,login1",
    "SLURM_NTASKS": "8",
    "SLURM_TASK_PID": "77",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_srun_says_what_torchrun_would() -> None:
    ours = started_by_slurm(STEP)
    assert ours == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03-ib", "MASTER_PORT": ours["MASTER_PORT"]}
    assert 15_000 <= int(ours["MASTER_PORT"]) < 30_000
    assert read_launch(STEP) == Launch(rank=3, processes=8) and rank_of(STEP) == 3
    assert started_by_slurm(STEP | ours) == ours  # once they are set
    assert started_by_slurm(STEP | {"SLURM_STEP_ID": "2"})["MASTER_PORT"] != ours["MASTER_PORT"]  # two runs in one job
    chosen = {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
    assert started_by_slurm(STEP | chosen).items() >= chosen.items()
    alone = STEP | {"CUDA_VISIBLE_DEVICES": "1"}  # --gpus-per-task=1
    assert started_by_slurm(alone)["LOCAL_RANK"] == "0"
    few = {name: STEP[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST", "SLURM_JOB_ID")}
    assert started_by_slurm(few).items() >= {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu01-ib"}.items()


def test_what_srun_did_not_start_is_alone() -> None:
    batch = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}  # the batch script itself
    for env in ({}, batch, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}):
        assert started_by_slurm(env) == {} and read_launch(env) == Launch() and rank_of(env) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "64", "LOCAL_RANK": "5", "GROUP_WORLD_SIZE": "8"}
    assert started_by_slurm(STEP | torchrun) == {} and read_launch(STEP | torchrun) == Launch(rank=5, processes=64)


def test_a_shell_of_srun_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --ntasks=8 --pty bash`, and torchrun in it; a program that srun starts from there has its variables too, and no terminal."""
    shell = STEP | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "34889"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "1"}
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    assert started_by_slurm(shell) == {} and read_launch(shell) == Launch()
    assert read_launch(shell | torchrun) == Launch(rank=1, processes=2)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    assert read_launch(shell) == Launch(rank=0, processes=8)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("a[1-3]b[02-04],c", "a1b02"),
        ("n[001,005].local", "n001.local"),
        ("node[001-004,007],gpu-a", "node001"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("", None),
        ("x[1", None),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str | None) -> None:
    env = STEP | {"SLURM_STEP_NODELIST": hosts, "SLURM_JOB_NODELIST": hosts}
    if first:
        assert started_by_slurm(env)["MASTER_ADDR"] == first
    else:
        with pytest.raises(LauncherError, match="SLURM_JOB_NODELIST.*set MASTER_ADDR"):
            started_by_slurm(env)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"RANK": "0"}, "RANK is '0'.*this is number 3"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is '4'.*srun started 8"),
        ({"GROUP_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "8"}, "srun started 8 launchers.*several runs.*--ntasks-per-node=1"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID is 8"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_STEP_NUM_TASKS": "0"}, "SLURM_STEP_NUM_TASKS is 0"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is 127.0.0.1.*4 nodes"),
        ({"SLURM_HET_SIZE": "2"}, "heterogeneous job.*MASTER_ADDR.*MASTER_PORT"),
    ],
)
def test_variables_that_contradict_are_named(more: dict[str, str], said: str) -> None:
    with pytest.raises(LauncherError, match=said):
        read_launch(STEP | more)
    rank_of(STEP | more)  # for the message's own prefix


def test_other_commands_run_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n 8 zppo recipes` would be eight; a rank above 0 would end the process of this test."""
    for name, value in (STEP | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert main(["recipes"]) == 2
    assert "zppo recipes is for one" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_with_slurms_variables_alone_are_one_run(recipe: Path, tmp_path: Path, victims: Victims) -> None:
    run, jobs = tmp_path / "run", {"SLURM_JOB_ID": str(hold_port()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    rest = ("--train.steps=2", "--data.eval=null")
    started = [{**jobs, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    assert victims.run("train", recipe, f"--output={run}", *rest, run=run, started=started) == 0, victims.said[-3000:]
    assert "srun started 2 processes; they meet at localhost:" in victims.said
    assert victims.said.count("run folder") == 1 and "2 processes, each with all weights" in victims.said
    assert [line["event"] for line in records(run)] == ["step", "step"]


# --- the batch script, with SLURM's commands played by a few lines ----------------------------------------------------

STUBS = {
    "scontrol": 'if [[ $1 == show ]]; then tr , "\\n" <<< "$3"; else echo "$@" >> "$LOG"; fi',
    "vllm": 'echo "vllm on $SLURMD_NODENAME with $CUDA_VISIBLE_DEVICES: $*" >> "$LOG"; sleep 60',
    "curl": "exit 0",
    "scancel": 'echo "scancel $*" >> "$LOG"; cat "$PIDS"/* | xargs -r kill -TERM 2> /dev/null; exit 0',
}
# One process for each node; its number goes to a file, for scancel.
SRUN = """
hosts=; tasks=
while [[ $1 == --* ]]; do
    case $1 in --nodelist=*) hosts=${1#*=} ;; --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
i=0
for host in ${hosts//,/ }; do
    SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$tasks SLURMD_NODENAME=$host "$@" &
    echo $! > "$PIDS/$!"; i=$((i + 1))
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
TORCHRUN = """
echo "torchrun on $SLURMD_NODENAME with $CUDA_VISIBLE_DEVICES: $*" >> "$LOG"
until [ "$(grep -c ^vllm "$LOG")" -ge "${SERVERS:-0}" ]; do sleep 0.05; done  # on a busy machine they begin later
exec sleep "${TRAINS:-0}"
"""


def cluster(folder: Path, **commands: str) -> dict[str, str]:
    """The environment of a batch script on two nodes of four GPUs."""
    (folder / "bin").mkdir()
    (folder / "pids").mkdir()
    for name, text in (STUBS | {"srun": SRUN} | commands).items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    job = {
        "SLURM_JOB_ID": str(hold_port()),
        "SLURM_JOB_NAME": "zppo",
        "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
        "SLURM_GPUS_ON_NODE": "4",
    }
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder / "log"), "PIDS": str(folder / "pids")}
    return environment() | job | paths | {"RUN": str(folder / "run"), "RECIPE": "mine.yaml", "PATIENCE": "0.1"}


def batch(env: dict[str, str], folder: Path, *, usr1_when: Path | None = None) -> tuple[int, list[str]]:
    """The script's exit status, and what was asked of SLURM; it is told that its limit is near once a file is there."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    with open(folder / "said", "wb") as said:
        job = subprocess.Popen(["bash", str(SCRIPT)], env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            while usr1_when is not None and not usr1_when.exists() and job.poll() is None:
                time.sleep(0.05)
            if usr1_when is not None:
                job.send_signal(10)
            status = job.wait(240)
        finally:
            for path in (folder / "pids").iterdir():
                subprocess.run(["kill", "-KILL", path.name], stderr=subprocess.DEVNULL)
                path.unlink()
            job.kill()
    return status, sorted(log.read_text(encoding="utf-8").splitlines()) if log.exists() else []


def test_the_batch_script_deals_out_nodes_and_gpus(tmp_path: Path) -> None:
    env = cluster(tmp_path, torchrun=TORCHRUN)
    status, asked = batch(env | {"TEACHER": "big", "TEACHER_NODES": "1", "SERVERS": "1"}, tmp_path)
    assert status == 0 and len(asked) == 2, (tmp_path / "said").read_text()
    assert asked[0].startswith("torchrun on localhost with 0,1,2,3: --nnodes=1 --nproc_per_node=4 --rdzv_backend=c10d")
    assert "--rdzv_endpoint=localhost:" in asked[0]
    assert f"-m zppo train mine.yaml --output={tmp_path}/run --train.sharding=fsdp2" in asked[0]
    assert asked[0].endswith("--teacher.base_urls=[http://127.0.0.1:8000/v1]")
    assert asked[1].startswith("vllm on 127.0.0.1 with 0,1,2,3: serve big --port 8000 --data-parallel-size 4")

    status, asked = batch(env | {"TEACHER": "big", "TEACHER_NODES": "0", "SERVERS": "2"}, tmp_path)  # a GPU of every node
    assert [line.split(":")[0] for line in asked] == [
        f"{what} on {host} with {gpus}" for what, gpus in (("torchrun", "1,2,3"), ("vllm", "0")) for host in ("127.0.0.1", "localhost")
    ]
    assert all("--nnodes=2 --nproc_per_node=3" in line for line in asked[:2])
    assert all(line.endswith("=[http://localhost:8000/v1,http://127.0.0.1:8000/v1]") for line in asked[:2])

    status, asked = batch(env | {"TEACHER": ""}, tmp_path)
    assert len(asked) == 2 and all("on" in line and "base_urls" not in line for line in asked)
    status, asked = batch(env | {"TEACHER": "big", "TEACHER_NODES": "2"}, tmp_path)
    assert status == 2 and not asked and "nothing is left for the student" in (tmp_path / "said").read_text()


def test_the_batch_script_stops_ahead_of_the_limit_and_goes_on(tmp_path: Path) -> None:
    env = cluster(tmp_path, torchrun=TORCHRUN) | {"TEACHER": ""}
    status, asked = batch(env | {"TRAINS": "60"}, tmp_path, usr1_when=tmp_path / "log")
    assert status != 0 and asked[0] == f"requeue {env['SLURM_JOB_ID']}"
    assert f"scancel --signal=TERM {env['SLURM_JOB_ID']}" in asked
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    status, asked = batch(env, tmp_path)
    assert status == 0 and all(line.endswith(f"-m zppo resume {tmp_path}/run") for line in asked)


def test_the_batch_script_says_how_it_ended(tmp_path: Path) -> None:
    """A launcher that fails at once fails the job; a teacher that does not come up costs no more than it was given."""
    env = cluster(tmp_path, torchrun="exit 7", curl="exit 22")
    assert batch(env | {"TEACHER": ""}, tmp_path)[0] == 7
    status, asked = batch(env | {"TEACHER": "big", "TEACHER_NODES": "1", "TEACHER_WAIT": "0"}, tmp_path)
    assert status == 1 and not any("torchrun" in line for line in asked)
    assert "the teacher at http://127.0.0.1:8000 has not come up within 0 s" in (tmp_path / "said").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_two_launchers_on_two_nodes_stop_and_go_on(recipe: Path, tmp_path: Path, victims: Victims) -> None:
    """recipes/slurm.sbatch with torchrun itself, an agent and a process for each of two nodes, against the run that was not stopped."""
    whole = tmp_path / "whole"
    settings = ("--train.sharding=fsdp2", "--train.optimizer=adamw")
    assert victims.run("train", recipe, f"--output={whole}", *settings, run=whole, processes=2) == 0, victims.said[-3000:]

    env = cluster(tmp_path, torchrun=f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    env |= {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "", "TEACHER": "", "RECIPE": str(recipe)}
    run = tmp_path / "run"
    status, asked = batch(env, tmp_path, usr1_when=run / "rollouts" / "step-000001.parquet")
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert status != 0 and "2 processes, weights sharded over them (FSDP2)" in said, said[-3000:]
    assert "SIGTERM: the run is saved in" in said and asked[0].startswith("requeue") and not (run / "final").exists()
    status, _ = batch(env, tmp_path)
    assert status == 0, (tmp_path / "said").read_text(encoding="utf-8")[-3000:]
    assert "resumed after step" in (tmp_path / "said").read_text(encoding="utf-8")
    ours, theirs = ([r for r in records(folder) if r["event"] != "start"] for folder in (run, whole))
    assert ours == theirs and records(run, "buffer.jsonl") == records(whole, "buffer.jsonl")
    assert distance(run / "final", whole / "final") == 0
    ours, theirs = (torch.load(newest(folder) / "optimizer.pt", weights_only=True) for folder in (run, whole))
    assert all(torch.equal(v, theirs["state"][i][n]) for i, s in ours["state"].items() for n, v in s.items())


def test_a_resumed_run_is_told_where_its_servers_are_now(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else; the recipe in the folder stays as it is."""
    one = "http://new:8000/v1"
    load_recipe(recipe, [f"--{name}={one if name.endswith('url') else f'[{one}]'}" for name in ADDRESSES] + ["--judge.model=j"])  # settings
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(recipe, run / "recipe.yaml")
    saved = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    saved["teacher"] |= {"model": "far", "base_urls": ["http://old:8000/v1"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    seen = []
    monkeypatch.setattr("zppo.train.run._run", lambda settings, *_, **__: seen.append(settings.teacher.base_urls) or run)
    monkeypatch.setattr("zppo.train.run.check_run_folder", lambda run: None)
    assert main(["resume", str(run), "--teacher.base_urls=[http://new:8000/v1,http://newer:8000/v1]"]) == 0
    assert seen == [("http://new:8000/v1", "http://newer:8000/v1")]
    assert "old" in (run / "recipe.yaml").read_text(encoding="utf-8")
