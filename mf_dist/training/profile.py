"""A look inside a run (train.profile_steps): torch.profiler over a few optimizer steps of rank 0.

Writes RUN/profile/: trace.json.gz (for ui.perfetto.dev), and the table of training/trace.py as profile.json (for the
report) and profile.txt.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from mf_dist.runtime.atomic_files import partial_path, write_atomic, write_json
from mf_dist.runtime.distributed import Ranks
from mf_dist.runtime.figures import three_digits
from mf_dist.training.trace import as_text, summarize

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints log lines

WARM_UP = 3
"""Steps of a start that are not recorded: the first one compiles, and in the last one the profiler itself warms up."""


class StepProfile:
    """Every rank counts its steps; rank 0 records those after the first WARM_UP."""

    def __init__(self, steps: int, run_dir: Path, ranks: Ranks) -> None:
        """`steps`: how many to record; 0: none."""
        self.steps, self.folder, self._done = steps, run_dir / "profile", 0
        self._profiler: profile | None = None
        self._problem: Exception | None = None
        if steps and ranks.is_rank_zero:
            has_gpu = ranks.device.type == "cuda"
            self._device = torch.cuda.get_device_name() if has_gpu else "CPU"
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} if has_gpu else {ProfilerActivity.CPU}
            self._profiler = profile(
                activities=wanted & supported_activities(),
                schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            )

    def step(self) -> bool:
        """Call on every rank after each optimizer step. True after the last recorded one: then call `write`."""
        self._done += 1
        if self._profiler is not None and self._problem is None and self._done >= WARM_UP - 1:
            try:
                if self._done == WARM_UP - 1:
                    self._profiler.start()
                else:
                    self._profiler.step()
            except Exception as error:  # a profile must never end a run
                self._problem = error
        return self.steps > 0 and self._done == WARM_UP + self.steps

    def write(self, step: int) -> str:
        """Writes the folder on rank 0; `step` is the last recorded one. Returns a line for the log, which is a warning
        if that failed, and empty on other ranks."""
        if self._profiler is None:
            return ""
        try:
            if self._problem is not None:
                raise self._problem
            table = self._write(self._profiler, step)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"warning: no profile of steps {step - self.steps + 1} to {step}: {reason}"
        finally:
            self._profiler = None  # and its events
        ms = three_digits(table["ms"])
        return f"profiled steps {table['first_step']} to {step}, {ms} ms each: {self.folder}/profile.txt"

    def _write(self, profiler: profile, step: int) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = partial_path(self.folder / "trace.json")
        try:
            profiler.export_chrome_trace(str(partial))
            trace = partial.read_bytes()
        finally:
            partial.unlink(missing_ok=True)
        write_atomic(self.folder / "trace.json.gz", lambda file: file.write(gzip.compress(trace)))
        table = {"first_step": step - self.steps + 1, "device": self._device}
        table |= summarize(json.loads(trace)["traceEvents"])
        write_json(self.folder / "profile.json", table)
        write_atomic(self.folder / "profile.txt", lambda file: file.write(as_text(table).encode()))
        return table

    def end(self) -> str:
        """Call when training ends: a line for the log if that was before the profile was complete, else empty."""
        if self._profiler is None:
            return ""
        if self._done >= WARM_UP - 1 and self._problem is None:
            self._profiler.stop()
        self._profiler = None
        return (
            f"warning: no profile: this start made {self._done} of the {WARM_UP} + {self.steps} steps that "
            f"train.profile_steps={self.steps} needs"
        )
