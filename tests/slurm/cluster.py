"""A real Slurm on this machine: slurmctld and four slurmd that claim eight H100s each, all below one folder.

    python tests/slurm/cluster.py FOLDER     start one and stay until Ctrl-C; then, elsewhere:
    export SLURM_CONF=FOLDER/slurm.conf

Needs Debian's slurm-wlm (22.05) or later; no root, no systemd, no munge, no database.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NODES = ("n1", "n2", "n3", "n4")

_CONF = """\
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1000
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
KillWait=2
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=DEFAULT Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h100:8 State=UNKNOWN
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=1-0 State=UP
PartitionName=cpu Nodes=ALL MaxTime=1-0 State=UP
"""


def installed() -> bool:
    """Whether this machine has Slurm's daemons."""
    return all(shutil.which(name, path=_path()) for name in ("slurmctld", "slurmd", "sbatch"))


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Four nodes in a folder; ``environment`` is that of its clients."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("state", "spool", "run", "log", "dev"):
            (root / name).mkdir(parents=True)
        for number in range(8):
            (root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._port = self._write_conf()

    def _write_conf(self) -> int:
        host = socket.gethostname().split(".")[0]
        first = _free_ports(len(NODES) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={first + number}"
            for number, name in enumerate(NODES, 1)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        text = _CONF.format(host=host, port=first, user=user, root=self.root, nodes=nodes)
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gres = f"Name=gpu Type=h100 File={self.root}/dev/nvidia[0-7] Flags=nvidia_gpu_env"
        (self.root / "gres.conf").write_text(f"AutoDetect=off\nNodeName={','.join(NODES)} {gres}\n")
        return first

    def start(self) -> None:
        """Come up, all nodes idle."""
        self._start_controller("-i")
        for name in NODES:
            self.start_node(name)
        _wait(lambda: set(self.node_states().values()) == {"idle"}, "nodes")

    def restart_controller(self) -> None:
        """The controller ends, as for an upgrade, and a new one takes up its state; jobs run on."""
        controller = self._daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(30)
        self._start_controller()

    def start_node(self, name: str) -> None:
        """A node's daemon."""
        self._start(name, "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """A node's daemon and all that it runs die at once; the controller is told that it is down."""
        self._daemons.pop(name).kill()
        for pid, environment in processes():
            if f"SLURMD_NODENAME={name}\0" in environment and str(self.root) in environment:
                _kill(pid)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def stop(self) -> None:
        """End the daemons and every job."""
        self.run("scancel", "--user", self.run("id", "-un").strip(), check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for pid, environment in processes():
            if str(self.root) in environment:
                _kill(pid)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a client command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, done.stderr + done.stdout
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """``idle``, ``mixed``, ``down``, ... of each node."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Jobs by name, the last one of each."""
        told = json.loads(self.run("squeue", "--json", "--states=all"))["jobs"]
        return {job["name"]: job for job in sorted(told, key=lambda job: job["job_id"])}

    def _start_controller(self, *options: str) -> None:
        self._start("slurmctld", "-D", *options)
        _wait(lambda: _answers(self._port), "slurmctld")

    def _start(self, name: str, *arguments: str) -> None:
        program = "slurmctld" if name == "slurmctld" else "slurmd"
        log = (self.root / "log" / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            [program, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody uses now."""
    for first in range(30_000 + os.getpid() % 20_000, 60_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _wait(condition: Any, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not up after {seconds} s"
        time.sleep(0.1)


def processes() -> Iterator[tuple[int, str]]:
    """Other processes of this machine, with their environments (NAME=VALUE, a zero byte after each)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "environ").read_text(errors="replace")


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).resolve())
    cluster.start()
    print(f"export SLURM_CONF={cluster.root}/slurm.conf", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()
