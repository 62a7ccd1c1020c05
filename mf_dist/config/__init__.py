"""The config schema, its YAML loader and a cost model of a run. No torch."""
