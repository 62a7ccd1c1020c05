"""A real SLURM from Debian's packages on one machine: munged, slurmctld and nodes in their own network namespaces.

Each node has its own host name, two network cards (eth0 for SLURM, ib0 on request), process table, /dev/shm and
8 fake GPUs (devices that are /dev/null). The last node has fewer CPUs than the others.
Killing a node's first process is a power cut. All files are in one temporary folder, and everything ends with this
process; nothing in /etc is used.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
CONFIG = """
ClusterName=test
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=0
# a test cannot wait for the defaults (30, 300 and 120 s)
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,kill_invalid_depend
# a partition of a higher tier preempts the lower one
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""
NODE = "NodeName={name} NodeAddr={address} NodeHostname={name} Port=6818 CPUs={cpus} RealMemory=500000 Gres=gpu:8"


def why_not() -> str | None:
    """The reason why a cluster cannot be set up on this machine, or None."""
    if os.getuid():
        return "needs root"
    if not shutil.which("apt-get") and not all(map(shutil.which, PROGRAMS)):
        return f"needs {', '.join(PROGRAMS)}, or apt-get to install them"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]).returncode:
        return "needs network, mount and process namespaces, which this machine refuses"
    return None


def install() -> None:
    if all(map(shutil.which, PROGRAMS)):
        return
    policy = Path("/usr/sbin/policy-rc.d")  # the packages must start no daemons
    is_new = not policy.exists()
    if is_new:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=env, timeout=300)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, env=env, timeout=600)
    finally:
        if is_new:
            policy.unlink()


class Cluster:
    def __init__(self, nodes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self._net, self._net2 = f"10.213.{os.getpid() % 250}", f"10.214.{os.getpid() % 250}"
        self._bridge, self._bridge2 = f"mf{os.getpid()}", f"mi{os.getpid()}"
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}
        self.env = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def up(self) -> None:
        self._write_files()
        munge = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        options = [f"--{name}={self.root / file}" for name, file in munge.items()]
        self._daemon("munged", "--foreground", *options, f"--log-file={self.root}/log/munged.log")
        _wait(lambda: (self.root / "munge.socket").exists(), 20, "munged")
        for bridge in (self._bridge, self._bridge2):
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        self._daemon("slurmctld", "-D", "-c")
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def wait_idle(self, seconds: float = 60) -> None:
        """All nodes up and free."""
        idle = ["idle"] * len(self.names)
        _wait(lambda: self.ask("sinfo", "-h", "-N", "-p", "train", "-o", "%T").split() == idle, seconds, "idle nodes")

    def down(self) -> None:
        """Ends the processes that were started, by their ids."""
        for process in self._nodes.values():
            _end(process, signal.SIGKILL)  # --kill-child ends all processes of the node
        for process in reversed(self._daemons):
            _end(process, signal.SIGTERM)
        for bridge in (self._bridge, self._bridge2):
            subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.root, ignore_errors=True)

    def start_node(self, name: str) -> None:
        number = self.names.index(name) + 1
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork"]
        command += [
            "--kill-child",
            str(Path(__file__).with_name("node.sh")),
            name,
            f"{self._net}.{number}/24",
            f"{self._net2}.{number}/24",
            self.root,
        ]
        with open(self.root / f"log/{name}.out", "a") as log:
            process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        own = os.readlink("/proc/self/ns/net")
        _wait(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != own, 10, f"the namespace of {name}")
        for bridge, card in ((self._bridge, "eth0"), (self._bridge2, "ib0")):
            end = f"{bridge}.{number}"
            _ip("link", "add", end, "type", "veth", "peer", "name", card, "netns", str(process.pid))
            _ip("link", "set", end, "master", bridge, "up")
        self._nodes[name] = process

    def cut_power(self, name: str) -> None:
        _end(self._nodes[name], signal.SIGKILL)
        # its network card disappears with the namespace

    def processes(self, name: str, word: str) -> list[int]:
        """Ids, in this namespace, of processes on a node whose command line contains `word`."""
        pids = []
        for pid in self._tree(self._nodes[name].pid):
            try:
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(pid)
            except OSError:
                continue
        return pids

    def run_on(self, name: str, *command: object) -> None:
        """Runs a command in the node's own namespaces, for a fault of that node alone."""
        (init,) = _children(self._nodes[name].pid)
        subprocess.run(["nsenter", "-t", str(init), "-m", "-u", "-n", "-p", *map(str, command)], check=True, timeout=20)

    def ask(self, *command: object, env: dict | None = None, cwd: Path | None = None) -> str:
        """Output of a command; empty if it fails."""
        done = subprocess.run(
            [*map(str, command)], env=env or self.env, cwd=cwd, capture_output=True, text=True, timeout=30
        )
        return "" if done.returncode else done.stdout

    def _tree(self, pid: int) -> list[int]:
        return [pid, *(p for child in _children(pid) for p in self._tree(child))]

    def _daemon(self, *command: str) -> None:
        with open(self.root / "log/daemons.out", "a") as log:
            wrapped = ["setpriv", "--pdeathsig", "KILL", *command]
            self._daemons.append(subprocess.Popen(wrapped, env=self.env, stdout=log, stderr=log))

    def _write_files(self) -> None:
        for folder in ("state", "log", "dev", *(f"spool/{name}" for name in self.names)):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)
        key = self.root / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        for number in range(8):
            path = self.root / f"dev/nvidia{number}"
            os.mknod(path, 0o20666, os.makedev(1, 3))
        addresses = {name: f"{self._net}.{i + 1}" for i, name in enumerate(self.names)}
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        host = socket.gethostname().split(".")[0]
        cpus = dict.fromkeys(self.names, 64) | {self.names[-1]: 48}
        nodes = "\n".join(NODE.format(name=n, address=address, cpus=cpus[n]) for n, address in addresses.items())
        config = CONFIG.format(host=host, net=self._net, port=port, root=self.root, nodes=nodes)
        hosts = {"localhost": "127.0.0.1", host: f"{self._net}.254", **addresses}
        (self.root / "slurm.conf").write_text(config)
        # without CUDA_VISIBLE_DEVICES, since these GPUs are files: ranks refuse GPUs that torch does not see
        gpus = f"Name=gpu Flags=no_gpu_env File={self.root}/dev/nvidia[0-7]"
        (self.root / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        (self.root / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except OSError:
        return []


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


def _end(process: subprocess.Popen, number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait(holds, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)
