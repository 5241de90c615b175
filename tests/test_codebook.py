"""The codebook as a file and by id; clustering, divergences and probe positions against slow, literal versions."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from slow import slow_dpc, softmax

from rcb_lmms.codebook import Codebook, cards
from rcb_lmms.codebook.artefact import import_upstream
from rcb_lmms.codebook.divergence import divergence, top1_probability
from rcb_lmms.codebook.dpc import dpc_knn, tie_noise
from rcb_lmms.codebook.probe import is_article, probed_patches, probed_ranks, uniform_grid, window
from rcb_lmms.codebook.select import common_clusters
from rcb_lmms.codebook.settings import parse_changes, settings_for
from rcb_lmms.codebook.show import show
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.base import VisualTokens
from rcb_lmms.resources import data_dir, source_version


@pytest.fixture
def codebook() -> Codebook:
    rows = {"image": ["a", "a", "b", "c", "c"], "patch": [3, 1, 4, 1, 5], "cluster": [0, 0, 0, 1, 1]}
    return Codebook(torch.randn(5, 8).half(), {"id": "mine", "model": "some/model", "rows": rows})


# The file


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saving_and_loading_keeps_values_facts_and_bytes(tmp_path, codebook, dtype):
    codebook = Codebook(codebook.prototypes.to(dtype), codebook.meta)
    first = codebook.save(tmp_path / "a.safetensors").read_bytes()
    loaded = Codebook.load(tmp_path / "a.safetensors")
    assert loaded.prototypes.dtype == dtype
    assert torch.equal(loaded.prototypes, codebook.prototypes)
    assert loaded.meta == codebook.meta
    assert loaded.sha256 == codebook.sha256
    assert loaded.save(tmp_path / "b.safetensors").read_bytes() == first
    shuffled = Codebook(codebook.prototypes, dict(reversed(codebook.meta.items())))
    assert shuffled.save(tmp_path / "c.safetensors").read_bytes() == first


def test_the_hash_names_the_content(codebook):
    changed = codebook.prototypes.clone()
    changed[4, 7] += 1
    hashes = [
        codebook.sha256,
        Codebook(changed, codebook.meta).sha256,
        Codebook(codebook.prototypes.float(), codebook.meta).sha256,
        Codebook(codebook.prototypes.reshape(10, 4)).sha256,
    ]
    assert len(set(hashes)) == 4
    assert Codebook(codebook.prototypes.clone(), {"id": "other"}).sha256 == hashes[0]


def test_normalised_rows_are_float32_directions_and_kept(codebook):
    values = codebook.prototypes.double().numpy()
    expected = values / np.linalg.norm(values, axis=-1, keepdims=True)
    np.testing.assert_allclose(codebook.normalized().numpy(), expected, atol=1e-7)
    half = codebook.normalized("cpu", torch.float16)
    torch.testing.assert_close(half.float(), codebook.normalized(), rtol=0, atol=1e-3)
    assert codebook.normalized("cpu", torch.float16) is half


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(4), "shape (4,)"),
        (torch.ones(0, 4), "shape (0, 4)"),
        (torch.ones(2, 4, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), "not finite in row 1"),
        (torch.tensor([[1.0, 2.0], [math.inf, 1.0]]), "not finite in row 1"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), "zeros in row 2"),
    ],
)
def test_what_is_no_codebook_is_refused(tensor, found):
    with pytest.raises(UserError) as error:
        Codebook(tensor)
    assert found in error.value.found


def test_provenance_of_another_length_is_refused(codebook):
    with pytest.raises(UserError, match="5 entries of row provenance"):
        Codebook(codebook.prototypes[:4], codebook.meta)


def test_a_codebook_for_another_model_is_refused(codebook):
    codebook.check_width(8, "some/model")
    with pytest.raises(UserError, match="8 wide, made with some/model"):
        codebook.check_width(16, "other/model")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_off_file_is_refused(tmp_path, codebook, kept):
    path = codebook.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged or cut off"):
        Codebook.load(path)


def test_changed_values_are_noticed(tmp_path, codebook):
    path = codebook.save(tmp_path / "a.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="sha256"):
        Codebook.load(path)


def test_other_safetensors_missing_files_and_folders_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"prototypes": torch.ones(2, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="without a codebook's metadata"):
        Codebook.load(tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no such file"):
        Codebook.load(tmp_path / "missing.safetensors")


def with_metadata(path: Path, metadata: str | None) -> Path:
    from safetensors.torch import save_file

    save_file({"prototypes": torch.eye(3)}, path, metadata={} if metadata is None else {"rcb_codebook": metadata})
    return path


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("[1, 2]", "its metadata"),
        ("null", "its metadata"),
        ('{"id": 7}', "id: "),
        ('{"rows": [1, 2, 3]}', "rows: "),
        ('{"rows": {"image": "abc"}}', r"rows\.image: "),
        ('{"rows": {"image": ["a"]}}', "1 entries"),
        ('{"counts": {"images": "many"}}', r"counts\.images: "),
        ('{"thresholds": 3}', "thresholds: "),
        ('{"sha256": "0"}', "sha256"),
        ("{" * 10**5, "without a codebook's metadata"),
        ('{"a":' * 10**5, "without a codebook's metadata"),
        ("", "without a codebook's metadata"),
    ],
)
def test_metadata_of_another_shape_is_refused(tmp_path, metadata, found):
    with pytest.raises(UserError, match=found):
        Codebook.load(with_metadata(tmp_path / "a.safetensors", metadata))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, found in (
        ("pipe.safetensors", "a pipe"),
        ("folder.safetensors", "a folder"),
        ("x" * 300, "too long"),
        ("x" * 300 + ".safetensors", "too long"),
        ("a\0.safetensors", "null"),
    ):
        with pytest.raises(UserError, match=found):
            Codebook.load(tmp_path / name)
    for name in ("x" * 300, "a\0b", ""):
        with pytest.raises(UserError, match="neither a file nor the id of a card"):
            Codebook.load(name)


# Extending


def test_merged_codebooks_hold_every_prototype_once(tmp_path, codebook):
    rows = {"image": ["c", "d"], "cluster": [0, 1]}
    other = Codebook(torch.cat([codebook.prototypes[3:4], torch.ones(1, 8).half()]), {"id": "b", "rows": rows})
    merged = codebook.merge([other], name="both")
    assert torch.equal(merged.prototypes, torch.cat([codebook.prototypes, torch.ones(1, 8).half()]))
    assert merged.meta["rows"] == {
        "codebook": ["mine"] * 5 + ["b"],
        "image": ["a", "a", "b", "c", "c", "d"],
        "cluster": [0, 0, 0, 1, 1, 3],
    }
    assert (merged.meta["id"], [part["prototypes"] for part in merged.meta["merged"]]) == ("both", [5, 1])
    again = merged.merge([codebook, other])
    assert again.sha256 == merged.sha256
    assert Codebook.load(merged.save(tmp_path / "both.safetensors")).meta == merged.meta
    assert codebook.merge([Codebook(other.prototypes.float())]).prototypes.dtype == torch.float32


def test_codebooks_of_different_models_are_not_merged(codebook):
    with pytest.raises(UserError, match="4 wide"):
        codebook.merge([Codebook(torch.ones(2, 4))])
    with pytest.raises(UserError, match="some/model and other/model"):
        codebook.merge([Codebook(torch.ones(2, 8), {"model": "other/model"})])
    twins = [Codebook(torch.randn(2, 8), {"model": name, "weights": "1", "dtype": "float16"}) for name in "ab"]
    assert len(twins[0].merge(twins[1:])) == 4  # one checkpoint under two names


def test_the_merge_command(tmp_path, codebook):
    from typer.testing import CliRunner

    from rcb_lmms.cli import app

    names = [
        str(Codebook(codebook.prototypes[part], {"id": f"{part}"}).save(tmp_path / f"{part.start}.safetensors"))
        for part in (slice(0, 2), slice(1, 5))
    ]
    done = CliRunner().invoke(app, ["codebook", "merge", *names, "--out", str(tmp_path / "all.safetensors")])
    assert done.exit_code == 0, done.output
    assert "5 prototypes" in done.output
    assert Codebook.load(tmp_path / "all.safetensors").sha256 == codebook.sha256


@pytest.mark.parametrize(
    ("made", "loaded", "differ"),
    [
        ({"model": "lab"}, "lab", False),
        ({"model": "lab:llava"}, "lab", False),
        ({"model": "lab:llava_next"}, "lab:llava", True),
        ({"model": "liuhaotian/llava-v1.5-7b", "id": "llava-1.5-7b"}, "llava-hf/llava-1.5-7b-hf@main", False),
        ({"model": "liuhaotian/llava-v1.5-7b", "id": "llava-1.5-7b"}, "liuhaotian/llava-v1.5-7b", False),
        ({"model": "liuhaotian/llava-v1.5-7b", "id": "llava-1.5-7b"}, "/data/my-fine-tune", True),
        ({"id": "mine"}, "lab", True),
    ],
)
def test_a_codebook_says_which_checkpoint_it_was_made_for(made, loaded, differ):
    family = SimpleNamespace(
        pretrained=loaded, name="llava", checkpoint="llava-hf/llava-1.5-7b-hf", codebook="llava-1.5-7b"
    )
    expected = (str(made.get("model")), loaded) if differ else None
    assert Codebook(torch.eye(3), made).made_for(family) == expected


# The released tensors


def save_pt(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_importing_a_released_layout(tmp_path, codebook):
    path = save_pt(tmp_path / "coco_numPrototypes-5.pt", codebook.prototypes.clone().requires_grad_())
    path.with_suffix(".json").write_text(json.dumps(["7", "7", "8", "9", "9"]))
    imported = Codebook.from_upstream_pt(path)
    assert torch.equal(imported.prototypes, codebook.prototypes)
    assert not imported.prototypes.requires_grad
    assert imported.meta["rows"] == {"image": ["7", "7", "8", "9", "9"]}
    assert imported.meta["verified"] is False
    known = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    assert imported.meta["git_blob"] == known


def test_types_without_a_place_in_the_file_become_float32(tmp_path, codebook):
    path = save_pt(tmp_path / "a.pt", codebook.prototypes.bfloat16())
    assert Codebook.from_upstream_pt(path).prototypes.dtype == torch.float32


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_pickles_that_are_no_plain_tensor_are_refused(tmp_path, codebook, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = codebook.prototypes.float()
    whole = save_pt(tmp_path / "a.pt", rows).read_bytes()
    contents = {
        "dict.pt": {"a": rows},
        "evil.pt": _Evil(),
        "sparse.pt": rows.to_sparse(),
        "compressed.pt": rows.to_sparse_csr(),
        "quantised.pt": torch.quantize_per_tensor(rows, 0.1, 0, torch.qint8),
        "nested.pt": torch.nested.nested_tensor([rows, rows[:2]]),
        "meta.pt": rows.to("meta"),
        "complex.pt": rows.to(torch.complex64),
        "int.pt": rows.int(),
        "repeated.pt": torch.ones(1).expand(1 << 20, 1 << 20),
        "deep.pt": functools.reduce(lambda inner, _: [inner], range(5000), []),
    }
    raw = {"cut.pt": whole[: len(whole) // 2], "text.pt": b"<html>404</html>", "empty.pt": b""}
    for name, content in raw.items():
        Path(name).write_bytes(content)
    os.mkfifo("pipe.pt")
    for name, content in contents.items():
        with contextlib.suppress(RecursionError):
            save_pt(Path(name), content)
    begun = time.monotonic()
    for name in [*raw, *contents, "pipe.pt", ".", "x" * 300 + ".pt"]:
        with pytest.raises(UserError, match=re.escape(name)):
            Codebook.from_upstream_pt(name)
    assert time.monotonic() - begun < 5
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ('["1"]', "1 entries"),
        ("[1, 2", "not JSON"),
        ('{"a": 1}', "not a list"),
        ("[" * 10**5, "deep"),
        ("", "not JSON"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path, codebook, ids, found):
    path = save_pt(tmp_path / "a.pt", codebook.prototypes)
    path.with_suffix(".json").write_text(ids)
    with pytest.raises(UserError, match=found):
        Codebook.from_upstream_pt(path)


# Cards


def test_the_cards_name_the_released_files():
    known = cards.cards()
    blobs = {name: card.source.git_blob for name, card in known.items() if card.source}
    assert blobs == {
        "llava-1.5-7b": "43534d3253e9c3cc11ee375750cc07907d4695a8",
        "llava-next-llama3-8b": "3798fa1a38b22dcff0ff6fddaac8ecbb86158684",
        "llava-onevision-qwen2-7b": "0e5bb04212bfe0fd38e10daa4d5886f808670a9e",
    }
    for name in blobs:
        card = known[name]
        assert sum(card.clusters) == card.shape[0]
        released = settings_for(card.family)
        assert card.thresholds == {field: getattr(released, field) for field in card.thresholds}
        assert card.source.address.startswith("https://raw.githubusercontent.com/DingchenYang99/RedundancyCodebook/")
    assert known["lab-llava"].file == "lab-llava.safetensors"


def test_the_readme_states_the_size_of_every_codebook():
    readme = (data_dir("codebooks") / "README.md").read_text()
    for name, card in cards.cards().items():
        rows, width = Codebook.load(name).prototypes.shape if card.file else card.shape
        assert f"{rows} x {width} |" in next(line for line in readme.splitlines() if f"`{name}`" in line)


@pytest.fixture
def released(tmp_path, monkeypatch, codebook) -> Path:
    """A folder that plays the upstream repository, and a card `far` that points there."""
    upstream, folder = tmp_path / "upstream", tmp_path / "cards"
    upstream.mkdir()
    folder.mkdir()
    tensor = save_pt(upstream / "far.pt", codebook.prototypes)
    (upstream / "far.json").write_text(json.dumps(list("aabcc")))
    card = (data_dir("codebooks") / "llava-1.5-7b.yaml").read_text()
    entries = {
        "id": "far",
        "shape": "[5, 8]",
        "clusters": "[3, 2]",
        "  address": upstream.as_uri(),
        "  path": "far.pt",
        "  ids": "far.json",
        "  git_blob": subprocess.check_output(["git", "hash-object", tensor], text=True).strip(),
    }
    lines = [line for line in card.splitlines() if line.partition(":")[0] not in entries and "note" not in line]
    lines = [line for line in lines if not line.startswith(("  Thresholds", "  25 of"))]
    source = [f"{key}: {value}" for key, value in entries.items()]
    lines.insert(lines.index("source:") + 1, "\n".join(line for line in source if line.startswith(" ")))
    (folder / "far.yaml").write_text("\n".join([*(line for line in source if not line.startswith(" ")), *lines]))
    monkeypatch.setattr(cards, "data_dir", lambda name: folder)
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    return upstream


def test_an_id_is_downloaded_once_verified_and_cached(released, codebook):
    first = Codebook.load("far")
    assert first.meta["verified"] is True
    assert first.meta["license"] == "Apache-2.0"
    assert first.meta["rows"] == {"image": list("aabcc"), "cluster": [0, 0, 0, 1, 1]}
    assert torch.equal(first.prototypes, codebook.prototypes)
    (released / "far.pt").unlink()
    assert Codebook.load("far").sha256 == first.sha256


def test_offline_the_error_has_the_commands(released):
    (released / "far.pt").unlink()
    with pytest.raises(UserError) as error:
        Codebook.load("far")
    assert f"curl -L -o far.pt {released.as_uri()}/far.pt" in error.value.next_step
    assert error.value.next_step.endswith("rcb codebook import far.pt")


def test_a_download_of_other_content_is_refused_and_not_kept(released, codebook):
    save_pt(released / "far.pt", codebook.prototypes + 1)
    with pytest.raises(UserError, match="another content"):
        Codebook.load("far")
    assert not list(cards.cache_dir().rglob("*.safetensors"))


def test_importing_a_released_file_serves_its_id(released, tmp_path, codebook):
    path = import_upstream(released / "far.pt")
    (released / "far.pt").rename(released / "gone.pt")
    assert path == tmp_path / "cache" / "codebooks" / "far.safetensors"
    assert Codebook.load("far").sha256 == codebook.sha256
    unknown = save_pt(tmp_path / "unknown.pt", codebook.prototypes + 1)
    with pytest.raises(UserError, match="--out"):
        import_upstream(unknown)
    assert Codebook.load(import_upstream(unknown, tmp_path / "mine.safetensors")).meta["verified"] is False


def test_a_shipped_file_comes_before_the_cache(released, tmp_path, codebook):
    card = tmp_path / "cards" / "far.yaml"
    card.write_text(card.read_text() + "\nfile: far.safetensors\n")
    codebook.save(tmp_path / "cards" / "far.safetensors")
    assert cards.resolve("far") == tmp_path / "cards" / "far.safetensors"


def test_unknown_ids_and_pickles_say_what_is_known(released, tmp_path):
    with pytest.raises(UserError, match="an id: far"):
        Codebook.load("near")
    with pytest.raises(UserError, match=r"rcb codebook import .*far\.pt"):
        Codebook.load(released / "far.pt")
    (tmp_path / "cards" / "far.yaml").write_text("id: far\nthreshholds: {}\n")
    with pytest.raises(UserError, match="threshholds"):
        Codebook.load("far")


def test_a_codebook_nobody_made_yet_is_asked_for(released, tmp_path):
    card = (Path(__file__).parents[1] / "codebooks" / "lab-llava.yaml").read_text()
    (tmp_path / "cards" / "lab-llava.yaml").write_text(card)
    with pytest.raises(UserError, match="rcb codebook build"):
        Codebook.load("lab-llava")


def test_data_folders_are_found_and_missing_ones_named():
    assert (data_dir("codebooks") / "README.md").is_file()
    with pytest.raises(UserError, match="no-such-folder"):
        data_dir("no-such-folder")
    assert source_version()["package"] == "rcb_lmms"


def test_an_installed_copy_of_the_data_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "rcb_lmms"
    (package / "_data" / "codebooks").mkdir(parents=True)
    (tmp_path / "site-packages" / "codebooks").mkdir()
    monkeypatch.setattr("rcb_lmms.resources.PACKAGE", package)
    assert data_dir("codebooks") == package / "_data" / "codebooks"
    assert source_version()["commit"] is None


def test_importing_the_codebook_loads_no_torch():
    code = "import sys, rcb_lmms.codebook, rcb_lmms.codebook.cards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Show


def test_show_counts_duplicates_norms_and_clusters():
    prototypes = torch.tensor([[3.0, 4.0], [3.0, 4.0], [6.0, 8.0], [-4.0, 3.0]])
    rows = {"image": ["a", "a", "a", "b"], "cluster": [0, 0, 0, 1]}
    lines = dict(line.split("  ", 1) for line in show(Codebook(prototypes, {"id": "x", "rows": rows})).splitlines())
    shown = {name.strip(): value.strip() for name, value in lines.items()}
    assert shown["prototypes"] == "4 x 2 float32"
    assert shown["duplicates"] == "3 unique rows, 1 pairs of equal rows"
    assert shown["norm"] == "min 5.0, mean 6.2, median 5.0, max 10.0"
    assert shown["pairwise cosine"].startswith("min 0.000, mean 0.500; 1% 0.00, 25% 0.00, 50% 0.50, 75% 1.00")
    assert shown["nearest neighbour"].startswith("min 0.000, mean 0.750")
    assert shown["provenance"] == "2 images, up to 3 rows of one image"
    assert shown["cluster 0"] == "3 rows from row 0, mean norm 6.7, mean cosine inside 1.00, to the others 0.000"
    assert shown["cluster 1"] == "1 rows from row 3, mean norm 5.0, to the others 0.000"


# Clustering


@pytest.mark.parametrize(("include_self", "literal"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(("n", "clusters", "k"), [(40, 6, 5), (40, 1, 16), (7, 7, 6), (2, 1, 1)])
def test_dpc_equals_the_slow_version(n, clusters, k, include_self, literal):
    x = torch.randn(n, 5, dtype=torch.float64) * 0.7
    x[n // 2 :] += 2
    noise = tie_noise(n, 3)
    found = dpc_knn(x, clusters, k, noise, include_self=include_self, literal=literal)
    density, delta, centres, labels = slow_dpc(x.tolist(), clusters, k, noise.tolist(), include_self, literal)
    np.testing.assert_allclose(found.density, density, atol=1e-12)
    np.testing.assert_allclose(found.delta, delta, atol=1e-12)
    assert found.centres.tolist() == centres
    assert found.labels.tolist() == labels


def test_the_printed_equations_decide_where_densities_underflow():
    """Tokens as far apart as real ones: exp(-800) is zero in float64, and a tie breaker would choose the centres."""
    x = torch.randn(30, 400, dtype=torch.float64) * 3
    found = dpc_knn(x, 4, 5, include_self=False, literal=True)
    assert (found.density < -800).all()
    assert found.centres.tolist() == slow_dpc(x.tolist(), 4, 5, None, False, True)[2]
    # Only the printed form takes a peak's distance from its own row.
    line = torch.tensor([[0.0], [0.1], [0.2], [10.0], [30.0]], dtype=torch.float64)
    for literal, expected in ((False, 30), (True, 29.9)):
        found = dpc_knn(line, 2, 2, include_self=False, literal=literal)
        assert found.delta[found.density.argmax()].item() == pytest.approx(expected)


def test_dpc_with_duplicates_and_ties_equals_the_literal_version():
    x = torch.randint(0, 2, (30, 3)).double()
    for noise in (tie_noise(30), torch.zeros(30, dtype=torch.float64)):
        found = dpc_knn(x, 12, 5, noise)
        _, _, centres, labels = slow_dpc(x.tolist(), 12, 5, noise.tolist())
        assert found.centres.tolist() == centres
        assert found.labels.tolist() == labels
        assert found.labels[found.centres].tolist() == list(range(12))


def test_dpc_noise_is_seeded_small_and_decides_ties():
    x = torch.zeros(9, 4)
    assert torch.equal(dpc_knn(x, 2, 3).density, dpc_knn(x, 2, 3, tie_noise(9, 0)).density)
    assert not torch.equal(tie_noise(9, 0), tie_noise(9, 1))
    assert 0 <= tie_noise(1000).min() < tie_noise(1000).max() < 1e-6
    upwards = torch.arange(9) * 1e-7
    assert dpc_knn(x + 1e-3 * torch.eye(9, 4), 1, 9, upwards).centres.tolist() == [8]


def test_dpc_with_fewer_points_than_asked_for():
    x = torch.randn(3, 4)
    assert sorted(dpc_knn(x, 8, 5).labels.tolist()) == [0, 1, 2]
    assert dpc_knn(x[:1], 8, 5, include_self=False).labels.tolist() == [0]
    for include_self, neighbours in ((True, 3), (False, 2)):
        expected = slow_dpc(x.tolist(), 2, neighbours, tie_noise(3).tolist(), include_self)[0]
        np.testing.assert_allclose(dpc_knn(x, 2, 99, include_self=include_self).density, expected, rtol=1e-6)


def test_dpc_separates_clear_clusters_in_half_precision():
    x = torch.cat([torch.randn(20, 64) + shift for shift in (0, 20, -20)]).half()
    labels = dpc_knn(x, 3, 5).labels.reshape(3, 20)
    assert all(len(row.unique()) == 1 for row in labels)
    assert len(labels[:, 0].unique()) == 3


def partition(labels) -> list[list[int]]:
    return [[row for row, own in enumerate(labels) if own == label] for label in dict.fromkeys(labels)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_surviving_clusters_are_listed_by_their_first_candidate(order):
    groups = [torch.randn(6, 4) * 0.1, torch.randn(3, 4) * 0.1 + 3]
    tokens = torch.cat([groups[number] for number in order])
    settings = settings_for("llava", clusters_across=2, k_across=2, tau_in=0)
    members = common_clusters(tokens, torch.arange(9), settings)
    first = len(groups[order[0]])
    assert [rows.tolist() for rows in members] == [list(range(first)), list(range(first, 9))]
    assert [len(rows) for rows in common_clusters(tokens, torch.arange(9), replace(settings, tau_in=3))] == [6]
    assert common_clusters(tokens, torch.arange(9), replace(settings, tau_in=6)) == []


def test_neighbours_exclude_the_token_itself_only_under_the_papers_rules():
    differing = 0
    for _ in range(20):
        tokens, found = torch.randn(30, 3, dtype=torch.float64), {}
        for preset, include_self in (("official", True), ("paper", False)):
            settings = settings_for("llava", preset, clusters_across=6, k_across=3, tau_in=0)
            found[preset] = [rows.tolist() for rows in common_clusters(tokens, torch.arange(30), settings)]
            labels = slow_dpc(tokens.tolist(), 6, 3, tie_noise(30).tolist(), include_self)[-1]
            assert found[preset] == partition(labels)
        differing += found["official"] != found["paper"]
    assert differing


# Divergences


@pytest.mark.parametrize("top_k", [10, 20])
def test_divergences_equal_scipy_and_the_literal_formula(top_k):
    full, ablated = torch.randn(3, 4, 60) * 2, torch.randn(3, 4, 60) * 2
    for spot in np.ndindex(3, 4):
        ids = sorted(range(60), key=lambda i: -full[spot][i])[:top_k]
        m, n = (softmax([logits[spot].tolist()[i] for i in ids]) for logits in (full, ablated))
        q = [(a + b) / 2 for a, b in zip(m, n, strict=True)]
        for preset, expected in {
            "paper": jensenshannon(m, n) ** 2,
            "paper_literal": jensenshannon(m, n) ** 2,
            "official": (entropy(q, m) + entropy(q, n)) / 2 / top_k,
        }.items():
            found = divergence(full, ablated, top_k, preset)
            assert found.shape == (3, 4)
            assert found[spot].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("top_k", [10, 20])
def test_the_released_form_is_a_top_k_th_of_the_papers_for_small_changes(top_k):
    full = torch.randn(50, dtype=torch.float64)
    ablated = full + 1e-3 * torch.randn(50, dtype=torch.float64)
    ratio = divergence(full, ablated, top_k, "paper") / divergence(full, ablated, top_k, "official")
    assert ratio.item() == pytest.approx(top_k, rel=1e-3)


def test_divergence_bounds_and_stored_logits():
    full, ablated = torch.randn(200), torch.randn(200)
    assert divergence(full, full, 10, "official") == 0
    opposite = torch.zeros(20)
    opposite[0] = 1000
    assert divergence(opposite, opposite.roll(1), 20, "paper").item() == pytest.approx(math.log(2))
    assert divergence(opposite, opposite.roll(1), 20, "official").isfinite()
    values, ids = full.topk(50)
    stored = divergence(values, ablated[ids], 10)
    assert stored == divergence(full, ablated, 10)
    assert divergence(full[:7], ablated[:7], 10) == divergence(full[:7], ablated[:7], 7)


def test_top1_probability_is_renormalised_over_the_head():
    logits = torch.randn(2, 300) * 3
    for row in range(2):
        expected = max(softmax(sorted(logits[row].tolist(), reverse=True)[:50]))
        assert top1_probability(logits)[row].item() == pytest.approx(expected, rel=1e-9)
    assert top1_probability(torch.zeros(4)).item() == pytest.approx(0.25)


# Where to probe


@pytest.mark.parametrize(("height", "width"), [(24, 24), (27, 27), (3, 3), (4, 7)])
def test_windows_at_every_position(height, width):
    def offsets(position, size):
        return (0, 1, 2) if position == 0 else (-2, -1, 0) if position == size - 1 else (-1, 0, 1)

    for row in range(height):
        for column in range(width):
            expected = [
                (row + down) * width + column + right
                for down in offsets(row, height)
                for right in offsets(column, width)
            ]
            assert window(row * width + column, height, width) == expected


def test_the_96_ranks_of_the_release():
    starts = (37, 73, 145, 217, 289, 361, 433, 505, 569)
    one_based = list(range(1, 25)) + [start + step for start in starts for step in range(8)]
    assert probed_ranks(576) == one_based


@pytest.mark.parametrize("n", [1, 9, 12, 16, 95, 96, 97, 144, 196, 256, 577, 729, 1024])
@pytest.mark.parametrize("count", [1, 11, 12, 24, 96, 100])
def test_ranks_for_other_grids_are_distinct_and_within(n, count):
    ranks = probed_ranks(n, count)
    assert len(ranks) == min(n, count)
    assert sorted(set(ranks)) == ranks
    assert ranks[0] == 1
    assert ranks[-1] <= n
    assert count < 12 or ranks[-1] == n


def test_ranks_of_the_laboratory_spread_over_the_whole_order():
    blocks = [first + step for first in (10, 19, 37, 55, 73, 91, 109, 127, 143) for step in range(2)]
    assert probed_ranks(144, 24) == [*range(1, 7), *blocks]


def test_patches_by_similarity_with_ties_in_raster_order():
    similarity = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5, 0.5, 0.2, 0.0, 0.3])
    view = VisualTokens(torch.zeros(9, 2), (3, 3), cls_similarity=similarity.half())
    assert probed_patches(view, 9) == [1, 3, 2, 4, 5, 8, 6, 0, 7]
    assert probed_patches(view, 4) == [1, 3, 2, 4]
    alike = VisualTokens(torch.zeros(576, 2), (24, 24), cls_similarity=torch.zeros(576))
    assert probed_patches(alike, 96) == [rank - 1 for rank in probed_ranks(576)]


def test_towers_without_cls_are_probed_on_a_uniform_grid():
    rows = [1, 4, 6, 9, 12, 14, 17, 20, 22, 25]
    assert uniform_grid(27, 27) == [row * 27 + column for row in rows for column in rows]
    assert probed_patches(VisualTokens(torch.zeros(9, 2), (3, 3)), 96) == list(range(9))


# Settings


@pytest.mark.parametrize(
    ("family", "preset", "expected"),
    [
        ("llava", "official", (0.15, 8, 64, 2e-3, 10, 8, 64, 5)),
        ("llava_next", "official", (0.1, 8, 64, 2e-3, 10, 8, 64, 5)),
        ("llava_onevision", "official", (0.08, 3, 16, 1.8e-3, 10, 8, 24, 5)),
        ("llava", "paper", (0.1, 8, 64, 4e-2, 20, 8, 64, 64)),
        ("llava_onevision", "paper", (0.08, 3, 16, 3e-2, 20, 8, 24, 24)),
        ("llava_next", "paper_literal", (0.1, 8, 64, 2e-3, 20, 8, 64, 64)),
        ("llava_onevision", "paper_literal", (0.08, 3, 16, 1.5e-3, 20, 8, 24, 24)),
    ],
)
def test_presets_carry_the_published_numbers(family, preset, expected):
    s = settings_for(family, preset)
    found = (s.tau_prob, s.tau_out, s.tau_in, s.tau_jsd, s.top_k, s.clusters_per_image, s.clusters_across, s.k_across)
    assert found == expected
    assert (s.k_region, s.k_global, s.probes) == (1, 16, 96)
    assert s.k_image == (5 if preset == "official" else 16)
    assert s.article == ("official" if preset == "official" else "paper")


def test_settings_refuse_what_is_unknown():
    assert settings_for("llava", "lab", tau_prob=0.3).tau_prob == 0.3
    for family, preset, changes in [
        ("bert", "official", {}),
        ("llava", "mine", {}),
        ("llava", "official", {"tau_probe": 0.1}),
        ("llava", "official", {"top_k": 51}),
        ("llava", "official", {"article": "der"}),
        ("llava", "official", {"k_image": 0}),
    ]:
        with pytest.raises(UserError):
            settings_for(family, preset, **changes)


def test_settings_from_the_command_line():
    written = ["tau_prob=0.3", "tau_in=8", "prompt=What = this?", "k_global=4", "single_repeats=12", "strict=true"]
    made = settings_for("llava", **parse_changes(written))
    assert (made.tau_prob, made.tau_in, made.prompt, made.k_global) == (0.3, 8, "What = this?", 4.0)
    assert (made.single_repeats, made.strict) == (12, True)
    for wrong in ("tau=1", "tau_in=8.5", "probes=", "tau_prob=nan", "strict=maybe", "top_k=51"):
        name, _, value = wrong.partition("=")
        with pytest.raises(UserError, match=f"{name}: .*, and not {value}"):
            settings_for("llava", **parse_changes([wrong]))


def test_articles_by_rule():
    """The release compares the token: SentencePiece's or a byte-level vocabulary's "A" with its mark of a word."""
    vocabulary = ["\u2581A", "\u0120A", "A", "\u2581a", "An", "\u2581the", "The", "\u2581Apple", ""]
    words = ["A", " A", "A", "a", "An", " the", "The", "Apple", ""]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=vocabulary.__getitem__, decode=lambda ids: words[ids[0]])
    found = {rule: [is_article(tokenizer, token, rule) for token in range(9)] for rule in ("official", "paper", "keep")}
    assert found["official"] == [True] * 2 + [False] * 7
    assert found["paper"] == [True] * 7 + [False] * 2
    assert not any(found["keep"])
