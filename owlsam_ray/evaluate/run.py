"""A reduced run, or a file of predictions, against a ground truth."""

from typing import Any

from owlsam_ray.config import RunConfig


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Evaluate what `reduce` wrote, and write `RUN/evaluation.json`.

    Returns:
        What the file holds. `evaluation["groups"][name][size]` has box_ap, box_ap50, mask_ap, mask_ap50, miou, dice,
        precision, recall and num_objects; `name` is "all" or a supercategory, `size` is "all", "<32", "32-96", ">=96"
        by `evaluate.size_edges_px`. What is not defined is None.
    """
    raise NotImplementedError
