"""The control groups of this process, versions 1 and 2."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str | None:
    """Return a file's text without surrounding blanks, or None if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def cgroup_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return the folders that may limit this process, from its own group up to the top.

    In a container the group's path is often written as the host sees it, and only the top of it
    is mounted; the folders that do not exist are left out.

    Parameters
    ----------
    controller : str
        ``"memory"`` or ``"cpu"``: which hierarchy to look at in version 1.
    root : Path
        Where ``proc`` and ``sys`` are looked for.
    """
    mount = root / "sys/fs/cgroup"
    folders = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / controller, mount / controllers]
        else:
            continue
        # A group outside of this namespace is written with leading "..": nothing of it is seen.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            for depth in range(len(parts), -1, -1):
                folder = top.joinpath(*parts[:depth])
                if folder.is_dir() and folder not in folders:
                    folders.append(folder)
    return folders
