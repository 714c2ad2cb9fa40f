"""Where things lie in a run directory."""

CONFIG, PARTITION, SUMMARY = "config.yaml", "partition.json", "summary.json"
METRICS, SELECTION, LIVES = "metrics.jsonl", "selection.json", "run.json"
PREDICTIONS, ADAPTER, LOCK = "predictions.json", "adapter", "lock"
MANIFEST = "checkpoint/manifest.json"
CLIENTS, HISTORY = "clients", "history.jsonl"
