"""The two jars of Stanford CoreNLP 3.6.0 that SPICE needs and pycocoevalcap does not bring."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from rcb_lmms.errors import UserError
from rcb_lmms.files import sha256_of, unwritable, write_atomic
from rcb_lmms.resources import cache_dir

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
VARIABLE = "RCB_CORENLP_DIR"
# The release that pycocoevalcap's own downloader takes.
RELEASE = "stanford-corenlp-full-2015-12-09"
ADDRESS = f"https://nlp.stanford.edu/software/{RELEASE}.zip"


def corenlp_jars() -> list[Path]:
    """The jars: in `RCB_CORENLP_DIR` if that is set, else those fetched, else those pycocoevalcap once downloaded.

    Raises:
        UserError: not there, or not whole.
    """
    named = os.environ.get(VARIABLE)
    places = [Path(named)] if named else [cache_dir() / "corenlp", pycocoevalcap_dir() / "spice" / "lib"]
    for place in places:
        jars = [place / name for name in JARS]
        if all(zipfile.is_zipfile(jar) for jar in jars):
            return jars
    raise UserError(
        wanted="SPICE, which parses captions with Stanford CoreNLP 3.6.0",
        found="no " + " and ".join(JARS) + " in " + " or ".join(map(str, places)),
        allowed=f"both files, whole; {VARIABLE} names their folder",
        next_step="rcb doctor --fetch-spice (about 0.5 GB), or unpack the release's zip and set " + VARIABLE,
    )


def pycocoevalcap_dir() -> Path:
    """Folder of the installed pycocoevalcap, which comes with lmms-eval."""
    import pycocoevalcap.cider

    return Path(next(iter(pycocoevalcap.cider.__path__))).parent


def fetch_corenlp(address: str = ADDRESS) -> list[Path]:
    """Download the release and unpack its two jars into the cache; a broken download continues where it stopped.

    No checksum of the release is published. The archive's length is held against the server's, each jar against
    the checksum inside the archive, and what came is recorded by sha256 beside the jars.

    Raises:
        UserError: no connection, a damaged archive, or no space.
    """
    folder = cache_dir() / "corenlp"
    part = folder / f"{RELEASE}.zip.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(address, part)
        jars = _unpack(part, folder)
    except zipfile.BadZipFile as error:
        part.unlink()
        raise _failed(address, f"a damaged archive ({error}), now removed") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _failed(address, f"no answer ({error})") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    record = {"address": address, "sha256": {jar.name: sha256_of(jar) for jar in jars}}
    write_atomic(folder / "source.json", json.dumps(record, indent=1))
    part.unlink()
    return jars


def _download(address: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch
            return
        raise
    with response:
        have = have if response.status == 206 else 0
        expected = have + int(response.headers["Content-Length"])
        bar = {"total": expected, "initial": have, "desc": "CoreNLP 3.6.0"}
        with part.open("ab" if have else "wb") as handle, tqdm.wrapattr(handle, "write", **bar) as counted:
            shutil.copyfileobj(response, counted, 1 << 20)
    if (found := part.stat().st_size) != expected:
        raise _failed(address, f"the connection ended after {found} of {expected} bytes")


def _unpack(archive: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(archive) as opened:
        for name in JARS:
            if f"{RELEASE}/{name}" not in opened.namelist():
                raise zipfile.BadZipFile(f"no {name} in it")
            with opened.open(f"{RELEASE}/{name}") as source, tempfile.TemporaryDirectory(dir=folder) as fresh:
                with (Path(fresh) / name).open("wb") as handle:
                    shutil.copyfileobj(source, handle, 1 << 20)  # raises BadZipFile if the checksum differs
                os.replace(Path(fresh) / name, folder / name)
    return [folder / name for name in JARS]


def _failed(address: str, found: str) -> UserError:
    return UserError(
        wanted=f"download {address}",
        found=found,
        allowed=f"{RELEASE}.zip, fetched here or on any machine",
        next_step=f"repeat the command (it continues), or unpack the zip by hand and set {VARIABLE} to its folder",
    )
