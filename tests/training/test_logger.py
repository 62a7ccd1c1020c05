"""metrics.jsonl after a crash, and the status line."""

import json

from mf_dist.config.schema import load_config
from mf_dist.training.logger import Logger, _status_line

LINE = {
    "loss": 1.0,
    "raw_loss_r_equals_t": 2.0,
    "raw_loss_r_below_t": None,
    "du_dt_norm": None,
    "grad_norm": 0.5,
    "images_per_second": 640.0,
    "seconds_per_step": 0.1,
    "data_wait_share": 0.03,
    "memory_gib": 1.0,
}


def test_later_and_damaged_lines_are_removed_on_resume(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (10, 20, 30)]
    path.write_text("\n".join([*lines, '{"step": 4', "null", '{"x": 1}']))
    options = ["train.total_images=1050", "train.batch_size=10"]
    logger = Logger(load_config("configs/digits_cpu.yaml", options), tmp_path, step=20, samples_seen=995)
    logger.log({"step": 25, **LINE})
    assert _status_line({"step": 25, **LINE, "images_per_second": 1.4449}, 25).count("1.44 img/s") == 1
    logger.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 25]
    out = capsys.readouterr().out
    assert out.startswith("step 25/25 ") and "raw r=t 2 " in out and "640 img/s" in out and "raw r<t" not in out
