"""Every number and rule of making a codebook, by model family and preset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rcb_lmms.errors import UserError

PRESETS = ("official", "paper", "paper_literal", "lab")
ARTICLES = {"official": {"A"}, "paper": {"a", "an", "the"}, "keep": set()}
CLUSTER_INPUTS = ("probed", "all")
TOP_K_STORED = 50
# What the experiments depend on; everything else can change without running the model again.
EXPERIMENT = ("prompt", "article", "probes", "single_repeats", "cluster_input")


@dataclass(frozen=True)
class BuildSettings:
    """How prototypes are found. Start from `settings_for`; the defaults are the released LLaVA-1.5 configuration.

    Attributes:
        preset: which rules apply. `official` (and `lab`): reversed divergence averaged over the ids, cluster sizes up
            to and including `tau_out`, distinct images over `tau_in`, a point is its own neighbour. `paper`:
            divergence of Eq. 7, sizes below `tau_out`, tokens over `tau_in`, neighbours without the point itself.
            `paper_literal`: the same with the printed `tau_jsd`, which belongs to the released code's scale and is
            some twenty times stricter on Eq. 7's.
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
        article: which first tokens are skipped: `official` "A"; `paper` the, a, an in any case; `keep` none.
        probes: patches per image.
        cluster_input: cluster the `probed` patches of an image (released code) or `all` of them (paper).
        single_repeats: copies of the token in the single-token experiment; `None` is the family's own number.
        seed: of the tie breaker in the clustering.
    """

    preset: str = "official"
    tau_prob: float = 0.15
    tau_out: int = 8
    tau_in: int = 64
    tau_jsd: float = 2e-3
    top_k: int = 10
    clusters_per_image: int = 8
    clusters_across: int = 64
    k_image: int = 5
    k_across: int = 5
    k_region: float = 1.0
    k_global: float = 16.0
    prompt: str = "What does this image show? You must provide a single word that best describes the image."
    article: str = "official"
    probes: int = 96
    cluster_input: str = "probed"
    single_repeats: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("preset", PRESETS), ("article", ARTICLES), ("cluster_input", CLUSTER_INPUTS)):
            if getattr(self, name) not in allowed:
                raise _refused(name, getattr(self, name), ", ".join(allowed))
        if not 2 <= self.top_k <= TOP_K_STORED:
            raise _refused("top_k", self.top_k, f"2 to {TOP_K_STORED}: as many logits are stored")
        for name in ("clusters_per_image", "clusters_across", "k_image", "k_across", "probes", "single_repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _refused(name, value, "whole numbers from 1")

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
    """The settings of a family under a preset, with single fields changed.

    `official` is the configuration released beside each codebook, `paper_literal` the paper's numbers, and `paper`
    those with `tau_jsd` brought to the scale of Eq. 7 (times `top_k`, see `divergence`). Neighbour counts the
    release leaves open are TCFormer's 5, cluster counts the paper leaves open are the release's.

    Raises:
        UserError: unknown family, preset or field, or a value out of range.
    """
    if family not in _RELEASED:
        raise _refused("family", family, ", ".join(_RELEASED))
    if unknown := set(changes) - {entry.name for entry in fields(BuildSettings)}:
        known = ", ".join(entry.name for entry in fields(BuildSettings))
        raise _refused("setting", ", ".join(sorted(unknown)), known)
    chosen = {"official": _RELEASED[family], "lab": _LAB}.get(preset, _PRINTED[family] | _PAPER)
    settings = BuildSettings(preset, **chosen)
    if preset == "paper":
        settings = replace(settings, tau_jsd=settings.tau_jsd * settings.top_k)
    return replace(settings, **changes)


def parse_changes(assignments: list[str]) -> dict[str, Any]:
    """Settings written as `NAME=VALUE`, in the types of `BuildSettings`.

    Raises:
        UserError: no such setting, or a value of another type.
    """
    # single_repeats is the one number whose default is none.
    kinds = {entry.name: int if entry.default is None else type(entry.default) for entry in fields(BuildSettings)}
    changes = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in kinds:
            raise _refused("setting", name, ", ".join(kinds))
        try:
            changes[name] = kinds[name](value)
        except ValueError as error:
            raise _refused(name, value, kinds[name].__name__) from error
    return changes


def _refused(name: str, value: object, allowed: str) -> UserError:
    return UserError(
        wanted=f"codebook settings with {name}={value}",
        found="no such value",
        allowed=f"{name}: {allowed}",
        next_step="change the setting, or leave it to the preset",
    )
