"""The schema of tags: what is written is read back, and a tag is spelled in one module alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_gradguard
from lightning_gradguard.core import tags
from lightning_gradguard.core.tags import Meaning, log10_tag, meaning_of, pattern, tag

#: Tags as design and documentation name them; renaming one breaks the event files of earlier runs.
PUBLISHED = {
    tags.GRAD_NORM_TOTAL: "grad_norm/total",
    tags.GRAD_NORM: "grad_norm/<name>",
    tags.NONFINITE_FRACTION: "grad_norm/nonfinite_fraction",
    tags.CLIPPED_NORM_TOTAL: "grad_norm_clipped/total",
    tags.BAND_LOW: "grad_norm_band/low",
    tags.BAND_TOTAL: "grad_norm_band/total",
    tags.BAND_HIGH: "grad_norm_band/high",
    tags.WEIGHT_NORM: "weight_norm/<name>",
    tags.UPDATE_RATIO: "update_ratio/<name>",
    tags.CLIP_THRESHOLD: "clip/threshold",
    tags.CLIP_COEFFICIENT: "clip/coefficient",
    tags.CLIP_FRACTION: "clip/fraction",
    tags.SKIPS: "rollback/skips",
    tags.ROLLBACKS: "rollback/rollbacks",
    tags.AMP_OVERFLOWS: "rollback/amp_overflows",
    tags.LR_SCALE: "lr_backoff/scale",
    tags.FOUND_LR: "summary/found_lr",
    tags.UNSCALED_ROLLBACKS: "summary/unscaled_rollbacks",
    tags.ROLLBACKS_AT_ANY_RATE: "summary/rollbacks_at_any_rate",
    tags.LR: "lr_backoff/lr/<name>",
    tags.SCHEDULED_LR: "lr_backoff/scheduled_lr/<name>",
    tags.INITIALIZATION: "init/<name>",
    tags.DEAD_SHARE: "dead_share/<name>",
    tags.SATURATED_SHARE: "saturated_share/<name>",
    tags.OUTPUT_GRADIENT: "output_gradient/<name>",
    tags.OUTPUT_HEAT_MAP: "output_gradient/layers",
    tags.CLIPPED_FRACTION: "summary/clipped_fraction",
    tags.USUAL_COEFFICIENT: "summary/clip_coefficient",
    tags.LARGEST_NORM: "summary/largest_norm",
    tags.LARGEST_LOGGED_NORM: "summary/largest_logged_norm",
    tags.N_INCIDENTS: "summary/incidents",
    tags.OVER_CONSTANT: "summary/over_constant",
    tags.HELD_OUT_LOSS: "loss/held_out",
    tags.TRAINING_LOSS: "loss/training",
    tags.SETTINGS: "gradguard",
    tags.INCIDENTS: "incidents",
    tags.SUMMARY: "summary",
    tags.HEAT_MAP: "grad_norm/layers",
    tags.GRAD_HISTOGRAM: "grad_histogram/<name>",
    tags.LOG10: "log10/<name>",
}


def test_tags_keep_their_names() -> None:
    assert all(form == published for form, published in PUBLISHED.items())
    constants = {value for name, value in vars(tags).items() if name.isupper() and isinstance(value, str)}
    assert {value for value in constants if not value.startswith("(")} == set(PUBLISHED)


@pytest.mark.parametrize(("optimizer", "of"), [(0, 1), (1, 2)])
@pytest.mark.parametrize(
    ("form", "name", "role"),
    [
        (tags.GRAD_NORM_TOTAL, "", "total"),
        (tags.GRAD_NORM, "body.0.weight", "layer"),
        (tags.NONFINITE_FRACTION, "", "nonfinite_fraction"),
        (tags.CLIPPED_NORM_TOTAL, "", "clipped"),
        (tags.WEIGHT_NORM, "body.0", "weight"),
        (tags.UPDATE_RATIO, "body.0", "ratio"),
        (tags.CLIP_THRESHOLD, "", "threshold"),
        (tags.CLIP_COEFFICIENT, "", "coefficient"),
        (tags.CLIP_FRACTION, "", "fraction"),
        (tags.LR, "0", "rate"),
    ],
)
def test_written_tags_are_read_back(form: str, name: str, role: str, optimizer: int, of: int) -> None:
    written = tag(form, name, optimizer=optimizer, of=of)
    meaning = meaning_of(written)
    assert meaning is not None
    assert (meaning.role, meaning.optimizer, meaning.name) == (role, optimizer, name)
    assert re.fullmatch(pattern(form), written)


def test_counts_have_no_optimizer() -> None:
    roles = {tags.SKIPS: "skips", tags.ROLLBACKS: "rollbacks", tags.LR_SCALE: "scale"}
    for form, role in roles.items():
        assert (meaning := meaning_of(form)) is not None
        assert (meaning.role, meaning.optimizer, meaning.name) == (role, 0, "")
    assert [m.role for m in (meaning_of(tags.LARGEST_NORM), meaning_of(tags.LARGEST_LOGGED_NORM)) if m] == [
        "largest",
        "largest",
    ]


def test_log10_copies_are_not_read_as_norms() -> None:
    for form in tags.SPANS_DECADES:
        written = tag(form, "body.0", optimizer=1, of=2)
        assert log10_tag(written) == f"log10/{written}"
        assert meaning_of(log10_tag(written)) is None
    for form in (
        tags.NONFINITE_FRACTION,
        tags.GRAD_NORM,
        tags.UPDATE_RATIO,
        tags.CLIP_FRACTION,
        tags.WEIGHT_NORM,
        tags.SKIPS,
    ):
        assert log10_tag(tag(form, "body.0")) == ""


def test_losses_and_unknown_tags() -> None:
    assert isinstance(meaning_of("train_loss"), Meaning)
    assert meaning_of("val_loss") is None
    assert meaning_of("grad_norm_band/low") is None
    assert meaning_of("accuracy") is None


def test_tags_are_spelled_in_one_module() -> None:
    """Outside of `core/tags.py` a tag appears in docstrings alone."""
    families = {form.partition("/")[0] for form in PUBLISHED if "/" in form and form != tags.LOG10}
    spelled = re.compile(rf"""(?<![`\w])[rf]*["'](?:{"|".join(families)})[./{{]""")
    package = Path(lightning_gradguard.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "tags.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if spelled.search(line) and ">>>" not in line
    ]
    assert found == []
