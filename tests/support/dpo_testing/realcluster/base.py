"""The base image of the test: Debian and Python 3.12 made of packages, since no image registry is at hand.

It replaces `python:3.12-slim-bookworm`. What a machine behind a proxy needs (its certificates, pip's settings) is
put in here and nowhere else: the product's Dockerfiles know nothing of it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from dpo_testing.realcluster.layout import Layout

SUITE = "bookworm"
LIBRARIES = (
    "ca-certificates", "libssl3", "libffi8", "libsqlite3-0", "zlib1g", "libbz2-1.0", "liblzma5", "libreadline8",
    "libncursesw6", "libuuid1", "libexpat1", "libgomp1",
)  # fmt: skip
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_MIRROR = "http://deb.debian.org/debian"
_LEFT_OUT = {"test", "__pycache__", "idlelib", "tkinter", "turtledemo", "lib2to3"}

DOCKERFILE = """\
FROM scratch
ADD rootfs.tar /
ADD python.tar /usr/local/
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY pip.conf /etc/pip.conf
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin LANG=C.UTF-8
RUN ldconfig && ln -sf python3.12 /usr/local/bin/python3 && ln -sf python3.12 /usr/local/bin/python \\
    && python3.12 -m ensurepip --upgrade && ln -sf pip3.12 /usr/local/bin/pip && pip --version
CMD ["python3"]
"""


def build_context(layout: Layout) -> Path:
    """Return a folder with everything that DOCKERFILE adds; what does not change is made once."""
    folder = layout.cache / "base"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rootfs.tar").exists():
        _debian(folder)
    python = folder / "python.tar"
    mark = folder / "python.from"
    source = sys.base_prefix
    if not python.exists() or mark.read_text() != source:
        _python(Path(source), python)
        mark.write_text(source)
    shutil.copy(CERTIFICATES, folder / "ca-certificates.crt")
    (folder / "pip.conf").write_text(_pip_conf())
    (folder / "Dockerfile").write_text(DOCKERFILE)
    return folder


def fingerprint(layout: Layout) -> str:
    """Return a word that changes when the base image would."""
    digest = hashlib.sha256()
    for name in ("Dockerfile", "pip.conf", "python.from", "ca-certificates.crt"):
        digest.update((layout.cache / "base" / name).read_bytes())
    digest.update(str((layout.cache / "base" / "rootfs.tar").stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def _debian(folder: Path) -> None:
    rootfs = folder / "rootfs"
    shutil.rmtree(rootfs, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", SUITE, str(rootfs), _mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        log = rootfs / "debootstrap" / "debootstrap.log"
        more = log.read_text(errors="replace")[-1500:] if log.exists() else ""
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}{more}")
    emptied = (
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "var/cache/apt",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
    )

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = entry.name.removeprefix("./")
        return None if any(path.startswith(f"{name}/") for name in emptied) else entry

    with tarfile.open(folder / "rootfs.tar.part", "w") as archive:
        archive.add(rootfs, arcname=".", filter=keep)
    (folder / "rootfs.tar.part").rename(folder / "rootfs.tar")
    shutil.rmtree(rootfs, ignore_errors=True)


def _python(source: Path, target: Path) -> None:
    """Copy the interpreter that runs this, without tests, static libraries and what was installed into it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        if _LEFT_OUT & set(path.parts) or path.suffix in {".a", ".pyc"} or "site-packages" in path.parts[:-1]:
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return entry

    part = target.with_suffix(".part")
    with tarfile.open(part, "w") as archive:
        archive.add(source / "bin" / version, arcname=f"bin/{version}", filter=keep)
        archive.add(source / "lib" / version, arcname=f"lib/{version}", filter=keep)
        archive.add(source / "include" / version, arcname=f"include/{version}", filter=keep)
        for library in sorted((source / "lib").glob("libpython*.so*")):
            stripped = target.with_name(library.name)
            if library.is_symlink():
                archive.add(library, arcname=f"lib/{library.name}", filter=keep)
                continue
            subprocess.run(["strip", "-o", str(stripped), str(library)], check=True)
            archive.add(stripped, arcname=f"lib/{library.name}", filter=keep)
            stripped.unlink()
    part.rename(target)


def _mirror() -> str:
    """Return the mirror that this machine's own packages come from."""
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if path.is_file():
            found = re.search(r"https?://\S*/debian/?(?=\s|$)", path.read_text(errors="replace"))
            if found:
                return found.group()
    return _MIRROR


def _pip_conf() -> str:
    """Return pip's settings of this machine that matter for reaching a package index."""
    wanted = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    lines = ["[global]", f"cert = {CERTIFICATES}"]
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in wanted:
            lines.append(f"{option} = {value.strip(chr(39))}")
    return "\n".join(lines) + "\n"
