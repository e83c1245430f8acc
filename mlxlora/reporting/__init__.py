"""What a person sees of a run: console, metrics.jsonl, trackers, report."""
