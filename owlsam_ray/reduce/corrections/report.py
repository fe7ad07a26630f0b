"""Write `corrections_report.json`: the outcome of each entry of the file of corrections."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError
from owlsam_ray.reduce.formats.json_rows import LINE_END, dump_json
from owlsam_ray.reduce.formats.protocol import Parts, Rendered
from owlsam_ray.reduce.labels import ShardLabels
from owlsam_ray.run.paths import CORRECTIONS

_log = logging.getLogger(__name__)
_OF_ENTRIES = ("confirmed", "edited", "added", "rejected", "left_out", "unreviewed")


def conflict_line(position: int, file_id: Any, image_id: Any, reason: str) -> bytes:
    """Describe an entry of the file that was not applied.

    Args:
        position: position of the entry among the file's annotations.
        file_id: id as the file states it.
        image_id: image id as the file states it.
        reason: a short stable name, `: `, and details.
    """
    return _line({"annotation": position, "id": file_id, "image_id": image_id, "reason": reason})


def remark_line(what: str, position: int, annotation_id: int, **more: Any) -> bytes:
    """Describe an annotation that was `edited`, `added`, `rejected` or `deleted`.

    Args:
        what: one of these.
        position: position of its entry among the file's annotations; -1: it has no entry.
        annotation_id: id in the output.
        more: further fields.
    """
    place = {} if position < 0 else {"annotation": position}
    return _line(place | {"id": annotation_id, "what": what} | more)


def summary_of(counts: Counter[str]) -> dict[str, Any]:
    """Counts of corrections as `info` and `corrections_report.json` have them.

    Args:
        counts: `LabelCounts.corrections`.

    Returns:
        entries of the file = confirmed + edited + added + rejected + left_out (by category) + unreviewed (their image
        is not marked) + conflicts (by reason) + unlabelled (in a partial reduce); and deleted: annotations missing from
        the file. In scope `images` only those that the settings would show are counted, in a review list the listed
        ones.
    """
    conflicts = {
        name.partition(".")[2]: count for name, count in sorted(counts.items()) if name.startswith("conflict.")
    }
    sums = {name: counts[name] for name in ("entries", *_OF_ENTRIES)}
    unlabelled = sums["entries"] - sum(sums[name] for name in _OF_ENTRIES) - sum(conflicts.values())
    return sums | {"unlabelled": unlabelled, "deleted": counts["deleted"], "conflicts": conflicts}


def log_outcome(counts: Counter[str], report_url: str) -> None:
    """Log the outcome of the file: counts, and what needs attention.

    Args:
        counts: `LabelCounts.corrections`.
        report_url: URL of the report.
    """
    sums = summary_of(counts)
    names = ("confirmed", "edited", "added", "deleted", "rejected")
    _log.info("corrections: %s", ", ".join(f"{sums[name]} {name}" for name in names))
    if sums["conflicts"]:
        _log.warning(
            "%d entries of reduce.corrections were not applied (%s): %s lists them",
            sum(sums["conflicts"].values()),
            ", ".join(f"{count} {reason}" for reason, count in sums["conflicts"].items()),
            report_url,
        )
    if 2 * counts["shown.deleted"] > counts["shown"]:
        _log.warning(
            "reduce.corrections deletes %d of the %d annotations that these settings would show in its images, since "
            "it lacks them: did reviewers see only what passed earlier thresholds? %s lists "
            "them",
            counts["shown.deleted"],
            counts["shown"],
            report_url,
        )


@dataclass(frozen=True, slots=True)
class CorrectionsOutput:
    """The report. Part of every reduce with corrections."""

    conflicts_url: str
    """Lines of conflicts that no shard has seen."""
    origin: dict[str, Any]
    """The file's hash, and its scope."""
    name: str = "corrections"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render the lines of one shard."""
        return Rendered({name: labels.remarks.get(name, b"") for name in ("applied", "conflicts")})

    def assemble(self, parts: Parts) -> list[str]:
        """Write the report.

        Raises:
            IncompleteError: the entries of the file do not add up.
        """
        counts = summary_of(parts.head.counts.corrections)
        proof = parts.head.info["owlsam_ray"]["proof"]
        if counts["unlabelled"] and not ("partial" in proof and counts["unlabelled"] > 0):
            raise IncompleteError(f"the {counts['entries']} entries of reduce.corrections do not add up: {counts}")
        early = storage.read_bytes(self.conflicts_url)
        with parts.open(CORRECTIONS) as out:
            out.write(f"{{\n{dump_json(self.origin | {'counts': counts})[1:-1]},\n".encode())
            out.write(b'"applied": [\n')
            if parts.size("applied"):
                parts.copy("applied", out, without_last=len(LINE_END))
                out.write(b"\n")
            out.write(b'],\n"conflicts": [\n')
            has_late = bool(parts.size("conflicts"))
            out.write(early if has_late else early.removesuffix(LINE_END.encode()))
            if has_late:
                parts.copy("conflicts", out, without_last=len(LINE_END))
            out.write(b"\n]\n}\n" if early or has_late else b"]\n}\n")
        return [CORRECTIONS]


def _line(fields: dict[str, Any]) -> bytes:
    return (dump_json(fields) + LINE_END).encode()
