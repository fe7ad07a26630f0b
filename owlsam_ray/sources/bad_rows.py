"""Reports rows without a readable image, lists them in a file, and limits their number before planning.

They are planned and become failed rows, so that one odd row in a million neither keeps the others from being labelled
nor is forgotten.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from owlsam_ray import storage
from owlsam_ray.config.reduce import allowed_failures
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailedImagesError, InputError, shown
from owlsam_ray.schema import Container
from owlsam_ray.sources.row_names import join_kinds
from owlsam_ray.sources.spool import Spool
from owlsam_ray.storage.secrets import masked

BAD_ROWS_FILE = "bad_rows.jsonl"
"""One line for each row of the listing without a readable image, and for each name that was quoted."""
_MOST_EXAMPLES = 3
"""Maximum number of examples of each kind."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Found:
    """Counts and examples of odd rows, by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if len(examples := self.examples.setdefault(kind, [])) < _MOST_EXAMPLES:
            examples.append(example)

    def __str__(self) -> str:
        return join_kinds([(kind, count, self.examples[kind]) for kind, count in self.counts.items()])


def check_bad_rows(config: RunConfig, run_url: str, spool: Spool, wanted: NDArray[np.bool_]) -> int:
    """Report the rows to be planned that are bad or quoted, and list them in `RUN/bad_rows.jsonl`.

    Args:
        config: its `plan.bad_names` and `reduce.max_failed` are applied.
        run_url: the run directory.
        spool: N rows.
        wanted: (N,) mask of the rows about to be planned.

    Returns:
        Number of these rows that become failed rows.

    Raises:
        InputError: there are any, and `plan.bad_names` is `refuse`; or all rows are bad.
        FailedImagesError: more rows are bad than `reduce.max_failed` allows; nothing is planned then.
    """
    odd = wanted & (spool.bad | spool.quoted)
    if not odd.any():
        return 0
    found = _Found()
    with storage.open_atomic(storage.join(run_url, BAD_ROWS_FILE)) as out:
        _list(spool, odd, found, out)
    bad, count = int((wanted & spool.bad).sum()), int(wanted.sum())
    listed = f"All of them are listed in {run_url}/{BAD_ROWS_FILE}."
    if config.plan.bad_names == "refuse":
        raise InputError(
            f"the listing cannot be labelled as it is (plan.bad_names is refuse):\n  {found}\n{listed} With "
            "plan.bad_names=row they become failed rows, and names are quoted."
        )
    hint = ""
    if spool.name_setting is not None and "bad_name" in found.counts:
        hint = f" Without {spool.name_setting}, every image gets a name."
    if bad == count:
        raise InputError(
            f"none of {count} rows leads to an image:\n  {found}\n{listed} Correct the section data.{hint}"
        )
    allowed = allowed_failures(config.reduce.max_failed, count)
    if bad > allowed:
        raise FailedImagesError(
            f"{bad} of {count} rows lead to no image, and reduce.max_failed ({config.reduce.max_failed}) allows "
            f"{allowed}, so nothing is planned:\n  {found}\n{listed} Correct the dataset, or raise reduce.max_failed."
            f"{hint}",
            {"images": count, "failed": bad, "failed_by_reason": _by_reason(found)},
        )
    words = f"{bad} of {count} rows become failed rows" if bad else "some names are quoted"
    _log.warning("%s:\n  %s\n%s", words, found, listed)
    return bad


def _list(spool: Spool, odd: NDArray[np.bool_], found: _Found, out: IO[bytes]) -> None:
    for table in spool.tables(odd):
        for row in table.select(["file_name", "uri", "container", "member", "offset", "quoted"]).to_pylist():
            line = {"file_name": row["file_name"], "uri": masked(row["uri"])}
            if row["container"] == Container.BAD:
                kind, _, detail = row["member"].partition(": ")
                where = line["uri"] if row["offset"] is None else f"row {row['offset']} of {line['uri']}"
                found.add(kind, f"{where}: {detail}")
                line |= {"row": row["offset"], "reason": row["member"]}
            else:
                found.add("quoted", f"{row['quoted']}, now {shown(row['file_name'])}")
                line |= {"quoted": row["quoted"]}
            out.write(json.dumps(line).encode() + b"\n")


def _by_reason(found: _Found) -> dict[str, int]:
    return {kind: count for kind, count in found.counts.items() if kind != "quoted"}
