"""Starts training processes fast: imports everything once, then forks a child for each request.

Reads JSON lines {"argv": [...], "env": {...}, "out": FILE, "faults": [...], "script": null or FILE} and answers
{"pid": N}; a line {"wait": N} is answered {"code": N} when that child has ended (negative: killed by that signal).
Children run the real training command, or the script.

A fault is a dict with `do` and a condition. do: kill (SIGKILL, which nothing can catch), term (SIGTERM), usr1, freeze
(SIGSTOP), exit, raise, memory (out of GPU memory), sleep, pause (20 ms), the name of an errno to raise, or short (a
write that silently stops half-way). When:
    {"step": n}                  before that step
    {"seconds": s}               s seconds after the child began
    {"io": n}                    at the n-th disk operation of the CheckpointWriter: each write, fsync and rename counts
                                 once before and once after it
    {"call": name, "nth": n}     instead of the n-th write, fsync or rename, and of `for` in all from it on
    {"draws": 1}                 while samples are drawn
    {"block": n}                 while the n-th block of features is written, half-way
Without `do`: {"draw": s} makes drawing samples take s seconds longer; {"poison": "loss", "gradient" or "tangent",
"step": n} makes that quantity not finite in that step.
"""

import errno
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time

import torch

import mf_dist.checkpoint.writer
import mf_dist.evaluation.measure
import mf_dist.runtime.atomic_files
import mf_dist.training.snapshots
import mf_dist.training.trainer
from mf_dist import train
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.runtime.torchvision_repair import repair_torchvision

LATE = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "mf_dist.evaluation.during",
    "mf_dist.evaluation.pictures",
    "mf_dist.report.page",
)
"""Modules that training or evaluation import lazily: 2 to 7 seconds, here once for all children."""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "freeze": signal.SIGSTOP}


def do(action):
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "exit":
        os._exit(7)
    elif action == "raise":
        raise RuntimeError("injected fault")
    elif action == "sleep":
        time.sleep(10_000)
    elif action == "pause":
        time.sleep(0.02)
    elif action == "memory":
        raise torch.OutOfMemoryError("injected")
    else:
        raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))


class Disk:
    """The disk as the CheckpointWriter sees it, with faults; counts operations over all saves."""

    def __init__(self, faults):
        self.faults, self.operations, self.calls = faults, 0, {"write": 0, "fsync": 0, "rename": 0}
        module_os = mf_dist.checkpoint.writer.os
        self.fsync, self.replace, self.real_open = module_os.fsync, module_os.replace, open
        for module in (mf_dist.checkpoint.writer, mf_dist.runtime.atomic_files):
            module.os = self
        mf_dist.checkpoint.writer.open = self.opened

    def __getattr__(self, name):  # everything else is the real os
        return getattr(os, name)

    def count_operation(self):
        self.operations += 1
        for fault in self.faults:
            if fault.get("io") == self.operations:
                do(fault["do"])

    def around(self, name, call, *arguments):
        if threading.current_thread().name != "checkpoint-writer":  # such as writes of status.json
            return call(*arguments)
        self.count_operation()
        self.calls[name] += 1
        for fault in self.faults:
            if fault.get("call") == name and self.calls[name] in range(
                fault["nth"], fault["nth"] + fault.get("for", 1)
            ):
                if fault["do"] == "short":
                    return call(arguments[0][: len(arguments[0]) // 2])
                do(fault["do"])
        result = call(*arguments)
        self.count_operation()
        return result

    def opened(self, *arguments, **options):
        return File(self, self.real_open(*arguments, **options))


class File:
    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, data):
        return self.disk.around("write", self.file.write, data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def install(faults):
    if any("io" in fault or "call" in fault for fault in faults):
        disk = Disk(faults)
        real_fsync, real_replace = disk.fsync, disk.replace
        disk.fsync = lambda number: disk.around("fsync", real_fsync, number)
        disk.replace = lambda source, to: (  # not those of retention, whose failure is not a failed save
            disk.around("rename", real_replace, source, to)
            if str(source).endswith(".tmp")
            else real_replace(source, to)
        )
    for fault in faults:
        if "seconds" in fault:
            threading.Timer(fault["seconds"], do, [fault["do"]]).start()
    if any("step" in fault and "do" in fault for fault in faults):
        one_step = mf_dist.training.trainer.Trainer._one_step

        def with_faults(self, batches):
            for fault in faults:
                if fault.get("step") == self.step + 1 and "do" in fault:
                    do(fault["do"])
            one_step(self, batches)

        mf_dist.training.trainer.Trainer._one_step = with_faults
    if any("draw" in fault for fault in faults):
        draw = mf_dist.training.snapshots.Snapshots._draw_grid
        mf_dist.training.snapshots.Snapshots._draw_grid = lambda *a: (time.sleep(faults[0]["draw"]), draw(*a))
    if any("draws" in fault for fault in faults):
        draws = mf_dist.training.snapshots.Snapshots._draw_grid
        mf_dist.training.snapshots.Snapshots._draw_grid = lambda *a: (do(faults[0]["do"]), draws(*a))
    for fault in faults:
        if "block" in fault:
            install_block(fault)
    poisons = {fault["step"]: fault["poison"] for fault in faults if "poison" in fault}
    if poisons:
        poison(poisons)


def install_block(fault):
    """The fault occurs half-way through the n-th write of a block."""
    savez, count = mf_dist.runtime.atomic_files.np.savez, [0]

    def half(file, **arrays):
        count[0] += 1
        if count[0] == fault["block"]:
            file.write(b"PK" * 1000)
            file.flush()
            do(fault["do"])
        savez(file, **arrays)

    mf_dist.runtime.atomic_files.np.savez = half


def poison(poisons):
    """Makes the loss, one gradient or the JVP's tangent not finite in the given steps."""
    train_micro_batch = mf_dist.training.trainer.Trainer._train_micro_batch

    def poisoned(self, *inputs):
        where, loss = poisons.get(self.step + 1), self.engine._engine.module
        handles = []
        if where == "loss":
            handles.append(loss.register_forward_hook(lambda m, i, out: (out[0] * float("nan"), out[1])))
        elif where == "gradient":
            handles.append(loss.net.blocks[0].mlp.fc1.weight.register_hook(lambda g: g / 0))
        elif where == "tangent":
            divide = lambda m, i, out: out if not isinstance(out, tuple) else (out[0], out[1] / 0)  # noqa: E731
            handles.append(loss.net.register_forward_hook(divide))
        sums = train_micro_batch(self, *inputs)
        for handle in handles:
            handle.remove()
        return sums

    mf_dist.training.trainer.Trainer._train_micro_batch = poisoned


def child(request):
    os.environ.update(request.get("env", {}))
    os.makedirs(os.path.dirname(request["out"]), exist_ok=True)
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["train", *request["argv"]]
    install(request.get("faults", []))
    try:
        if request.get("script"):
            runpy.run_path(request["script"], run_name="__main__")
        exit_without_finalization(train.main())
    except SystemExit as end:
        exit_without_finalization(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        exit_without_finalization(1)


def under_torchrun(faults, *argv):
    """zygote.py FAULTS ARGUMENTS...: one process of a launcher, with the faults of its rank."""
    own_faults = [fault for fault in json.loads(faults) if fault.get("rank", 0) == int(os.environ["RANK"])]
    sys.argv = ["train", *argv]
    install(own_faults)
    exit_without_finalization(train.main())


def main():
    if len(sys.argv) > 1:
        under_torchrun(*sys.argv[1:])
    repair_torchvision()
    for name in LATE:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            code = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            print(json.dumps({"code": code}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        print(json.dumps({"pid": pid}), flush=True)
    exit_without_finalization(0)


if __name__ == "__main__":
    main()
