"""Java, which the caption scorers are written in: whether it is there, and runs that fail loudly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rcb_lmms.errors import UserError

# What Java 9 and later close to the serializer of SPICE's parse cache (FST 2.47 reads private fields of these).
OPENED = ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")


def java_banner() -> str:
    """First line of `java -version`.

    Raises:
        UserError: there is no `java` on the PATH, or it does not start.
    """
    try:
        shown = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise _no_java("not found" if isinstance(error, FileNotFoundError) else str(error)) from error
    lines = (shown.stderr or shown.stdout).strip().splitlines()
    if shown.returncode != 0:
        raise _no_java(f"does not start: {lines[0] if lines else shown.returncode}")
    # Java announces options taken from the environment before it says what it is.
    return next((line for line in lines if "version" in line), lines[0] if lines else "present")


def java_command(main: str, jars: Sequence[Path], arguments: Sequence[str], *, memory: str) -> list[str]:
    """Command line of a Java program, with the modules opened that its version closes.

    Args:
        main: name of the class to run.
        jars: class path, in order of precedence.
        arguments: of the program.
        memory: most it may take, such as `8G`.
    """
    found = re.search(r'version "(?:1\.)?(\d+)', java_banner())
    opens = []
    if found is None or int(found[1]) >= 9:  # Java 8 refuses to start on this option
        opens = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED]
        opens.append("--add-opens=java.sql/java.sql=ALL-UNNAMED")
    return ["java", f"-Xmx{memory}", *opens, "-cp", os.pathsep.join(map(str, jars)), main, *arguments]


def run_java(main: str, jars: Sequence[Path], arguments: Sequence[str], *, folder: Path, memory: str = "2G") -> str:
    """Standard output of a Java program run in `folder`.

    Raises:
        UserError: Java is absent, or ended with an error.
    """
    command = java_command(main, jars, arguments, memory=memory)
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        raise _no_java(f"{main} ended with {_status(done.returncode)}: {_reason(done.stderr)}")
    return done.stdout


def _status(code: int) -> str:
    return f"status {code}" if code > 0 else f"signal {signal.Signals(-code).name} (out of memory, perhaps)"


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if ("Error" in line or "Exception" in line) and not line.startswith("at ")]
    return (telling or lines or ["no message"])[-1][:300]


def _no_java(found: str) -> UserError:
    return UserError(
        wanted="Java, for CIDEr's tokenizer and for SPICE",
        found=found,
        allowed="Java 8 or later on the PATH (17 is tested), with the memory that a program asks for",
        next_step="apt-get install default-jre-headless, or conda install openjdk",
    )
