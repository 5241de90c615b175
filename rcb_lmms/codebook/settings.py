"""Every number and rule of making a codebook, by model family and preset."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from rcb_lmms.codebook.reading import explained
from rcb_lmms.errors import UserError

TOP_K_STORED = 50
# What the experiments depend on; everything else can change without running the model again.
EXPERIMENT = ("prompt", "article", "probes", "single_repeats", "cluster_input", "strict")

Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BuildSettings:
    """How prototypes are found. Start from `settings_for`; the defaults are the released LLaVA-1.5 configuration.

    Attributes:
        preset: which rules apply. `official` (and `lab`): reversed divergence averaged over the ids, cluster sizes up
            to and including `tau_out`, distinct images over `tau_in`, a point is its own neighbour. `paper`:
            divergence of Eq. 7, sizes below `tau_out`, tokens over `tau_in`, neighbours without the point itself.
            `paper_literal`: the same with the printed `tau_jsd`, which belongs to the released code's scale and is
            some twenty times stricter on Eq. 7's, and with Eq. 12 and 13 as printed, see `dpc_knn`.
        tau_prob: a token is unrecognisable if its top-1 probability is below.
        tau_out: an outlier of its image if its cluster there is that small.
        tau_in: common to many images if its cluster across images is larger.
        tau_jsd: unneeded if the weighted divergence is below, in nats.
        top_k: ids in the divergence, up to `TOP_K_STORED`.
        clusters_per_image: cluster count within an image; the paper states none.
        clusters_across: cluster count over all candidates.
        k_image: neighbours within an image.
        k_across: neighbours over all candidates.
        k_region: weight of the divergence in the 3 x 3 window.
        k_global: weight of the divergence in the whole image.
        prompt: asked about every input.
        article: which first tokens are skipped: `official` the token of a word "A"; `paper` the, a, an in any case;
            `keep` none.
        probes: patches per image.
        cluster_input: cluster the `probed` patches of an image (released code) or `all` of them (paper).
        single_repeats: copies of the token in the single-token experiment; `None` is the family's own number.
        strict: compare an ablated run at the step of its intact one, whether or not it began with an article itself.
        seed: of the tie breaker in the clustering.
    """

    preset: Literal["official", "paper", "paper_literal", "lab"] = "official"
    tau_prob: Finite = 0.15
    tau_out: int = 8
    tau_in: int = 64
    tau_jsd: Finite = 2e-3
    top_k: Annotated[int, Field(ge=2, le=TOP_K_STORED)] = 10
    clusters_per_image: Count = 8
    clusters_across: Count = 64
    k_image: Count = 5
    k_across: Count = 5
    k_region: Finite = 1.0
    k_global: Finite = 16.0
    prompt: str = "What does this image show? You must provide a single word that best describes the image."
    article: Literal["official", "paper", "keep"] = "official"
    probes: Count = 96
    cluster_input: Literal["probed", "all"] = "probed"
    single_repeats: Count | None = None
    strict: bool = False
    seed: int = 0

    @property
    def by_paper(self) -> bool:
        """Whether the paper's rules apply, not the released code's."""
        return self.preset.startswith("paper")

    def experiment(self) -> dict[str, Any]:
        """The part the stored statistics depend on."""
        return {name: getattr(self, name) for name in EXPERIMENT}

    def thresholds(self) -> dict[str, Any]:
        """The part `threshold` reads."""
        return {name: value for name, value in asdict(self).items() if name not in EXPERIMENT}


_RELEASED: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava_next": {"tau_prob": 0.1},
    "llava_onevision": {"tau_prob": 0.08, "tau_out": 3, "tau_in": 16, "tau_jsd": 1.8e-3, "clusters_across": 24},
}
_PRINTED: dict[str, dict[str, Any]] = {
    "llava": {"tau_prob": 0.1, "k_across": 64},
    "llava_next": {"tau_prob": 0.1, "k_across": 64},
    "llava_onevision": _RELEASED["llava_onevision"] | {"tau_jsd": 1.5e-3, "k_across": 24},
}
_PAPER = {"article": "paper", "cluster_input": "all", "top_k": 20, "k_image": 16}
# The laboratory's background tokens have a top-1 probability of 0.20, its objects mostly one above 0.8; with 144
# patches more of an image's 96 probes lie in small clusters. Everything else is the released configuration.
_LAB = {"tau_prob": 0.3, "tau_out": 12, "clusters_across": 16}


def settings_for(family: str, preset: str = "official", **changes: Any) -> BuildSettings:
    """The settings of a family under a preset, with single fields changed; numbers may be text.

    `official` is the configuration released beside each codebook, `paper_literal` the paper's numbers, and `paper`
    those with `tau_jsd` brought to the scale of Eq. 7 (times `top_k`, see `divergence`). Neighbour counts the
    release leaves open are TCFormer's 5, cluster counts the paper leaves open are the release's.

    Raises:
        UserError: unknown family, preset or field, or a value out of range.
    """
    if family not in _RELEASED:
        raise _refused(f"family={family}", "no such family", ", ".join(_RELEASED))
    chosen = {"official": _RELEASED[family], "lab": _LAB}.get(preset, _PRINTED[family] | _PAPER)
    if preset == "paper":
        chosen = chosen | {"tau_jsd": chosen.get("tau_jsd", BuildSettings.tau_jsd) * chosen["top_k"]}
    try:
        return BuildSettings(**{"preset": preset, **chosen, **changes})
    except ValidationError as error:
        known = ", ".join(entry.name for entry in fields(BuildSettings))
        raise _refused(explained(error), "no such setting or value", f"settings in range, of: {known}") from error


def parse_changes(assignments: list[str]) -> dict[str, str]:
    """Settings written as `NAME=VALUE`."""
    return {name: value for name, _, value in (assignment.partition("=") for assignment in assignments)}


def _refused(wanted: str, found: str, allowed: str) -> UserError:
    return UserError(
        wanted=f"codebook settings with {wanted}",
        found=found,
        allowed=allowed,
        next_step="change the setting, or leave it to the preset",
    )
