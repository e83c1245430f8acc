"""Find a learning rate, a rank and targets on a little of the training: a range test, then successive halving.

Every trial is an ordinary run of `finetune` in its own directory below `--out`, so a search that was interrupted goes
on where it was, and `mlxlora report` shows any of its trials.

    OUT/tune.json           what the search depends on
    OUT/range/              the range test: one run whose learning rate grows by equal factors
    OUT/round-1/NAME/ …     the trials of each round: the best third goes on to the next, with three times the steps
    OUT/tune.html           the picture
    OUT/best.yaml           the best options, for `mlxlora train --config`
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlxlora import architecture, hub
from mlxlora.adapters import AdapterConfig
from mlxlora.commands import command
from mlxlora.data import DataSplits, SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.errors import ConfigError, Problem, RunError
from mlxlora.files import plain, read_json, refuse_unmakeable, write_json, write_whole
from mlxlora.finetune import refuse_pointless
from mlxlora.memory import limit_of
from mlxlora.model import load, load_tokenizer
from mlxlora.plan import room
from mlxlora.progress import Progress
from mlxlora.reporting.search import search_page
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control
from mlxlora.training.identity import identify
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.trials import Search, SearchConfig, Trial, around, combinations

RECORD = "tune.json"


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    suggested:        the learning rate of the range test; None where rates were given, or nothing could be told
    range_test:       (learning rate, loss) of each of its steps
    trials:           every trial, the best first
    most_tokens:      about how many tokens, padding included, a batch may have in the memory limit
    batch_size:       samples of the greatest length in such a batch; never more than there are
    reason:           done, or stopped: the same command goes on
    """

    out: Path
    reason: str
    suggested: float | None
    range_test: list[tuple[float, float]]
    trials: list[Trial]
    flags: str
    most_tokens: int
    batch_size: int
    picture: Path
    notices: list[str]

    def __str__(self) -> str:
        if self.reason == "stopped":
            return "stopped; what was tried is kept, and the same command goes on from here"
        lines = [f"  {'learning rate':<16}{'rank':>5}  {'targets':<18}{'steps':>6}{'validation loss':>17}"]
        for trial in self.trials:
            loss = "blew up" if trial.loss is None or math.isinf(trial.loss) else f"{trial.loss:.4f}"
            lines.append(
                f"  {trial.learning_rate:<16.2e}{trial.rank:>5}  {trial.targets:<18}{trial.steps:>6}{loss:>17}"
            )
        if self.suggested is not None:
            lines.append(f"range test: {self.suggested:.1e} suggested")
        lines += [f"note: {text}" for text in self.notices]
        lines.append(f"memory: batches of up to {self.batch_size:,} samples of the greatest length fit")
        lines.append(f"best: {self.flags}")
        lines.append(f"picture: {self.picture}")
        lines += ["", f"next: {command('train', config=self.out / 'best.yaml', out='RUN')}"]
        return "\n".join(lines)


def tune(
    model: str,
    data: list[str],
    out: Path,
    *,
    search: SearchConfig = SearchConfig(),  # noqa: B008
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    memory_limit: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
    control: Control | None = None,
) -> TuneResult:
    """Search for a good learning rate, rank and targets; the same call again goes on with an unfinished search.

    Args:
        model: a model directory, or a model on the hub
        data: as for train; it needs validation rows, by file or by split
        out: a new directory for the trials and the result
        memory_limit: what MLX may take, such as 12GB; default a safe share of what the machine recommends
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
    """
    out = Path(out)
    control = control or Control()
    base = {
        "model": model, "data": data, "samples": samples, "adapter": adapter, "optimizer": optimizer,
        "training": training, "memory_limit": memory_limit, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    refuse_pointless(adapter, optimizer)
    refuse_foreign(out)
    limit = limit_of(memory_limit)
    path = hub.find(model, revision=revision)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    splits, identity = begin(out, path, tokenizer, base, search, on_progress)
    if on_progress:
        on_progress("small steps", 0, 0)
    needs = room(
        load(path, trust_remote_code=trust_remote_code), splits, samples=samples, adapter=widest(adapter, search),
        optimizer=optimizer, training=training, limit=limit,
    )  # fmt: skip
    if not (out / RECORD).exists():  # now that all has been checked: what is refused binds nobody
        write_json(out / RECORD, {"format": 1, "identity": identity})
    common = base | {"out": out, "start_from": None, "gentle": False, "report_to": None}
    searching = Search(path, tokenizer, splits, common, search, control, on_progress)
    suggested, points, notices = searching.learning_rates()
    rates = search.learning_rates or around(suggested or optimizer.learning_rate)
    trials = searching.halve(combinations(rates, search))
    best, picture = trials[0], out / "tune.html"
    stopped = control.stopping or best.loss is None
    if len(trials) == 1 and not stopped:
        notices.append("there was one combination to try, so nothing was compared")
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)) and not stopped:
        end = "lowest" if best.learning_rate == min(rates) else "highest"
        beyond = " ".join(f"{rate:g}" for rate in around(best.learning_rate))
        notices.append(f"the best rate is the {end} one tried; look beyond: --search.learning_rates {beyond}")
    if not stopped:
        write_whole(picture, search_page(model, suggested, points, [asdict(trial) for trial in trials]))
        write_whole(out / "best.yaml", yaml.safe_dump(plain(base | searching.options(best)), sort_keys=False))
    return TuneResult(
        out=out,
        reason="stopped" if stopped else "done",
        suggested=suggested,
        range_test=points,
        trials=trials,
        flags=searching.flags(best),
        most_tokens=needs.most_tokens,
        batch_size=min(needs.most_tokens // needs.length, len(splits.train)),
        picture=picture,
        notices=notices,
    )


def refuse_foreign(out: Path) -> None:
    """Raise RunError for an `out` that can hold no search, or holds something else."""
    refuse_unmakeable(out)
    if not (out / RECORD).exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and holds no search. Choose another --out.")


def begin(
    out: Path,
    path: Path,
    tokenizer: Tokenizer,
    base: dict[str, Any],
    search: SearchConfig,
    on_progress: Progress | None,
) -> tuple[DataSplits, dict[str, Any]]:
    """The part of the data that is searched on, and what the search depends on.

    Refuses what cannot be searched, and an `out` of another search.
    """
    splits = load_data(
        base["data"], tokenizer, base["samples"], seed=base["training"].seed, most=search.rows,
        vocabulary_size=architecture.text_config(architecture.read_config(path)).get("vocab_size"),
        on_progress=on_progress,
    )  # fmt: skip
    if splits.valid is None:
        raise ConfigError(
            "tune compares by validation loss. Give --samples.validation, or --samples.validation_split and at least "
            "ten rows."
        )
    held_out = len(splits.valid)
    if held_out > search.validation_rows:
        places = np.linspace(0, held_out - 1, search.validation_rows).round().astype(np.int64)
        splits = replace(splits, valid=splits.valid.subset(places))
    searched = {f"search.{name}": value for name, value in plain(search).items()}
    identity = identify(path, tokenizer, splits, base) | searched
    record = out / RECORD
    if not record.exists():
        return splits, identity
    stored = read_json(record)
    old = stored.get("identity") if isinstance(stored, dict) else None
    if not isinstance(old, dict):
        raise RunError(f"{record} is not what this version of mlxlora writes. Choose another --out.")
    changed = [name for name in sorted({*old, *identity}) if old.get(name) != identity.get(name)]
    if changed:
        raise RunError.of(
            f"{out} holds a search that was begun with other settings. Choose another --out.",
            [Problem(name, f"was {old.get(name)!r}, is now {identity.get(name)!r}") for name in changed],
        )
    return splits, identity


def widest(adapter: AdapterConfig, search: SearchConfig) -> AdapterConfig:
    """The adapter that needs the most memory of those tried."""
    return replace(
        adapter, rank=max(search.ranks), targets=sorted({t for one in search.targets for t in one.split(",")})
    )
