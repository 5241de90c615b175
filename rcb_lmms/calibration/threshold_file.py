"""`thresholds=FILE`: what `rcb calibrate --tasks` found, instead of a calibration pass of the run's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration.fitting import Calibration
from rcb_lmms.errors import UserError
from rcb_lmms.files import sha256_of

if TYPE_CHECKING:
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.models.arguments import Target
    from rcb_lmms.pruners.rcb import RCB

# What scores depend on, besides the weights and the media; these two are named by hashes of their content.
SETTING = ("codebook_sha256", "preprocess", "dtype", "split", "per", "variant", "score_dtype", "min_keep")


@dataclass(frozen=True)
class ThresholdFile:
    """Thresholds with their ties, which together keep the very tokens that a calibration in the run would keep.

    A benchmark of several tasks has one threshold for all of them, where a run by itself has one for each task.

    Attributes:
        path: of the YAML file; `sha256` is of its bytes.
        setting: of the calibration.
        benchmarks: their records, by name.
    """

    path: Path
    sha256: str
    setting: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> ThresholdFile:
        """Read a file.

        Raises:
            UserError: there is none, or it holds something else.
        """
        import yaml

        path = Path(path)
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(path, sha256_of(path), dict(written["setting"]), dict(written["benchmarks"]))
        except OSError as error:
            found = error.strerror or str(error)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
            found = "something else: " + " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            wanted=f"the thresholds of {path}",
            found=found,
            allowed="a YAML file that `rcb calibrate --tasks` wrote",
            next_step=f"rcb calibrate --model ... --tasks ... --match ... --out {path}",
        )

    def check(self, encoder: ImageEncoder, pruner: RCB) -> None:
        """Refuse thresholds of another model, codebook or preprocessing.

        Raises:
            UserError: naming what differs.
        """
        from rcb_lmms.calibration.tasks import pass_identity
        from rcb_lmms.families.identity import weights_hash

        now = {**pass_identity(encoder, pruner, {}), "min_keep": pruner.min_keep}
        differs = [f"{name}={self.setting.get(name)}" for name in SETTING if self.setting.get(name) != now[name]]
        allowed = [f"{name}={now[name]}" for name in SETTING]
        if self.setting.get("fingerprint") != now["fingerprint"]:  # a copy has other times, and only its bytes tell
            weights = weights_hash(encoder.family)
            differs += [f"weights={self.setting.get('weights')}"] * (self.setting.get("weights") != weights)
            allowed.append(f"weights={weights}")
        if differs:
            raise self._refused("for this model", ", ".join(differs), ", ".join(allowed))

    def row(self, task: str, target: Target) -> tuple[dict[str, Any], dict[str, Any]]:
        """The benchmark that has the task, and its record of the budget.

        Raises:
            UserError: the file does not have the one or the other.
        """
        holding = [own for name, own in self.benchmarks.items() if name == task and task in own["tasks"]]
        holding += [own for own in self.benchmarks.values() if task in own["tasks"]]
        if not holding:
            known = (name for own in self.benchmarks.values() for name in own["tasks"])
            raise self._refused(f"for task {task}", "no such task in the file", ", ".join(dict.fromkeys(known)))
        rows = holding[0]["baselines"]
        if target.baseline is not None:
            found = [rows[target.baseline.name]["tokens"]] if target.baseline.name in rows else []
        else:
            tokens = target.tokens if target.tokens is not None else target.ratio * holding[0]["native"]
            found = [row for both in rows.values() for row in both.values() if math.isclose(row["target"], tokens)]
        if not found:
            allowed = (f"{name} ({both['tokens']['target']:g} tokens)" for name, both in rows.items())
            raise self._refused(f"for {target} on {task}", "no such budget in the file", ", ".join(allowed))
        return holding[0], found[0]

    def calibration(self, task: str, target: Target, data: str, questions: float) -> Calibration:
        """The record of a task's budget, as a calibration in the run would have made it.

        Args:
            task: of lmms-eval.
            target: the budget.
            data: hash of the images that are asked about.
            questions: about each of them, added up.

        Raises:
            UserError: other images than the thresholds were fitted to.
        """
        benchmark, row = self.row(task, target)
        if benchmark["tasks"][task] != data:
            found = f"other images, or asked about another number of times: {benchmark['tasks'][task][:12]}"
            raise self._refused(f"for the data of {task}", found, f"{data[:12]}, the whole task without --limit")
        return Calibration(
            method="rcb",
            target=row["target"],
            achieved=row["achieved"],
            fitted={"threshold": row["threshold"], "ties": row["ties"]},
            std=row["std"],
            quantiles=list(row["quantiles"].values()),
            native=benchmark["native"],
            views=benchmark["views"],
            questions=questions,
            data_hash=data,
            per=self.setting["per"],
        )

    def _refused(self, what: str, found: str, allowed: str) -> UserError:
        return UserError(
            wanted=f"a threshold {what} from {self.path}",
            found=found,
            allowed=allowed,
            next_step="rcb calibrate --tasks with this setting, or leave thresholds out to calibrate in the run",
        )
