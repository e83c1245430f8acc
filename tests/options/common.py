"""The rows of the table that several verbs share, and the options that a verb has no use for."""

from tests.options.rows import ADAPTER, SAMPLES, UNTOLD, Row, row, shared

MODEL_VERBS = ("convert", "plan", "tune", "train", "eval", "compare", "generate", "chat", "serve", "fuse")

ROWS: list[Row] = [
    # ---- every verb that takes a model ------------------------------------------------------------------------------
    *(
        row(verb, option, value, "asked", "asks_the_hub")
        for verb in (*MODEL_VERBS, "export", "data check")
        for option, value in (("revision", "v1"), ("model", "someone/else"))
    ),
    *(
        row(verb, "trust_remote_code", "true", "ran", "runs_own_code", model="@own_code")
        for verb in (*MODEL_VERBS, "data check")
    ),
    row("export", "trust_remote_code", "true", "ran", "runs_own_code", model="@own_code", to="mlx"),
    *(
        shared_row
        for verb in ("plan", "tune", "train", "eval", "compare")
        for shared_row in shared(
            verb,
            "samples",
            {name: value for name, value in SAMPLES.items() if verb not in ("eval", "compare") or name not in UNTOLD},
            "asked",
            "asks_for_samples",
        )
    ),
]

# ---- options that a verb takes, so that one file of options fits all verbs, and has no use for ----------------------

LOOKS = ("validate_every", "save_every", "report_every", "sample_every", "keep")
ENDS = ("patience", "target_loss", "max_minutes", "skip_nonfinite")
NUMBERS = {
    "validate_every": "3", "save_every": "3", "report_every": "3", "sample_every": "3", "keep": "3", "patience": "3",
    "target_loss": "0.5", "max_minutes": "3", "skip_nonfinite": "3", "steps": "3", "epochs": "3",
}  # fmt: skip
NOTHING: list[Row] = [
    # unusable rows are told, not refused
    row("data check", "samples.allow_unusable", "true", ""),
    # the size of a step does not depend on what its numbers are
    *(row("plan", f"adapter.{name}", ADAPTER[name], "") for name in ("alpha", "alpha_pattern", "dropout", "rslora")),
    # nor does its number of steps, before they are made
    *(row("plan", f"training.{name}", NUMBERS[name], "") for name in (*LOOKS, *ENDS)),
    # every trial is as long as `search.steps` says, and is looked at when it ends
    *(
        row("tune", f"training.{name}", NUMBERS[name], "plan")
        for name in ("steps", "epochs", *LOOKS, *ENDS)
        if name != "report_every"
    ),
    # all rows are looked at, and what comes out does not depend on how they lie in batches
    *(
        row(verb, f"samples.{name}", SAMPLES[name], "")
        for verb in ("eval", "compare")
        for name in ("packing", "validation_split")
    ),
    row("eval", "tokens_per_batch", "64", ""),
]

# ---- options whose effect a test of their own shows -----------------------------------------------------------------

ELSEWHERE = {
    ("train", "training.skip_nonfinite"): "tests/faults/test_numbers.py::test_a_number_of_them_may_be_allowed",
    ("eval", "tokens_per_batch"): "tests/test_evaluate.py::test_does_not_depend_on_batches",
}
