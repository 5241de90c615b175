"""Matched budgets: one vision-only pass, one fit, one grammar of targets, one file format."""

from rcb_lmms.calibration.documents import Documents, survey
from rcb_lmms.calibration.fitting import Calibration, fit, with_parameters
from rcb_lmms.calibration.passes import score_pass
from rcb_lmms.calibration.scores import Scores, data_hash
from rcb_lmms.calibration.targets import Target, parse_targets
from rcb_lmms.calibration.threshold_file import ThresholdFile

__all__ = [
    "Calibration",
    "Documents",
    "Scores",
    "Target",
    "ThresholdFile",
    "data_hash",
    "fit",
    "parse_targets",
    "score_pass",
    "survey",
    "with_parameters",
]
