"""Logging of a run on rank 0: metrics.jsonl, a status line, a progress bar, and W&B if enabled."""

import json
import secrets
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mf_dist.config.loader import to_tree
from mf_dist.config.schema import Config
from mf_dist.runtime.figures import three_digits

SHOWN = {
    "raw r=t": "raw_loss_r_equals_t",
    "raw r<t": "raw_loss_r_below_t",
    "|du/dt|": "du_dt_norm",
    "grad": "grad_norm",
}
WANDB_SECONDS = 100.0
"""Limit of a call of W&B; longer than its own limits of a start."""


class Logger:
    def __init__(self, config: Config, run_dir: Path, step: int, samples_seen: int) -> None:
        """`step`, `samples_seen`: where the run resumes. Later lines of metrics.jsonl are removed; at step 0 an old
        file is moved to metrics.jsonl.old."""
        steps_left = config.steps_left(samples_seen)
        self.total_steps = step + steps_left
        self._path = run_dir / "metrics.jsonl"
        if step:
            _keep_lines_up_to(self._path, step)
        elif self._path.is_file():
            self._path.replace(run_dir / "metrics.jsonl.old")
        self._bar = tqdm(
            total=samples_seen + steps_left * config.train.batch_size,
            initial=samples_seen,
            unit="img",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            desc="train",
        )
        self._wandb_seconds = min(WANDB_SECONDS, config.train.hang_seconds / 2)  # before the watchdog ends the run
        self._wandb = None
        if config.log.wandb != "off":
            self._wandb = _start_wandb(config, run_dir, self.info, self._wandb_seconds)

    def info(self, text: str) -> None:
        """Prints a line on stdout, above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl and prints a status line; `metrics` has step and samples_seen."""
        self._write(metrics)
        self.info(_status_line(metrics, self.total_steps))

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        """The same for a measurement, as a separate line; `metrics` has step, samples_seen and evaluation_seconds."""
        self._write(metrics)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" in name)
        pause = f"training waited {three_digits(metrics['evaluation_seconds'])} s for it"
        self.info(f"step {metrics['step']}/{self.total_steps} measured: {values}; {pause}")

    def _write(self, metrics: dict[str, Any]) -> None:
        line = json.dumps(metrics, allow_nan=False) + "\n"
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self.info(f"warning: cannot write {self._path}: {error}; training continues, this line is lost")
        self._to_wandb(lambda run: run.log(metrics, step=metrics["step"]))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        def send(run: Any) -> None:
            run.log({name: _import_wandb().Image(str(path))}, step=step)

        self._to_wandb(send)

    def _to_wandb(self, send: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            _within(self._wandb_seconds, lambda: send(self._wandb))
        except Exception as error:  # metrics.jsonl is complete
            self._wandb = None
            self.info(f"warning: W&B stopped working ({_first_line(error)}); continuing without it, see {self._path}")

    def close(self) -> None:
        self._bar.close()
        self._to_wandb(lambda run: run.finish())


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # truncated by a crash
    path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def _status_line(m: dict[str, Any], total_steps: int) -> str:
    seconds = (total_steps - m["step"]) * m["seconds_per_step"]
    eta = f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    raw = " ".join(f"{label} {m[key]:.3g}" for label, key in SHOWN.items() if m.get(key) is not None)
    return (
        f"step {m['step']}/{total_steps} {raw} "
        f"{three_digits(m['images_per_second'])} img/s wait {m['data_wait_share']:.0%} "
        f"mem {three_digits(m['memory_gib'])} GiB eta {eta}"
    )


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, in a thread of its own: what W&B does wrong must neither end the run nor keep it waiting.
    Raises an Exception whatever it raises, such as SystemExit, and if it takes longer."""
    outcome = Future[Any]()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)
        except BaseException as error:
            outcome.set_exception(RuntimeError(repr(error)))

    threading.Thread(target=run, name="wandb", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        raise RuntimeError(f"no answer after {seconds:.0f} s") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _start_wandb(config: Config, run_dir: Path, info: Callable[[str], None], seconds: float) -> Any:
    """A W&B run, with the same id after every restart. Falls back to offline mode if the server is unreachable; None
    if that fails too. `seconds`: limit of each attempt."""
    try:
        wandb = _within(seconds, _import_wandb)
        options = _wandb_options(config, run_dir)
    except Exception as error:
        info(f"warning: W&B cannot be used ({_first_line(error)}); continuing without it")
        return None
    for mode in dict.fromkeys([config.log.wandb, "offline"]):
        try:
            return _within(seconds, partial(_init_wandb, wandb, mode, options))
        except Exception as error:  # no network, no key, no disk
            fallback = "logging W&B offline" if mode == "online" else "continuing without W&B"
            info(f"warning: W&B {mode} does not start ({_first_line(error)}); {fallback}")
            with suppress(Exception):
                _within(seconds, wandb.teardown)  # its service still holds the id of the failed run
    return None


def _import_wandb() -> Any:
    import wandb

    return wandb


def _wandb_options(config: Config, run_dir: Path) -> dict[str, Any]:
    id_file = run_dir / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    return {
        "project": config.log.wandb_project,
        "name": run_dir.name,
        "id": id_file.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "dir": str(run_dir),
        "config": to_tree(config),
    }


def _init_wandb(wandb: Any, mode: str, options: dict[str, Any]) -> Any:
    settings = wandb.Settings(init_timeout=30, login_timeout=60, silent=True)
    return wandb.init(**options, mode=mode, settings=settings)
