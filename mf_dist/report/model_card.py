"""The README.md of a model folder: a model card, with the front matter that the Hugging Face hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mf_dist.config.loader import from_tree
from mf_dist.config.schema import Config
from mf_dist.runtime.figures import three_digits

PROTOCOL = (
    "nfe",
    "sampler",
    "guidance",
    "interval",
    "num_samples",
    "labels",
    "seed",
    "features",
    "reference",
    "precision",
)
"""What a table of measurements shows of an entry of metrics.json, beside its values."""


def model_card(
    name: str, state: Mapping[str, Any], origin: str, entries: Sequence[Mapping[str, Any]], picture: str | None
) -> str:
    """Markdown. state: as in config.json; origin: sentences on where the weights are from; entries: of metrics.json;
    picture: file name of a grid of samples."""
    config = from_tree(Config, state["config"], f"the config of {name}")
    return "\n\n".join(
        [
            _front_matter(config),
            f"# {name}",
            _summary(config),
            origin,
            *([f"![samples, one class in each row]({picture})"] if picture else []),
            _use(config, state["vae"]),
            *([] if "imported" in state else [_data(config, state), _recipe(config, state)]),
            _measurements(entries),
            "## Licence\n\nTO FILL IN: the licence of these weights, here and in the first lines of this file.\n",
        ]
    )


def _front_matter(config: Config) -> str:
    kind = "flow-matching" if config.objective.is_flow else config.objective_section.replace("_", "-")
    fields = {
        "library_name": "mf_dist",
        "pipeline_tag": "unconditional-image-generation",  # the hub's name for images without a text
        "tags": [
            kind,
            config.model.network.replace("_", "-"),
            *(["class-conditional"] if config.model.num_classes else []),
        ],
        "license": "other",
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(config: Config) -> str:
    model = config.model
    classes = f"{model.num_classes:,} classes" if model.num_classes else "no classes"
    method = "flow matching" if config.objective.is_flow else config.objective_section
    return (
        f"A network ({model.network}) of latents "
        f"of {model.latent_channels} x {model.latent_size} x {model.latent_size} "
        f"numbers, with {classes}, trained by {method}: depth {model.depth}, width {model.hidden_size}, "
        f"{model.num_heads} heads, patches of {model.patch_size}."
    )


def _use(config: Config, vae: Mapping[str, Any]) -> str:
    nfe = config.eval.nfe[0]
    identity = f" (sha256 of its weights {vae['sha256']})" if "sha256" in vae else ""
    guidance = ""
    if config.guidance is not None:
        scale, start, end = config.guidance
        guidance = f"Guidance is {scale:g} for t in [{start:g}, {end:g}], or as `--guidance`, `--interval` say.\n\n"
    return (
        "## Use\n\nWith mf_dist installed and this folder as `MODEL`:\n\n"
        f"    python tools/sample.py --checkpoint MODEL --nfe {nfe} --out grid.png\n"
        f"    python tools/fid_eval.py --checkpoint MODEL --nfe {nfe} --reference REFERENCE --out OUT\n"
        "    python -m mf_dist.train CONFIG train.init_from=MODEL\n\n"
        f"{guidance}Its VAE is `{vae['source']}`{identity}; a folder `vae` in this folder is used first."
    )


def _data(config: Config, state: Mapping[str, Any]) -> str:
    dataset = state.get("dataset", {})
    names = state["classes"]
    some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    lines = [f"- latents: `{dataset.get('path', config.data.path)}`"]
    lines += [f"- sha256 of their manifest: {dataset['sha256']}"] if "sha256" in dataset else []
    lines += [f"- normalisation: {config.data.normalisation}"]
    lines += [f"- classes: {some}"] if names else []
    return "## Data\n\n" + "\n".join(lines)


def _recipe(config: Config, state: Mapping[str, Any]) -> str:
    tree = state["config"]
    section, source = config.objective_section, config.train.init_from
    started = f"It started from the weights `{source}`. " if source else ""
    shown = {"model": tree["model"], section: tree[section], "optim": tree["optim"], "engine": tree["engine"]}
    return (
        f"## Recipe\n\nStep {state['step']:,}, {state['samples_seen']:,} images seen, batches of "
        f"{config.train.batch_size:,}; the EMA of decay {state['ema']}. {started}Meanings of the fields: "
        f"`mf_dist/config/schema.py`.\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"
    )


def _measurements(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return "## Measurements\n\nNone are recorded."
    rows = ["| metric | value, ± at 95 % | " + " | ".join(PROTOCOL) + " |", "|---" * (2 + len(PROTOCOL)) + "|"]
    for entry in entries:
        protocol = " | ".join(str(entry.get(key, "")) for key in PROTOCOL)
        rows += [f"| {metric} | {_with_band(entry, metric)} | {protocol} |" for metric in entry["metrics"]]
    return "## Measurements\n\n" + "\n".join(rows) + "\n\nThe whole protocol of each is in `metrics.json`."


def _with_band(entry: Mapping[str, Any], metric: str) -> str:
    band = entry.get("plus_minus_95", {}).get(metric)
    return three_digits(entry["metrics"][metric]) + ("" if band is None else f" ± {band:.2g}")
